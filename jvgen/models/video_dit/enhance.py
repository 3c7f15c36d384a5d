"""Enhance-A-Video: attention scaled up where frames attend to each other, without training (arXiv 2502.07508).

Attention of one place over the F frames alone, softmax(q_f . k_g / sqrt(D)), has an intensity across frames: the mean
of its entries off the diagonal. Rows add up to one, so with d the mean of its diagonal,

    intensity = (1 - d) / (F - 1)          factor = max(1, (F + temperature) intensity)

and only diagonals are computed. The factor multiplies the video rows of what attention gives, bias of the projection
included (Luo et al. 2025, equations 6 to 8, and the released code).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.models.video_dit.model import TokenLayout
from jvgen.nn.attention import gathered
from jvgen.parallel import axes

# With a temperature of -1 no factor is above one: (F - 1) (1 - d) / (F - 1) <= 1.
OFF = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnhanceConfig(Config):
    """How strongly attention is scaled, and what shares a factor.

    Attributes:
      temperature: added to the number of frames; 3.4 is published for CogVideoX, -1 and below do nothing.
      relative: the temperature counts in frames: 0.25 means F / 4. Uniform attention then gets 1 + temperature for
        clips of any length, where a fixed one gives short clips much larger factors.
      share: what has one factor: the "batch" (as published; a clip then depends on its neighbours), a "clip" with its
        conditional and unconditional half (the same for one clip at a time), a "sample" of the batch, or a "head".
      gain: the adaptive temperature. In place of a fixed one, each sample gets in each layer the temperature at which
        the mean factor of its heads is this: heads differ by intensity, and the sum is under control. None: fixed.
      start, end: part of the sampler's steps in which it acts, as shares of them: 0 the first step, 1 after the last.
      layers: a factor on the temperature for each layer; empty for one everywhere, 0 turns a layer off.
    """

    temperature: float = 3.4
    relative: bool = False
    share: Literal["batch", "clip", "sample", "head"] = "clip"
    gain: float | None = None
    start: float = 0.0
    end: float = 1.0
    layers: tuple[float, ...] = ()

    def validate(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start = {self.start}, end = {self.end}: shares of the steps, 0 <= start <= end <= 1.")
        if self.gain is not None and self.gain < 1:
            raise ValueError(f"gain = {self.gain}: a mean factor of 1 (nothing) or more, for example 1.15; or none.")
        if self.gain is not None and self.share != "head":
            raise ValueError(
                f"gain = {self.gain}, share = {self.share!r}: the adaptive temperature needs share 'head'."
            )

    def check_layers(self, layers: int) -> None:
        """Raise `ValueError` unless `layers` says something of each of a network's layers, or of none."""
        if len(self.layers) not in (0, layers):
            raise ValueError(f"layers has {len(self.layers)} factors: give one for each of the {layers}, or none.")

    def strengths(self, layers: int) -> np.ndarray:
        """Temperature (or with `gain`, excess of the mean factor over one) of each layer, float32 `[layers]`."""
        self.check_layers(layers)
        of_layer = np.asarray(self.layers or (1.0,) * layers, np.float32)
        if self.gain is not None:
            return of_layer * np.float32(self.gain - 1)
        return np.where(of_layer == 0, np.float32(OFF), of_layer * np.float32(self.temperature))

    def active_in(self, step: int, steps: int) -> bool:
        """Whether it acts in a step of a sampler."""
        return self.start * steps <= step < self.end * steps


@dataclasses.dataclass(frozen=True)
class Enhancement:
    """The factor as a hook of attention (`jvgen.models.video_dit.model.AttentionScale`).

    Attributes:
      config: what shares a factor, and how temperatures count.
      strengths: of each layer, see `EnhanceConfig.strengths`; an array, so that a change of it compiles nothing anew.
      active: scalar bool array, or None for always.
      clip_size: neighbouring entries of the batch that belong to one clip, for share "clip": 2 with the two halves of
        classifier-free guidance side by side.
    """

    config: EnhanceConfig
    strengths: jax.Array
    active: jax.Array | None = None
    clip_size: int = 1

    def __call__(
        self, query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], layout: TokenLayout, layer: jax.Array
    ) -> Float[Array, "#B #N"]:
        """Factors of a layer, float32."""
        frames = layout.grid[0]
        if frames == 1:
            # An image has no other frame: the formula would divide zero by zero.
            return jnp.ones((1, 1))
        diagonal = mean_diagonal(query, key, layout)
        strength = self.strengths.astype(jnp.float32)[layer]
        intensity = (1.0 - shared(diagonal, self.config.share, self.clip_size)) / (frames - 1)
        if self.config.gain is None:
            temperature = strength * frames if self.config.relative else strength
            factor = jnp.maximum((frames + temperature) * intensity, 1.0)
        else:
            factor = with_mean(intensity, 1.0 + strength)
        return factor if self.active is None else jnp.where(self.active, factor, 1.0)


def mean_diagonal(
    query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], layout: TokenLayout
) -> Float[Array, "B N"]:
    """How much each frame attends to itself among the frames at its place: mean over places and frames, float32.

    Over a mesh each device takes its own queries, and keys gathered over the split of tokens, as attention does.
    """
    partitioner = axes.current()
    if partitioner is None or partitioner.mesh.size == 1:
        total = _summed_diagonal(query, key, layout, 0)
    else:
        spec = partitioner.activation((axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None), query.shape).spec
        batch, split, heads = spec[0], spec[1], spec[2]

        def local(query: jax.Array, key: jax.Array) -> jax.Array:
            if split is None:
                return _summed_diagonal(query, key, layout, 0)
            first = jax.lax.axis_index(split) * query.shape[1]
            return jax.lax.psum(_summed_diagonal(query, gathered(key, split), layout, first), split)

        places = {"in_specs": (spec, spec), "out_specs": PartitionSpec(batch, heads)}
        total = jax.shard_map(local, mesh=partitioner.mesh, check_vma=False, **places)(query, key)
    return total / (layout.valid - layout.text)


def _summed_diagonal(
    query: Float[Array, "B L N D"], key: Float[Array, "B K N D"], layout: TokenLayout, first: int | jax.Array
) -> Float[Array, "B N"]:
    """Sum over the video's rows among `query`, which begin at row `first` of the sequence; `key` is the whole of it."""
    frames, length = layout.grid[0], query.shape[1]
    if length == key.shape[1] and axes.platform() != "tpu":
        return _regrouped_diagonal(query, key, layout)
    places = (layout.valid - layout.text) // frames
    # Shifted by whole frames, around the end, every row meets the key of its place in each frame: nothing is regrouped,
    # and no matrices of a few frames are multiplied, which would leave a TPU's matrix units idle.
    video = key[:, layout.text : layout.valid]
    turned = jnp.concatenate([video, video], axis=1)
    turned = jnp.pad(turned, ((0, 0), (layout.text, key.shape[1] - layout.valid), (0, 0), (0, 0)))

    def scores(shift: int) -> jax.Array:
        keys = jax.lax.dynamic_slice_in_dim(turned, first + shift * places, length, axis=1)
        return jnp.einsum("blnd,blnd->bln", query, keys, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5

    by_shift = jnp.stack([scores(shift) for shift in range(frames)])
    own = jnp.exp(by_shift[0] - jax.nn.logsumexp(by_shift, axis=0))
    row = first + jnp.arange(length)[:, None]
    return jnp.sum(jnp.where((row >= layout.text) & (row < layout.valid), own, 0.0), axis=1)


def _regrouped_diagonal(
    query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], layout: TokenLayout
) -> Float[Array, "B N"]:
    """The same of a whole sequence, as a product of matrices for each place: four times as fast on a CPU."""
    query, key = (
        rearrange(rows[:, layout.text : layout.valid], "b (f p) n d -> b f p n d", f=layout.grid[0])
        for rows in (query, key)
    )
    scores = jnp.einsum("bfpnd,bgpnd->bpnfg", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    own = jnp.diagonal(jax.nn.log_softmax(scores, axis=-1), axis1=-2, axis2=-1)
    return jnp.sum(jnp.exp(own), axis=(1, 3))


def shared(values: Float[Array, "B N"], share: str, clip_size: int = 1) -> Float[Array, "#B #N"]:
    """Means over what has one factor; see `EnhanceConfig.share`."""
    if share == "head":
        return values
    by_sample = jnp.mean(values, axis=1, keepdims=True)
    if share == "sample":
        return by_sample
    if share == "batch":
        return jnp.mean(by_sample, axis=0, keepdims=True)
    assert values.shape[0] % clip_size == 0, f"{values.shape[0]} samples are not whole clips of {clip_size}"
    by_clip = jnp.mean(rearrange(by_sample, "(b k) 1 -> b k", k=clip_size), axis=1)
    return jnp.repeat(by_clip, clip_size)[:, None]


def with_mean(intensity: Float[Array, "B N"], mean: Float[Array, ""]) -> Float[Array, "B N"]:
    """Factors max(1, t intensity) of the heads, with t such that their mean is as given.

    With the heads from the most intense down, the k first of them above one and c_k the sum of their intensities, the
    mean is (N - k + t c_k) / N. Of all k the right one makes it largest for a given t: the smallest t solves it.
    """
    heads = intensity.shape[1]
    falling = -jnp.sort(-intensity, axis=1)
    count = jnp.arange(1, heads + 1, dtype=jnp.float32)
    # Where frames attend to nothing but themselves no temperature is enough; the floor keeps the answer finite.
    needed = (heads * (mean - 1.0) + count) / jnp.maximum(jnp.cumsum(falling, axis=1), 1e-6)
    return jnp.maximum(jnp.min(needed, axis=1, keepdims=True) * intensity, 1.0)
