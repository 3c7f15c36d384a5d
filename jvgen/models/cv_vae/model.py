"""CV-VAE: convolutions over clips down to a small grid of Gaussians, a quarter as many frames, and back to pixels."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.cv_vae.blocks import (
    Cache,
    Downsample,
    Level,
    MidBlock,
    NewCache,
    Upsample,
    layer_cache,
    norm,
    pointwise,
)
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.nn.conv3d import Conv3d


class Encoder(nnx.Module):
    """Clips to the moments of their latents, before the quantization convolution. Its convolutions are causal."""

    def __init__(self, config: CVVAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_channels
        self.conv_in = Conv3d(config.channels, widths[0], in_time="causal", border=config.padding.border, rngs=rngs)
        levels = []
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            levels.append(
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    config.layers_per_block,
                    None if last else Downsample(width, config, temporal=index in config.time_levels_down, rngs=rngs),
                    config,
                    in_time="causal",
                    rngs=rngs,
                )
            )
        self.levels = nnx.List(levels)
        self.mid = MidBlock(config, in_time="causal", temporal=False, rngs=rngs)
        self.norm_out = norm(widths[-1], config)
        self.conv_out = Conv3d(
            widths[-1], 2 * config.latent_channels, in_time="causal", border=config.padding.border, rngs=rngs
        )

    def __call__(
        self, clip: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B f h w M"], NewCache]:
        new_cache: NewCache = {}
        hidden, new_cache["conv_in"] = self.conv_in(clip, layer_cache(cache, "conv_in"))
        for index, level in enumerate(self.levels):
            hidden, new_cache[str(index)] = level(hidden, layer_cache(cache, str(index)))
        hidden, new_cache["mid"] = self.mid(hidden, layer_cache(cache, "mid"))
        moments, new_cache["conv_out"] = self.conv_out(
            jax.nn.silu(self.norm_out(hidden)), layer_cache(cache, "conv_out")
        )
        return moments, new_cache


class Decoder(nnx.Module):
    """Latents to clips; its levels are those of the encoder in reverse, with one more block each."""

    def __init__(self, config: CVVAEConfig, *, rngs: nnx.Rngs):
        widths, in_time = config.block_channels[::-1], config.padding.decoder_time
        self.conv_in = Conv3d(
            config.latent_channels, widths[0], in_time=in_time, border=config.padding.border, rngs=rngs
        )
        self.mid = MidBlock(config, in_time=in_time, temporal=True, rngs=rngs)
        levels = []
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            levels.append(
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    None if last else Upsample(width, config, temporal=index in config.time_levels_up, rngs=rngs),
                    config,
                    in_time=in_time,
                    rngs=rngs,
                )
            )
        self.levels = nnx.List(levels)
        self.norm_out = norm(widths[-1], config)
        self.conv_out = Conv3d(widths[-1], config.channels, in_time=in_time, border=config.padding.border, rngs=rngs)

    def features(
        self, latents: Float[Array, "B f h w z"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W D"], NewCache]:
        """The input of the last convolution."""
        new_cache: NewCache = {}
        hidden, new_cache["conv_in"] = self.conv_in(latents, layer_cache(cache, "conv_in"))
        hidden, new_cache["mid"] = self.mid(hidden, layer_cache(cache, "mid"))
        for index, level in enumerate(self.levels):
            hidden, new_cache[str(index)] = level(hidden, layer_cache(cache, str(index)))
        return jax.nn.silu(self.norm_out(hidden)), new_cache

    def __call__(
        self, latents: Float[Array, "B f h w z"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], NewCache]:
        hidden, new_cache = self.features(latents, cache)
        clip, new_cache["conv_out"] = self.conv_out(hidden, layer_cache(cache, "conv_out"))
        return clip, new_cache


class CVVAE(nnx.Module):
    """`encode` to moments of a posterior (see `jvgen.models.image_vae.posterior`), `decode` from latents.

    An image is a clip of one frame. `encode_chunk` and `decode_chunk` code a clip in chunks, in causal networks.
    """

    def __init__(self, config: CVVAEConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        latent = config.latent_channels
        self.quant = pointwise(2 * latent, 2 * latent, rngs) if config.quant_convolutions else None
        self.post_quant = pointwise(latent, latent, rngs) if config.quant_convolutions else None

    def encode(self, clip: Float[Array, "B F H W C"], *, allow_remainder: bool = False) -> Float[Array, "B f h w M"]:
        """Mean and raw log variance of the latents, concatenated over channels, of a clip in [-1, 1].

        Latent frame 0 is that of frame 0; with groups of 4 frames, latent frame j is that of frames 4j - 3 to 4j.

        Args:
          clip: 4n + 1 frames, sides that are multiples of `config.downsampling`.
          allow_remainder: take other sizes too, as the published code does: a remainder has no latent of its own.

        Raises:
          ValueError: a size that leaves a remainder, unless `allow_remainder`.
        """
        if not allow_remainder:
            self.config.check_clip(*clip.shape[1:4])
        return self._moments(self.encoder(clip)[0])

    def decode(self, latents: Float[Array, "B f h w z"]) -> Float[Array, "B F H W C"]:
        """A clip of 4(f - 1) + 1 frames, in [-1, 1] up to the error of the network, from unscaled latents."""
        return self.decoder(self._latents(latents))[0]

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        """Reconstruct a clip through the most likely latents."""
        return self.decode(self.encode(clip)[..., : self.config.latent_channels])

    def encode_chunk(
        self, clip: Float[Array, "B F H W C"], cache: Cache = None
    ) -> tuple[Float[Array, "B f h w M"], NewCache]:
        """Moments of a chunk of a clip, and the cache for the next chunk.

        Args:
          clip: 4n + 1 frames at the start of a clip, 4n after that.
          cache: what the chunk before returned; None at the start.

        Raises:
          ValueError: a network that is not causal, or another number of frames.
        """
        self._check_causal()
        frames, height, width = clip.shape[1:4]
        self.config.check_clip(frames if cache is None else frames + 1, height, width)
        moments, new_cache = self.encoder(clip, cache)
        return self._moments(moments), new_cache

    def decode_chunk(
        self, latents: Float[Array, "B f h w z"], cache: Cache = None
    ) -> tuple[Float[Array, "B F H W C"], NewCache]:
        """Frames of a chunk of latent frames, 4(f - 1) + 1 at the start and 4f after that, and the next cache.

        Raises:
          ValueError: a network that is not causal.
        """
        self._check_causal()
        return self.decoder(self._latents(latents), cache)

    def decode_features(self, latents: Float[Array, "B f h w z"]) -> Float[Array, "B F H W D"]:
        """The input of the decoder's last convolution; `pixels` of it is what `decode` returns."""
        return self.decoder.features(self._latents(latents))[0]

    def pixels(self, features: Float[Array, "B F H W D"]) -> Float[Array, "B F H W C"]:
        """The decoder's last convolution."""
        return self.decoder.conv_out(features)[0]

    def _moments(self, moments: jax.Array) -> jax.Array:
        return moments if self.quant is None else self.quant(moments)

    def _latents(self, latents: jax.Array) -> jax.Array:
        return latents if self.post_quant is None else self.post_quant(latents)

    def _check_causal(self) -> None:
        if not self.config.is_causal:
            raise ValueError(
                "this network reads later frames (norm.over_clip, padding.decoder_time, padding.upsample_time, "
                "temporal_attention.kind), so it cannot code a clip in chunks; use jvgen.models.cv_vae.tiling, as "
                "published."
            )
