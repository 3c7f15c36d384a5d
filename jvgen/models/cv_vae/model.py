"""CV-VAE: convolutions over clips down to a small grid of Gaussians, a quarter as many frames, and back to pixels."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.cv_vae.blocks import Downsample, Kept, Level, MidBlock, Past, Upsample, norm, of, pointwise
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.nn.conv3d import Conv3d


class Encoder(nnx.Module):
    """Clips to the moments of their latents, before the quantisation convolution. Its convolutions are causal."""

    def __init__(self, config: CVVAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_channels
        self.conv_in = Conv3d(config.channels, widths[0], in_time="causal", border=config.border, rngs=rngs)
        levels = []
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            levels.append(
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    config.layers_per_block,
                    None if last else Downsample(width, config, time=index in config.time_levels_down, rngs=rngs),
                    config,
                    in_time="causal",
                    rngs=rngs,
                )
            )
        self.levels = nnx.List(levels)
        self.mid = MidBlock(config, in_time="causal", temporal=False, rngs=rngs)
        self.norm_out = norm(widths[-1], config)
        self.conv_out = Conv3d(
            widths[-1], 2 * config.latent_channels, in_time="causal", border=config.border, rngs=rngs
        )

    def __call__(self, clip: Float[Array, "B F H W C"], past: Past = None) -> tuple[Float[Array, "B f h w M"], Kept]:
        kept: Kept = {}
        hidden, kept["conv_in"] = self.conv_in(clip, of(past, "conv_in"))
        for index, level in enumerate(self.levels):
            hidden, kept[str(index)] = level(hidden, of(past, str(index)))
        hidden, kept["mid"] = self.mid(hidden, of(past, "mid"))
        moments, kept["conv_out"] = self.conv_out(jax.nn.silu(self.norm_out(hidden)), of(past, "conv_out"))
        return moments, kept


class Decoder(nnx.Module):
    """Latents to clips; its levels are those of the encoder in reverse, with one more block each."""

    def __init__(self, config: CVVAEConfig, *, rngs: nnx.Rngs):
        widths, in_time = config.block_channels[::-1], config.decoder_time
        self.conv_in = Conv3d(config.latent_channels, widths[0], in_time=in_time, border=config.border, rngs=rngs)
        self.mid = MidBlock(config, in_time=in_time, temporal=True, rngs=rngs)
        levels = []
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            levels.append(
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    None if last else Upsample(width, config, time=index in config.time_levels_up, rngs=rngs),
                    config,
                    in_time=in_time,
                    rngs=rngs,
                )
            )
        self.levels = nnx.List(levels)
        self.norm_out = norm(widths[-1], config)
        self.conv_out = Conv3d(widths[-1], config.channels, in_time=in_time, border=config.border, rngs=rngs)

    def features(self, latents: Float[Array, "B f h w z"], past: Past = None) -> tuple[Float[Array, "B F H W D"], Kept]:
        """What the last convolution reads."""
        kept: Kept = {}
        hidden, kept["conv_in"] = self.conv_in(latents, of(past, "conv_in"))
        hidden, kept["mid"] = self.mid(hidden, of(past, "mid"))
        for index, level in enumerate(self.levels):
            hidden, kept[str(index)] = level(hidden, of(past, str(index)))
        return jax.nn.silu(self.norm_out(hidden)), kept

    def __call__(self, latents: Float[Array, "B f h w z"], past: Past = None) -> tuple[Float[Array, "B F H W C"], Kept]:
        hidden, kept = self.features(latents, past)
        clip, kept["conv_out"] = self.conv_out(hidden, of(past, "conv_out"))
        return clip, kept


class CVVAE(nnx.Module):
    """`encode` to moments, `decode` from latents; see `jvgen.models.image_vae.posterior` for what lies between.

    An image is a clip of one frame. `encode_part` and `decode_part` code a clip part by part.
    """

    def __init__(self, config: CVVAEConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        latent = config.latent_channels
        self.quant = pointwise(2 * latent, 2 * latent, rngs) if config.quant_convolutions else None
        self.post_quant = pointwise(latent, latent, rngs) if config.quant_convolutions else None

    def encode(self, clip: Float[Array, "B F H W C"], *, rest: bool = False) -> Float[Array, "B f h w M"]:
        """Mean and raw log variance of the latents, concatenated over channels, of a clip in [-1, 1].

        Latent frame 0 is that of frame 0; with groups of 4 frames, latent frame j is that of frames 4j - 3 to 4j.

        Args:
          clip: 4n + 1 frames, sides that are multiples of `config.downsampling`.
          rest: take other sizes too, as the published code does: what is left over has no latent of its own.

        Raises:
          ValueError: a size that leaves something over, unless `rest`.
        """
        if not rest:
            self.config.check_clip(*clip.shape[1:4])
        return self._moments(self.encoder(clip)[0])

    def decode(self, latents: Float[Array, "B f h w z"]) -> Float[Array, "B F H W C"]:
        """A clip of 4(f - 1) + 1 frames, in [-1, 1] up to the error of the network, from unscaled latents."""
        return self.decoder(self._latents(latents))[0]

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        """Reconstruct a clip through the most likely latents."""
        return self.decode(self.encode(clip)[..., : self.config.latent_channels])

    def encode_part(self, clip: Float[Array, "B F H W C"], past: Past = None) -> tuple[Float[Array, "B f h w M"], Kept]:
        """Moments of a part of a clip, and the `past` of the next part.

        Args:
          clip: 4n + 1 frames at the start of a clip, 4n after that.
          past: what the part before returned; None at the start.

        Raises:
          ValueError: a network that sees later frames, or another number of frames.
        """
        self._check_streams()
        frames, height, width = clip.shape[1:4]
        self.config.check_clip(frames if past is None else frames + 1, height, width)
        moments, kept = self.encoder(clip, past)
        return self._moments(moments), kept

    def decode_part(
        self, latents: Float[Array, "B f h w z"], past: Past = None
    ) -> tuple[Float[Array, "B F H W C"], Kept]:
        """Frames of some latent frames, and the `past` of the next ones: 4(f - 1) + 1 at the start, 4f after that.

        Raises:
          ValueError: a network that sees later frames.
        """
        self._check_streams()
        return self.decoder(self._latents(latents), past)

    def decode_features(self, latents: Float[Array, "B f h w z"]) -> Float[Array, "B F H W D"]:
        """What the decoder's last convolution reads; `pixels` of it is what `decode` returns."""
        return self.decoder.features(self._latents(latents))[0]

    def pixels(self, features: Float[Array, "B F H W D"]) -> Float[Array, "B F H W C"]:
        """The decoder's last convolution."""
        return self.decoder.conv_out(features)[0]

    def _moments(self, moments: jax.Array) -> jax.Array:
        return moments if self.quant is None else self.quant(moments)

    def _latents(self, latents: jax.Array) -> jax.Array:
        return latents if self.post_quant is None else self.post_quant(latents)

    def _check_streams(self) -> None:
        if not self.config.streams:
            raise ValueError(
                "this network sees later frames (norm_over, decoder_time, upsample_time, temporal_attention), so clips "
                "cannot be coded part by part; code chunks with jvgen.models.cv_vae.tiling, as published."
            )
