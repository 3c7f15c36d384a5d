"""CameraCtrl's pose encoder: ray maps to features of four scales (He et al. 2024, arXiv 2404.02101, section 3.3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.nn.attention import attention
from jvgen.nn.conv import Conv2d
from jvgen.nn.feed_forward import GatedFeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.norm import LayerNorm
from jvgen.parallel import axes
from jvgen.value_rules import Count, Layers, Pixels, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoseEncoderConfig(Config):
    """Sizes of the encoder.

    Attributes:
      channels: of each scale.
      layers: residual blocks per scale, each followed by temporal attention.
      heads: of the temporal attention.
      patch: side in pixels of the patches that are unshuffled into channels at the input.
      ray_channels: of the input.
    """

    channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    layers: Layers = 2
    heads: Count = 8
    patch: Pixels = 8
    ray_channels: Width = 6

    def validate(self) -> None:
        if not self.channels or any(width % (2 * self.heads) for width in self.channels):
            raise ValueError(f"channels = {self.channels}: each must be a multiple of 2 x heads = {2 * self.heads}.")


class ResidualBlock(nnx.Module):
    """Optional 2x average pooling, a 1x1 convolution if the channels change, then two convolutions without norms."""

    def __init__(self, features_in: int, features_out: int, *, halve: bool, rngs: nnx.Rngs):
        self.halve = halve
        changes = features_in != features_out
        self.widen = Conv2d(features_in, features_out, kernel_size=(1, 1), rngs=rngs) if changes else None
        self.first = Conv2d(features_out, features_out, rngs=rngs)
        self.second = Conv2d(features_out, features_out, kernel_size=(1, 1), rngs=rngs)

    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        if self.halve:
            even = images[:, : images.shape[1] // 2 * 2, : images.shape[2] // 2 * 2]
            images = reduce(even, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)
        if self.widen is not None:
            images = self.widen(images)
        return images + self.second(jax.nn.relu(self.first(images)))


class TemporalBlock(nnx.Module):
    """Attention over the frames of each position, with frame encodings, then a feed-forward block."""

    def __init__(self, features: int, *, heads: int, rngs: nnx.Rngs):
        self.head_width = features // heads

        def projection() -> Linear:
            return Linear(features, features, axes=(axes.EMBED, axes.HEADS), bias=False, rngs=rngs)

        self.norm = LayerNorm(features, epsilon=1e-5, axis=axes.EMBED)
        self.query, self.key, self.value = projection(), projection(), projection()
        self.output = Linear(features, features, axes=(axes.HEADS, axes.EMBED), rngs=rngs)
        self.feed_forward_norm = LayerNorm(features, epsilon=1e-5, axis=axes.EMBED)
        self.feed_forward = GatedFeedForward(
            features, 4 * features, activation=functools.partial(jax.nn.gelu, approximate=False), bias=True, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B F C"]) -> Float[Array, "B F C"]:
        encoded = self.norm(x) + frame_encodings(x.shape[1], x.shape[2]).astype(x.dtype)
        query, key, value = (
            rearrange(projection(encoded), "b f (n d) -> b f n d", d=self.head_width)
            for projection in (self.query, self.key, self.value)
        )
        x = x + self.output(rearrange(attention(query, key, value), "b f n d -> b f (n d)"))
        return x + self.feed_forward(self.feed_forward_norm(x))


class PoseEncoder(nnx.Module):
    """Ray maps `B F H W 6` to one feature map per scale, `B F h w C`, at 1/patch, 1/(2 patch), ... resolution."""

    def __init__(self, config: PoseEncoderConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        first = config.channels[0]
        self.input = Conv2d(config.ray_channels * config.patch**2, first, rngs=rngs)
        residual, temporal, previous = [], [], first
        for scale, width in enumerate(config.channels):
            widths = (previous, *(width for _ in range(config.layers - 1)))
            residual.append(
                nnx.List(
                    [
                        ResidualBlock(w, width, halve=scale > 0 and layer == 0, rngs=rngs)
                        for layer, w in enumerate(widths)
                    ]
                )
            )
            temporal.append(
                nnx.List([TemporalBlock(width, heads=config.heads, rngs=rngs) for _ in range(config.layers)])
            )
            previous = width
        self.residual, self.temporal = nnx.List(residual), nnx.List(temporal)

    def __call__(self, rays: Float[Array, "B F H W 6"]) -> list[Float[Array, "B F _ _ _"]]:
        """Features of every scale.

        Raises:
          ValueError: a height or width that is not a multiple of the patch.
        """
        batch, patch = rays.shape[0], self.config.patch
        if rays.shape[2] % patch or rays.shape[3] % patch:
            raise ValueError(f"ray maps of {rays.shape[2]}x{rays.shape[3]}: both must be multiples of patch = {patch}.")
        # The channel order of PyTorch's PixelUnshuffle: channels, then rows, then columns of a patch.
        x = rearrange(rays, "b f (h y) (w x) c -> (b f) h w (c y x)", y=patch, x=patch)
        x, features = self.input(x), []
        for residual, temporal in zip(self.residual, self.temporal, strict=True):
            for block, over_time in zip(residual, temporal, strict=True):
                x = block(x)
                height, width = x.shape[1:3]
                x = over_time(rearrange(x, "(b f) h w c -> (b h w) f c", b=batch))
                x = rearrange(x, "(b h w) f c -> (b f) h w c", b=batch, h=height, w=width)
            features.append(rearrange(x, "(b f) h w c -> b f h w c", b=batch))
        return features


def frame_encodings(frames: int, width: int) -> Float[Array, "F {width}"]:
    """Sinusoidal encodings of frames 0, 1, 2, ..., sines and cosines interleaved along the channels, float32."""
    frequencies = 10000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.outer(np.arange(frames, dtype=np.float64), frequencies)
    return jnp.asarray(np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(frames, width).astype(np.float32))
