"""CogVideoX's autoencoder: causal convolutions over chunks of frames, with a cache from each chunk for the next.

The latest frames that a convolution read are an argument and a result (`Cache`), so that a clip of any length is one
`lax.scan` over equal chunks, or a loop in Python that holds one chunk at a time.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.cogvideox_vae.config import NORM_EPSILON, CogVideoXVAEConfig, frame_chunks
from jvgen.nn.conv import DEFAULT_INIT, Conv2d, upsample_nearest
from jvgen.nn.conv3d import Conv3d
from jvgen.nn.linear import Linear
from jvgen.nn.norm import GroupNorm
from jvgen.nn.stacked import run_block
from jvgen.parallel.axes import BATCH, CONV_IN, CONV_OUT, FRAMES, HEIGHT, WIDTH, constrain

# The latest frames that causal convolutions read, by the names of their modules; None before the first chunk.
Cache = dict[str, Any] | None


def _pointwise(features_in: int, features_out: int, rngs: nnx.Rngs) -> Linear:
    return Linear(features_in, features_out, axes=(CONV_IN, CONV_OUT), kernel_init=DEFAULT_INIT, rngs=rngs)


class ConditionedNorm(nnx.Module):
    """A group norm whose scale and shift at each pixel are linear in the latents (Zheng et al. 2022, "MoVQ", eq. 5).

    The published form has no "1 +" before the scale. The two pointwise maps are applied before the latents are
    upsampled, which gives the same numbers as the other order.
    """

    def __init__(self, features: int, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(features, groups=config.groups, epsilon=NORM_EPSILON, axis=CONV_OUT)
        self.scale = _pointwise(config.latent_channels, features, rngs)
        self.shift = _pointwise(config.latent_channels, features, rngs)

    def __call__(
        self, clip: Float[Array, "B F H W C"], latents: Float[Array, "B f h w z"]
    ) -> Float[Array, "B F H W C"]:
        shape = clip.shape[1:4]
        return self.norm(clip) * upsample_to(self.scale(latents), shape) + upsample_to(self.shift(latents), shape)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice, added to the input; `conditioned`: norms conditioned on the latents."""

    def __init__(
        self, features_in: int, features_out: int, config: CogVideoXVAEConfig, *, conditioned: bool, rngs: nnx.Rngs
    ):
        def norm(features: int) -> nnx.Module:
            if conditioned:
                return ConditionedNorm(features, config, rngs=rngs)
            return GroupNorm(features, groups=config.groups, epsilon=NORM_EPSILON, axis=CONV_OUT)

        self.norm1 = norm(features_in)
        self.conv1 = Conv3d(features_in, features_out, in_time="causal", rngs=rngs)
        self.norm2 = norm(features_out)
        self.conv2 = Conv3d(features_out, features_out, in_time="causal", rngs=rngs)
        self.shortcut = None if features_in == features_out else _pointwise(features_in, features_out, rngs)

    def __call__(
        self, clip: Float[Array, "B F H W I"], cache: Cache, *latents: Float[Array, "B f h w z"]
    ) -> tuple[Float[Array, "B F H W O"], Cache]:
        new_cache = {}
        hidden = jax.nn.silu(self.norm1(clip, *latents))
        hidden, new_cache["conv1"] = self.conv1(hidden, _layer_cache(cache, "conv1"))
        hidden = jax.nn.silu(self.norm2(hidden, *latents))
        hidden, new_cache["conv2"] = self.conv2(hidden, _layer_cache(cache, "conv2"))
        return hidden + (clip if self.shortcut is None else self.shortcut(clip)), new_cache


class Downsample(nnx.Module):
    """With `temporal`, means of pairs of frames; then a strided convolution of each frame, padded below and right."""

    def __init__(self, features: int, *, temporal: bool, rngs: nnx.Rngs):
        self.temporal = temporal
        self.conv = Conv2d(features, features, strides=(2, 2), padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B f h w C"]:
        if self.temporal and clip.shape[1] > 1:
            clip = _keep_first(clip, _mean_of_pairs)
        return _each_frame(self.conv, clip)


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling of each frame, with `temporal` of time too; then a convolution of each frame."""

    def __init__(self, features: int, *, temporal: bool, rngs: nnx.Rngs):
        self.temporal = temporal
        self.conv = Conv2d(features, features, rngs=rngs)

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B f h w C"]:
        if self.temporal and clip.shape[1] > 1:
            clip = _keep_first(clip, lambda rest: repeat(rest, "b f h w c -> b (f t) h w c", t=2))
        return _each_frame(lambda frames: self.conv(upsample_nearest(frames)), clip)


class Level(nnx.Module):
    """Residual blocks of one width, then a change of resolution (None at the last level)."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        layers: int,
        resample: Callable[..., nnx.Module] | None,
        config: CogVideoXVAEConfig,
        *,
        conditioned: bool,
        rngs: nnx.Rngs,
    ):
        widths = (features_in, *(features_out for _ in range(layers - 1)))
        self.remat = config.remat
        self.blocks = nnx.List(
            [ResidualBlock(width, features_out, config, conditioned=conditioned, rngs=rngs) for width in widths]
        )
        self.resample = None if resample is None else resample(features_out, rngs=rngs)

    def __call__(
        self, clip: Float[Array, "B F H W I"], cache: Cache, *latents: Float[Array, "B f h w z"]
    ) -> tuple[Float[Array, "B T P Q O"], Cache]:
        new_cache = {}
        for index, block in enumerate(self.blocks):
            clip, new_cache[str(index)] = run_block(block, self.remat, clip, _layer_cache(cache, str(index)), *latents)
        if self.resample is not None:
            clip = run_block(self.resample, self.remat, clip)
        return constrain(clip, BATCH, FRAMES, HEIGHT, WIDTH, None), new_cache


class Encoder(nnx.Module):
    """A chunk of frames to the moments of its latents."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_channels
        self.conv_in = Conv3d(config.channels, widths[0], in_time="causal", rngs=rngs)
        self.levels = nnx.List(_levels(Downsample, widths, config.layers_per_block, config, rngs))
        self.mid = Level(widths[-1], widths[-1], 2, None, config, conditioned=False, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=config.groups, epsilon=NORM_EPSILON, axis=CONV_OUT)
        self.conv_out = Conv3d(widths[-1], 2 * config.latent_channels, in_time="causal", rngs=rngs)

    def __call__(self, frames: Float[Array, "B F H W C"], cache: Cache) -> tuple[Float[Array, "B f h w M"], Cache]:
        new_cache, levels = {}, {}
        hidden, new_cache["conv_in"] = self.conv_in(frames, _layer_cache(cache, "conv_in"))
        for index, level in enumerate(self.levels):
            hidden, levels[str(index)] = level(hidden, _layer_cache(cache, "levels", str(index)))
        hidden, new_cache["mid"] = self.mid(hidden, _layer_cache(cache, "mid"))
        hidden, new_cache["conv_out"] = self.conv_out(
            jax.nn.silu(self.norm_out(hidden)), _layer_cache(cache, "conv_out")
        )
        return hidden, {**new_cache, "levels": levels}


class Decoder(nnx.Module):
    """A chunk of latent frames to frames; its levels are those of the encoder in reverse, with one more block each."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_channels[::-1]
        self.conv_in = Conv3d(config.latent_channels, widths[0], in_time="causal", rngs=rngs)
        self.mid = Level(widths[0], widths[0], 2, None, config, conditioned=True, rngs=rngs)
        self.levels = nnx.List(_levels(Upsample, widths, config.layers_per_block + 1, config, rngs))
        self.norm_out = ConditionedNorm(widths[-1], config, rngs=rngs)
        self.conv_out = Conv3d(widths[-1], config.channels, in_time="causal", rngs=rngs)

    def __call__(self, latents: Float[Array, "B f h w z"], cache: Cache) -> tuple[Float[Array, "B F H W C"], Cache]:
        new_cache, levels = {}, {}
        hidden, new_cache["conv_in"] = self.conv_in(latents, _layer_cache(cache, "conv_in"))
        hidden, new_cache["mid"] = self.mid(hidden, _layer_cache(cache, "mid"), latents)
        for index, level in enumerate(self.levels):
            hidden, levels[str(index)] = level(hidden, _layer_cache(cache, "levels", str(index)), latents)
        hidden = jax.nn.silu(self.norm_out(hidden, latents))
        hidden, new_cache["conv_out"] = self.conv_out(hidden, _layer_cache(cache, "conv_out"))
        return hidden, {**new_cache, "levels": levels}


class CogVideoXVAE(nnx.Module):
    """`encode` to moments, `decode` from latents; `encode_chunk` and `decode_chunk` take one chunk of frames."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B f h w M"]:
        """Mean and raw log variance of the latents, concatenated over channels, of a clip in [-1, 1].

        The clip is cut into chunks of `config.encode_chunk_frames` frames, of which the first also has the remainder.
        """
        return _over_chunks(self.encoder, clip, self.config.encode_chunk_frames)

    def decode(self, latents: Float[Array, "B f h w z"]) -> Float[Array, "B F H W C"]:
        """A clip, in [-1, 1] up to the error of the network, from latents that are not scaled for diffusion."""
        return _over_chunks(self.decoder, latents, self.config.decode_chunk_frames)

    def encode_chunk(
        self, frames: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B f h w M"], dict[str, Any]]:
        """Moments of one chunk of frames, and the cache for the next chunk (None for the first)."""
        return self.encoder(frames, cache)

    def decode_chunk(
        self, latents: Float[Array, "B f h w z"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], dict[str, Any]]:
        """Frames of one chunk of latent frames, and the cache for the next chunk (None for the first)."""
        return self.decoder(latents, cache)

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B T H W C"]:
        """Reconstruct a clip through the most likely latents."""
        return self.decode(self.encode(clip)[..., : self.config.latent_channels])


def upsample_to(values: Float[Array, "B f h w C"], shape: tuple[int, int, int]) -> Float[Array, "B F H W C"]:
    """Nearest neighbors on a grid of (frames, height, width) that are whole multiples.

    Of an odd number of frames above one, the first is copied to the first only, as in `Upsample`.
    """
    frames, height, width = shape
    if frames > 1 and frames % 2:
        first, rest = values[:, :1], values[:, 1:]
        return jnp.concatenate(
            [upsample_to(first, (1, height, width)), upsample_to(rest, (frames - 1, height, width))], axis=1
        )
    times = [size // old for size, old in zip(shape, values.shape[1:4], strict=True)]
    assert [old * n for old, n in zip(values.shape[1:4], times, strict=True)] == list(shape), (values.shape, shape)
    return repeat(values, "b f h w c -> b (f t) (h p) (w q) c", t=times[0], p=times[1], q=times[2])


def stream_chunks(
    step: Callable[[jax.Array, Cache], tuple[jax.Array, Cache]], clip: Float[Array, "B F H W C"], size: int | None
) -> Iterator[jax.Array]:
    """Results of chunks of frames, one at a time: for clips whose result as a whole does not fit on a device.

    Args:
      step: `encode_chunk` or `decode_chunk` with its parameters, under `jax.jit`; compiled once for the first chunk and
        once for the others.
      clip: pixels or latents.
      size: `config.encode_chunk_frames` or `config.decode_chunk_frames`.
    """
    cache = None
    for start, stop in frame_chunks(clip.shape[1], size):
        result, cache = step(clip[:, start:stop], cache)
        yield result


def _over_chunks(
    function: Callable[[jax.Array, Cache], tuple[jax.Array, Cache]], clip: jax.Array, size: int | None
) -> jax.Array:
    """Run a coder over chunks of frames: the first separately, because it may be longer, and a scan over the others."""
    (_, first), *others = frame_chunks(clip.shape[1], size)
    head, cache = function(clip[:, :first], None)
    if not others:
        return head
    chunks = rearrange(clip[:, first:], "b (n f) h w c -> n b f h w c", n=len(others))

    def step(cache: Cache, frames: jax.Array) -> tuple[Cache, jax.Array]:
        result, cache = function(frames, cache)
        return cache, result

    _, tail = jax.lax.scan(step, cache, chunks)
    return jnp.concatenate([head, rearrange(tail, "n b f h w c -> b (n f) h w c")], axis=1)


def _levels(
    kind: type[Downsample] | type[Upsample],
    widths: tuple[int, ...],
    layers: int,
    config: CogVideoXVAEConfig,
    rngs: nnx.Rngs,
) -> list[Level]:
    """Levels in the order in which they run; the first `config.temporal_levels` change the number of frames."""
    levels = []
    for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        resample = None
        if index < len(widths) - 1:
            resample = functools.partial(kind, temporal=index < config.temporal_levels)
        levels.append(Level(before, width, layers, resample, config, conditioned=kind is Upsample, rngs=rngs))
    return levels


def _layer_cache(cache: Cache, *names: str) -> Any:
    for name in names:
        cache = None if cache is None else cache[name]
    return cache


def _each_frame(function: Callable[[jax.Array], jax.Array], clip: jax.Array) -> jax.Array:
    frames = function(rearrange(clip, "b f h w c -> (b f) h w c"))
    return rearrange(frames, "(b f) h w c -> b f h w c", b=clip.shape[0])


def _keep_first(clip: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Apply a function to the frames of a clip; of an odd number, the first is kept as it is."""
    if clip.shape[1] % 2 == 0:
        return function(clip)
    return jnp.concatenate([clip[:, :1], function(clip[:, 1:])], axis=1)


def _mean_of_pairs(clip: jax.Array) -> jax.Array:
    pairs = rearrange(clip, "b (f t) h w c -> b f t h w c", t=2)
    return jnp.mean(pairs.astype(jnp.float32), axis=2).astype(clip.dtype)
