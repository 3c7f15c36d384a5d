"""Enhance-A-Video: attention scaled up where frames attend to each other, without training (arXiv 2502.07508).

Attention among the F frames at one place, softmax(q_f . k_g / sqrt(D)), has a cross-frame intensity: the mean of its
off-diagonal entries. Rows add up to one, so with d the mean of its diagonal,

    intensity = (1 - d) / (F - 1)          factor = max(1, (F + temperature) intensity)

and only diagonals are computed. The factor multiplies the video rows of the attention output, including the bias of its
projection (Luo et al. 2025, equations 6 to 8, and the released code).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.models.video_dit.model import TokenLayout
from jvgen.nn.frame_diagonal import mean_diagonal
from jvgen.value_rules import Bounds, Fraction, Scale

# With a temperature of -1 no factor is above one: (F - 1) (1 - d) / (F - 1) <= 1.
OFF = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnhanceConfig(Config):
    """How much attention is scaled, and what shares a factor.

    Attributes:
      temperature: added to the number of frames; 3.4 is published for CogVideoX, -1 and below have no effect.
      relative: the temperature is in units of frames: 0.25 means F / 4. The factor of uniform attention is then
        1 + temperature for clips of any length, where a fixed temperature gives short clips much larger factors.
      share: what shares one factor: the "batch" (as published; a clip then depends on others in its batch), a "clip"
        with its conditional and unconditional half (as published for batches of one clip), a "sample" of the batch, or
        a "head".
      gain: mean factor of the heads, for the adaptive temperature: in each layer, each sample gets the temperature at
        which the mean factor of its heads is `gain`. None for a fixed temperature.
      start, end: active part of the sampler's steps, as fractions: 0 is the first step, 1 is after the last.
      layers: one factor on the temperature per layer; empty for 1 in all layers, 0 turns a layer off.
    """

    temperature: Scale = 3.4
    relative: bool = False
    share: Literal["batch", "clip", "sample", "head"] = "clip"
    gain: Annotated[float, Bounds(at_least=1, at_most=1000, fix="for example 1.15; or none")] | None = None
    start: Fraction = 0.0
    end: Fraction = 1.0
    layers: tuple[Scale, ...] = ()

    def validate(self) -> None:
        if self.start > self.end:
            raise ValueError(f"start = {self.start}, end = {self.end}: must be fractions, 0 <= start <= end <= 1.")
        if self.gain is not None and self.share != "head":
            raise ValueError(
                f"gain = {self.gain}, share = {self.share!r}: the adaptive temperature needs share 'head'."
            )

    def check_layers(self, layers: int) -> None:
        """Raise `ValueError` unless `layers` is empty or has one entry for each layer of a network."""
        if len(self.layers) not in (0, layers):
            raise ValueError(f"layers has {len(self.layers)} factors: give one for each of the {layers}, or none.")

    def strengths(self, layers: int) -> np.ndarray:
        """Temperature (with `gain`, the mean factor minus one) of each layer, float32 `[layers]`."""
        self.check_layers(layers)
        of_layer = np.asarray(self.layers or (1.0,) * layers, np.float32)
        if self.gain is not None:
            return of_layer * np.float32(self.gain - 1)
        return np.where(of_layer == 0, np.float32(OFF), of_layer * np.float32(self.temperature))

    def active_in(self, step: int, steps: int) -> bool:
        """Whether attention is scaled in step `step` of a sampler of `steps` steps."""
        # Rounded, because 0.14 x 50 is more than 7 in floating point.
        return round(self.start * steps, 6) <= step < round(self.end * steps, 6)


@dataclasses.dataclass(frozen=True)
class Enhancement:
    """The factor as a hook of attention (`jvgen.models.video_dit.model.AttentionScale`).

    Attributes:
      config: what shares a factor, and the unit of temperatures.
      strengths: of each layer, float32, see `EnhanceConfig.strengths`; given to a compiled function as an argument,
        other values need no compilation.
      active: scalar bool array, or None for always.
      clip_size: adjacent entries of the batch that belong to one clip, for share "clip": 2 with the two halves of
        classifier-free guidance side by side.
    """

    config: EnhanceConfig
    strengths: jax.Array | np.ndarray
    active: jax.Array | None = None
    clip_size: int = 1

    def __call__(
        self, query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], layout: TokenLayout, layer: jax.Array
    ) -> Float[Array, "#B #N"]:
        """Factors of a layer, float32."""
        frames = layout.grid[0]
        if frames == 1:
            # The formula divides zero by zero.
            return jnp.ones((1, 1))
        diagonal = mean_diagonal(query, key, frames=frames, start=layout.text, stop=layout.valid)
        strength = jnp.asarray(self.strengths, jnp.float32)[layer]
        intensity = (1.0 - shared_mean(diagonal, self.config.share, self.clip_size)) / (frames - 1)
        if self.config.gain is None:
            temperature = strength * frames if self.config.relative else strength
            factor = jnp.maximum((frames + temperature) * intensity, 1.0)
        else:
            factor = factors_with_mean(intensity, 1.0 + strength)
        return factor if self.active is None else jnp.where(self.active, factor, 1.0)


def shared_mean(values: Float[Array, "B N"], share: str, clip_size: int = 1) -> Float[Array, "#B #N"]:
    """Means over what shares a factor; see `EnhanceConfig.share`."""
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


def factors_with_mean(intensity: Float[Array, "B N"], mean: Float[Array, ""]) -> Float[Array, "B N"]:
    """Factors max(1, t intensity) of the heads, with t such that their mean is `mean`.

    With heads sorted by falling intensity, k of them with factors above one, and c_k the sum of the k largest
    intensities, the mean is (N - k + t c_k) / N. For a given t the right k maximizes it, so the smallest t over all k
    is the solution.
    """
    heads = intensity.shape[1]
    falling = -jnp.sort(-intensity, axis=1)
    count = jnp.arange(1, heads + 1, dtype=jnp.float32)
    # If all frames attend only to themselves, no temperature is enough; the floor keeps the result finite.
    needed = (heads * (mean - 1.0) + count) / jnp.maximum(jnp.cumsum(falling, axis=1), 1e-6)
    return jnp.maximum(jnp.min(needed, axis=1, keepdims=True) * intensity, 1.0)
