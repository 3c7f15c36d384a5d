"""The layers of a CV-VAE; each takes what it remembers of the frames before (`Past`) and returns the next one."""

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

# What layers keep of the frames before, by the names of their modules; None at the start of a clip.
Past = Mapping[str, Any] | None
Kept = dict[str, Any]

TEMPORAL_NORM_EPSILON = 1e-5


def pointwise(features_in: int, features_out: int, rngs: nnx.Rngs, kernel_init: Initializer = DEFAULT_INIT) -> Linear:
    """A linear map of channels."""
    return Linear(features_in, features_out, axes=(CONV_IN, CONV_OUT), kernel_init=kernel_init, rngs=rngs)


def norm(features: int, config: CVVAEConfig) -> GroupNorm:
    """A group norm over a clip or over each frame, as the configuration has it."""
    leading = 1 if config.norm_over == "clip" else 2
    return GroupNorm(features, groups=config.groups, epsilon=config.norm_epsilon, axis=CONV_OUT, leading=leading)


def of(past: Past, name: str) -> Any:
    """What the layer of this name remembers."""
    return None if past is None else past[name]


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU and convolution, added to the input; a pointwise map of the input where the width changes.

    The first convolution is over the clip, the second (unless the configuration says otherwise) over each frame.
    """

    def __init__(self, features_in: int, features_out: int, config: CVVAEConfig, *, in_time: InTime, rngs: nnx.Rngs):
        self.norm1 = norm(features_in, config)
        self.conv1 = Conv3d(features_in, features_out, in_time=in_time, border=config.border, rngs=rngs)
        self.norm2 = norm(features_out, config)
        if config.second_convolution == "clip":
            self.conv2 = Conv3d(features_out, features_out, in_time=in_time, border=config.border, rngs=rngs)
        else:
            # Zeros beyond the sides in every network.
            self.conv2 = Conv3d(features_out, features_out, kernel_size=(1, 3, 3), in_time=in_time, rngs=rngs)
        self.shortcut = None if features_in == features_out else pointwise(features_in, features_out, rngs)

    def __call__(self, clip: Float[Array, "B F H W I"], past: Past = None) -> tuple[Float[Array, "B F H W O"], Kept]:
        kept: Kept = {}
        hidden, kept["conv1"] = self.conv1(jax.nn.silu(self.norm1(clip)), of(past, "conv1"))
        hidden, kept["conv2"] = self.conv2(jax.nn.silu(self.norm2(hidden)), of(past, "conv2"))
        return hidden + (clip if self.shortcut is None else self.shortcut(clip)), kept


class FrameAttention(nnx.Module):
    """One head of self-attention, as wide as the clip has channels, over all pixels of each frame; added to the input.

    With `temporal`, attention along time of each pixel follows (see `CVVAEConfig.temporal_attention`).
    """

    def __init__(self, features: int, config: CVVAEConfig, *, temporal: bool, rngs: nnx.Rngs):
        self.norm = GroupNorm(features, groups=config.groups, epsilon=config.norm_epsilon, axis=CONV_OUT, leading=2)
        self.query = pointwise(features, features, rngs)
        self.key = pointwise(features, features, rngs)
        self.value = pointwise(features, features, rngs)
        self.output = pointwise(features, features, rngs)
        kind = config.temporal_attention if temporal else "none"
        self.replacing = kind == "replacing"
        self.temporal = None if kind == "none" else TemporalAttention(features, config, rngs=rngs)

    def __call__(self, clip: Float[Array, "B F H W C"], past: Past = None) -> tuple[Float[Array, "B F H W C"], Kept]:
        tokens = rearrange(self.norm(clip), "b f h w c -> (b f) (h w) 1 c")
        tokens = attention(self.query(tokens), self.key(tokens), self.value(tokens))
        batch, _, height, _, _ = clip.shape
        seen = rearrange(self.output(tokens), "(b f) (h w) 1 c -> b f h w c", b=batch, h=height)
        if self.temporal is None:
            return clip + seen, {}
        if self.replacing:
            return clip + self.temporal(seen)[0], {}
        clip = clip + seen
        change, kept = self.temporal(clip, of(past, "temporal"))
        return clip + change, {"temporal": kept}


class TemporalAttention(nnx.Module):
    """One head of attention along time, for each pixel by itself: over the whole clip, or over a causal window."""

    def __init__(self, features: int, config: CVVAEConfig, *, rngs: nnx.Rngs):
        causal = config.temporal_attention == "added"
        self.window = config.temporal_window if causal else None
        self.norm = LayerNorm(features, epsilon=TEMPORAL_NORM_EPSILON, axis=CONV_OUT)
        self.query = pointwise(features, features, rngs)
        self.key = pointwise(features, features, rngs)
        self.value = pointwise(features, features, rngs)
        # Zero at the start where it is added: the image autoencoder is left as it is.
        start = nnx.initializers.zeros if causal else DEFAULT_INIT
        self.output = pointwise(features, features, rngs, start)

    def __call__(
        self, clip: Float[Array, "B F H W C"], past: Float[Array, "B P H W C"] | None = None
    ) -> tuple[Float[Array, "B F H W C"], Float[Array, "B K H W C"] | None]:
        """What is seen along time, and the last normalised frames for the part that follows."""
        normed = self.norm(clip)
        led = normed if past is None else jnp.concatenate([past, normed], axis=1)
        batch, frames, height, width, _ = clip.shape
        queries, keys = (rearrange(x, "b f h w c -> (b h w) f 1 c") for x in (normed, led))
        bias = None
        if self.window is not None:
            distance = jnp.arange(led.shape[1] - frames, led.shape[1])[:, None] - jnp.arange(led.shape[1])[None]
            bias = jnp.where((distance >= 0) & (distance < self.window), 0.0, -jnp.inf)[None, None]
        seen = attention(self.query(queries), self.key(keys), self.value(keys), bias=bias)
        output = rearrange(self.output(seen), "(b h w) f 1 c -> b f h w c", b=batch, h=height, w=width)
        if self.window is None:
            return output, None
        return output, led[:, max(led.shape[1] - self.window + 1, 0) :]


class MidBlock(nnx.Module):
    """Residual block, attention if the configuration has it, residual block; at the coarsest level."""

    def __init__(self, config: CVVAEConfig, *, in_time: InTime, temporal: bool, rngs: nnx.Rngs):
        width = config.block_channels[-1]
        self.remat = config.remat
        self.first = ResidualBlock(width, width, config, in_time=in_time, rngs=rngs)
        self.attention = FrameAttention(width, config, temporal=temporal, rngs=rngs) if config.mid_attention else None
        self.second = ResidualBlock(width, width, config, in_time=in_time, rngs=rngs)

    def __call__(self, clip: Float[Array, "B F H W C"], past: Past = None) -> tuple[Float[Array, "B F H W C"], Kept]:
        kept: Kept = {}
        for name in ("first", "attention", "second"):
            block = getattr(self, name)
            if block is not None:
                clip, kept[name] = run_block(block, self.remat, clip, of(past, name))
        return clip, kept


class Downsample(nnx.Module):
    """A strided convolution: half the height and width, and half the frames (of the last of each pair) if `in_time`."""

    def __init__(self, features: int, config: CVVAEConfig, *, time: bool, rngs: nnx.Rngs):
        sides = ((0, 1), (0, 1)) if config.downsample_sides == "after" else ((1, 1), (1, 1))
        self.conv = Conv3d(
            features, features, strides=(2 if time else 1, 2, 2), in_time="causal", sides=sides,
            border=config.border, rngs=rngs,
        )  # fmt: skip

    def __call__(self, clip: Float[Array, "B F H W C"], past: Past = None) -> tuple[Float[Array, "B f h w C"], Kept]:
        clip, kept = self.conv(clip, of(past, "conv"))
        return clip, {"conv": kept}


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling of each frame, then a convolution, which gives two frames for one if `in_time`.

    Of the two frames of a clip's first one, the earlier is dropped.
    """

    def __init__(self, features: int, config: CVVAEConfig, *, time: bool, rngs: nnx.Rngs):
        self.time = time
        self.conv = Conv3d(
            features, 2 * features if time else features, in_time=config.upsample_time, border=config.border, rngs=rngs
        )

    def __call__(self, clip: Float[Array, "B f h w C"], past: Past = None) -> tuple[Float[Array, "B F H W C"], Kept]:
        large = repeat(clip, "b f h w c -> b f (h p) (w q) c", p=2, q=2)
        large, kept = self.conv(large, of(past, "conv"))
        if self.time:
            large = rearrange(large, "b f h w (n c) -> b (f n) h w c", n=2)
            large = large[:, 1:] if past is None else large
        return large, {"conv": kept}


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

    def __call__(self, clip: Float[Array, "B F H W I"], past: Past = None) -> tuple[Float[Array, "B f h w O"], Kept]:
        kept: Kept = {}
        for name, block in [
            *((str(index), block) for index, block in enumerate(self.blocks)),
            ("resample", self.resample),
        ]:
            if block is not None:
                clip, kept[name] = run_block(block, self.remat, clip, of(past, name))
        return constrain(clip, BATCH, FRAMES, HEIGHT, WIDTH, None), kept
