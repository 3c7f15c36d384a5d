"""The layers of a CV-VAE. Each takes a cache of the frames before, and returns the cache for the frames that follow."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.nn.attention import attention
from jvgen.nn.conv import DEFAULT_INIT
from jvgen.nn.conv3d import Conv3d, InTime
from jvgen.nn.linear import Initializer, Linear
from jvgen.nn.norm import GroupNorm, LayerNorm
from jvgen.nn.stacked import run_block
from jvgen.parallel.axes import BATCH, CONV_IN, CONV_OUT, FRAMES, HEIGHT, WIDTH, constrain

# Earlier frames that causal layers read, by the names of their modules; None at the start of a clip.
Cache = Mapping[str, Any] | None
NewCache = dict[str, Any]

TEMPORAL_NORM_EPSILON = 1e-5


def pointwise(features_in: int, features_out: int, rngs: nnx.Rngs, kernel_init: Initializer = DEFAULT_INIT) -> Linear:
    """A linear map over channels."""
    return Linear(features_in, features_out, axes=(CONV_IN, CONV_OUT), kernel_init=kernel_init, rngs=rngs)


def norm(features: int, config: CVVAEConfig) -> GroupNorm:
    """A group norm over a clip or over each frame, as `config.norm` has it."""
    leading = 1 if config.norm.over_clip else 2
    return GroupNorm(features, groups=config.groups, epsilon=config.norm.epsilon, axis=CONV_OUT, leading=leading)


def layer_cache(cache: Cache, name: str) -> Any:
    """The cache of the layer of this name."""
    return None if cache is None else cache[name]


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, added to the input; a pointwise map of the input where the width changes.

    The first convolution is over the clip, the second over each frame, or with `config.full_3d` over the clip too.
    """

    def __init__(self, features_in: int, features_out: int, config: CVVAEConfig, *, in_time: InTime, rngs: nnx.Rngs):
        self.norm1 = norm(features_in, config)
        self.conv1 = Conv3d(features_in, features_out, in_time=in_time, border=config.padding.border, rngs=rngs)
        self.norm2 = norm(features_out, config)
        if config.full_3d:
            self.conv2 = Conv3d(features_out, features_out, in_time=in_time, border=config.padding.border, rngs=rngs)
        else:
            # Zeros beyond the sides of a frame in every network.
            self.conv2 = Conv3d(features_out, features_out, kernel_size=(1, 3, 3), in_time=in_time, rngs=rngs)
        self.shortcut = None if features_in == features_out else pointwise(features_in, features_out, rngs)

    def __call__(
        self, clip: Float[Array, "B F H W I"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W O"], NewCache]:
        new_cache: NewCache = {}
        hidden, new_cache["conv1"] = self.conv1(jax.nn.silu(self.norm1(clip)), layer_cache(cache, "conv1"))
        hidden, new_cache["conv2"] = self.conv2(jax.nn.silu(self.norm2(hidden)), layer_cache(cache, "conv2"))
        return hidden + (clip if self.shortcut is None else self.shortcut(clip)), new_cache


class FrameAttention(nnx.Module):
    """One head of self-attention, as wide as the clip has channels, over all pixels of each frame; added to the input.

    With `temporal`, the attention along time of `config.temporal_attention` follows.
    """

    def __init__(self, features: int, config: CVVAEConfig, *, temporal: bool, rngs: nnx.Rngs):
        self.norm = GroupNorm(features, groups=config.groups, epsilon=config.norm.epsilon, axis=CONV_OUT, leading=2)
        self.query = pointwise(features, features, rngs)
        self.key = pointwise(features, features, rngs)
        self.value = pointwise(features, features, rngs)
        self.output = pointwise(features, features, rngs)
        kind = config.temporal_attention.kind if temporal else "none"
        self.causal = kind == "causal"
        self.temporal = None if kind == "none" else TemporalAttention(features, config, rngs=rngs)

    def __call__(
        self, clip: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], NewCache]:
        tokens = rearrange(self.norm(clip), "b f h w c -> (b f) (h w) 1 c")
        tokens = attention(self.query(tokens), self.key(tokens), self.value(tokens))
        batch, _, height, _, _ = clip.shape
        spatial = rearrange(self.output(tokens), "(b f) (h w) 1 c -> b f h w c", b=batch, h=height)
        if self.temporal is None:
            return clip + spatial, {}
        if not self.causal:
            return clip + self.temporal(spatial)[0], {}
        clip = clip + spatial
        change, new_cache = self.temporal(clip, layer_cache(cache, "temporal"))
        return clip + change, {"temporal": new_cache}


class TemporalAttention(nnx.Module):
    """One head of attention along time, separately for each pixel: over the whole clip, or over a causal window."""

    def __init__(self, features: int, config: CVVAEConfig, *, rngs: nnx.Rngs):
        causal = config.temporal_attention.kind == "causal"
        self.window = config.temporal_attention.window if causal else None
        self.norm = LayerNorm(features, epsilon=TEMPORAL_NORM_EPSILON, axis=CONV_OUT)
        self.query = pointwise(features, features, rngs)
        self.key = pointwise(features, features, rngs)
        self.value = pointwise(features, features, rngs)
        # Initialized with zeros where it is added, so that an inflated image autoencoder is unchanged.
        self.output = pointwise(features, features, rngs, nnx.initializers.zeros if causal else DEFAULT_INIT)

    def __call__(
        self, clip: Float[Array, "B F H W C"], cache: Float[Array, "B P H W C"] | None = None
    ) -> tuple[Float[Array, "B F H W C"], Float[Array, "B K H W C"] | None]:
        """The attention's output, and the latest normalized frames as the cache for the frames that follow."""
        normed = self.norm(clip)
        context = normed if cache is None else jnp.concatenate([cache, normed], axis=1)
        batch, frames, height, width, _ = clip.shape
        queries, keys = (rearrange(x, "b f h w c -> (b h w) f 1 c") for x in (normed, context))
        bias = None
        if self.window is not None:
            positions = jnp.arange(context.shape[1])
            distance = positions[-frames:, None] - positions[None]
            bias = jnp.where((distance >= 0) & (distance < self.window), 0.0, -jnp.inf)[None, None]
        tokens = attention(self.query(queries), self.key(keys), self.value(keys), bias=bias)
        output = rearrange(self.output(tokens), "(b h w) f 1 c -> b f h w c", b=batch, h=height, w=width)
        if self.window is None:
            return output, None
        return output, context[:, max(context.shape[1] - self.window + 1, 0) :]


class MidBlock(nnx.Module):
    """Residual block, attention if the configuration has it, residual block; at the coarsest level."""

    def __init__(self, config: CVVAEConfig, *, in_time: InTime, temporal: bool, rngs: nnx.Rngs):
        width = config.block_channels[-1]
        self.remat = config.remat
        self.first = ResidualBlock(width, width, config, in_time=in_time, rngs=rngs)
        self.attention = FrameAttention(width, config, temporal=temporal, rngs=rngs) if config.mid_attention else None
        self.second = ResidualBlock(width, width, config, in_time=in_time, rngs=rngs)

    def __call__(
        self, clip: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], NewCache]:
        new_cache: NewCache = {}
        for name in ("first", "attention", "second"):
            block = getattr(self, name)
            if block is not None:
                clip, new_cache[name] = run_block(block, self.remat, clip, layer_cache(cache, name))
        return clip, new_cache


class Downsample(nnx.Module):
    """A strided convolution: half the height and width, and with `temporal` half the frames."""

    def __init__(self, features: int, config: CVVAEConfig, *, temporal: bool, rngs: nnx.Rngs):
        sides = ((1, 1), (1, 1)) if config.padding.downsample_around else ((0, 1), (0, 1))
        self.conv = Conv3d(
            features, features, strides=(2 if temporal else 1, 2, 2), in_time="causal", sides=sides,
            border=config.padding.border, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self, clip: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B f h w C"], NewCache]:
        clip, new_cache = self.conv(clip, layer_cache(cache, "conv"))
        return clip, {"conv": new_cache}


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling of each frame, then a convolution, which with `temporal` gives two frames for one.

    Of the two frames for the first frame of a clip, the earlier is dropped.
    """

    def __init__(self, features: int, config: CVVAEConfig, *, temporal: bool, rngs: nnx.Rngs):
        self.temporal = temporal
        self.conv = Conv3d(
            features,
            2 * features if temporal else features,
            in_time=config.padding.upsample_time,
            border=config.padding.border,
            rngs=rngs,
        )

    def __call__(
        self, clip: Float[Array, "B f h w C"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], NewCache]:
        large = repeat(clip, "b f h w c -> b f (h p) (w q) c", p=2, q=2)
        large, new_cache = self.conv(large, layer_cache(cache, "conv"))
        if self.temporal:
            large = rearrange(large, "b f h w (n c) -> b (f n) h w c", n=2)
            large = large[:, 1:] if cache is None else large
        return large, {"conv": new_cache}


class Level(nnx.Module):
    """Residual blocks of one width, then a change of resolution (None at the last level)."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        layers: int,
        resample: nnx.Module | None,
        config: CVVAEConfig,
        *,
        in_time: InTime,
        rngs: nnx.Rngs,
    ):
        widths = (features_in, *(features_out for _ in range(layers - 1)))
        self.remat = config.remat
        self.blocks = nnx.List(
            [ResidualBlock(width, features_out, config, in_time=in_time, rngs=rngs) for width in widths]
        )
        self.resample = resample

    def __call__(
        self, clip: Float[Array, "B F H W I"], cache: Cache = None
    ) -> tuple[Float[Array, "B f h w O"], NewCache]:
        new_cache: NewCache = {}
        for name, block in [
            *((str(index), block) for index, block in enumerate(self.blocks)),
            ("resample", self.resample),
        ]:
            if block is not None:
                clip, new_cache[name] = run_block(block, self.remat, clip, layer_cache(cache, name))
        return constrain(clip, BATCH, FRAMES, HEIGHT, WIDTH, None), new_cache
