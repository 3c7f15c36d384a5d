"""Stable Diffusion's autoencoder: convolutions down to a small grid of Gaussians and back up to pixels."""

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.image_vae.config import NORM_EPSILON, ImageVAEConfig
from jvgen.nn.attention import attention
from jvgen.nn.conv import DEFAULT_INIT, Conv2d, upsample_nearest
from jvgen.nn.linear import Linear
from jvgen.nn.norm import GroupNorm
from jvgen.nn.stacked import Remat, run_block
from jvgen.parallel.axes import BATCH, CONV_IN, CONV_OUT, HEIGHT, WIDTH, constrain


def _pointwise(features_in: int, features_out: int, rngs: nnx.Rngs) -> Linear:
    return Linear(features_in, features_out, axes=(CONV_IN, CONV_OUT), kernel_init=DEFAULT_INIT, rngs=rngs)


def _norm(features: int, config: ImageVAEConfig) -> GroupNorm:
    return GroupNorm(features, groups=config.groups, epsilon=NORM_EPSILON, axis=CONV_OUT)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, added to the input; a pointwise map of the input where the width changes."""

    def __init__(self, features_in: int, features_out: int, config: ImageVAEConfig, *, rngs: nnx.Rngs):
        self.norm1 = _norm(features_in, config)
        self.conv1 = Conv2d(features_in, features_out, rngs=rngs)
        self.norm2 = _norm(features_out, config)
        self.conv2 = Conv2d(features_out, features_out, rngs=rngs)
        self.shortcut = None if features_in == features_out else _pointwise(features_in, features_out, rngs)

    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(images)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (images if self.shortcut is None else self.shortcut(images))


class PixelAttention(nnx.Module):
    """One head of self-attention, as wide as the image has channels, over all pixels; added to the input."""

    def __init__(self, features: int, config: ImageVAEConfig, *, rngs: nnx.Rngs):
        self.norm = _norm(features, config)
        self.query = _pointwise(features, features, rngs)
        self.key = _pointwise(features, features, rngs)
        self.value = _pointwise(features, features, rngs)
        self.output = _pointwise(features, features, rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = rearrange(self.norm(images), "b h w c -> b (h w) 1 c")
        tokens = attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return images + rearrange(self.output(tokens), "b (h w) 1 c -> b h w c", h=images.shape[1])


class MidBlock(nnx.Module):
    """Residual block, attention if the configuration has it, residual block; at the coarsest level."""

    def __init__(self, config: ImageVAEConfig, *, rngs: nnx.Rngs):
        width = config.block_channels[-1]
        self.first = ResidualBlock(width, width, config, rngs=rngs)
        self.attention = PixelAttention(width, config, rngs=rngs) if config.mid_attention else None
        self.second = ResidualBlock(width, width, config, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"], remat: Remat) -> Float[Array, "B H W C"]:
        images = run_block(self.first, remat, images)
        if self.attention is not None:
            images = run_block(self.attention, remat, images)
        return run_block(self.second, remat, images)


class Downsample(nnx.Module):
    """A strided convolution over an image padded with one row and column of zeros, below and to the right."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = Conv2d(features, features, strides=(2, 2), padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return self.conv(images)


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling by two, then a convolution."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = Conv2d(features, features, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return self.conv(upsample_nearest(images))


class Level(nnx.Module):
    """Residual blocks of one width, then a change of resolution (None at the last level)."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        layers: int,
        resample: type[Downsample] | type[Upsample] | None,
        config: ImageVAEConfig,
        *,
        rngs: nnx.Rngs,
    ):
        widths = (features_in, *(features_out for _ in range(layers - 1)))
        self.blocks = nnx.List([ResidualBlock(width, features_out, config, rngs=rngs) for width in widths])
        self.resample = None if resample is None else resample(features_out, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W I"], remat: Remat) -> Float[Array, "B h w O"]:
        for block in self.blocks:
            images = run_block(block, remat, images)
        if self.resample is not None:
            images = run_block(self.resample, remat, images)
        return constrain(images, BATCH, HEIGHT, WIDTH, None)


class Encoder(nnx.Module):
    """Images to the moments of their latents, before the quantization convolution."""

    def __init__(self, config: ImageVAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_channels
        last = len(widths) - 1
        self.conv_in = Conv2d(config.channels, widths[0], rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    config.layers_per_block,
                    None if index == last else Downsample,
                    config,
                    rngs=rngs,
                )
                for index, width in enumerate(widths)
            ]
        )
        self.mid = MidBlock(config, rngs=rngs)
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"], remat: Remat) -> Float[Array, "B h w M"]:
        hidden = self.conv_in(images)
        for level in self.levels:
            hidden = level(hidden, remat)
        hidden = self.mid(hidden, remat)
        return self.conv_out(jax.nn.silu(self.norm_out(hidden)))


class Decoder(nnx.Module):
    """Latents to images; its levels are those of the encoder in reverse, with one more block each."""

    def __init__(self, config: ImageVAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_channels[::-1]
        last = len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[0], rngs=rngs)
        self.mid = MidBlock(config, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    None if index == last else Upsample,
                    config,
                    rngs=rngs,
                )
                for index, width in enumerate(widths)
            ]
        )
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = Conv2d(widths[-1], config.channels, rngs=rngs)

    def __call__(self, latents: Float[Array, "B h w z"], remat: Remat) -> Float[Array, "B H W C"]:
        hidden = self.mid(self.conv_in(latents), remat)
        for level in self.levels:
            hidden = level(hidden, remat)
        return self.conv_out(jax.nn.silu(self.norm_out(hidden)))


class ImageVAE(nnx.Module):
    """AutoencoderKL: `encode` to the moments of a posterior (see `posterior`), `decode` from latents."""

    def __init__(self, config: ImageVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        latent = config.latent_channels
        self.quant = _pointwise(2 * latent, 2 * latent, rngs) if config.quant_convolutions else None
        self.post_quant = _pointwise(latent, latent, rngs) if config.quant_convolutions else None

    def encode(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        """Mean and raw log variance of the latents, concatenated over channels, of images in [-1, 1].

        Height and width are divided by `config.downsampling`; a remainder at the bottom and right is dropped.
        """
        moments = self.encoder(images, self.config.remat)
        return moments if self.quant is None else self.quant(moments)

    def decode(self, latents: Float[Array, "B h w z"]) -> Float[Array, "B H W C"]:
        """Images, in [-1, 1] up to the error of the network, from latents that are not normalized for diffusion."""
        return self.decoder(latents if self.post_quant is None else self.post_quant(latents), self.config.remat)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        """Reconstruct images through the most likely latents."""
        return self.decode(self.encode(images)[..., : self.config.latent_channels])
