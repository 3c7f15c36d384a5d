"""A frozen autoencoder between clips and latents, whether it codes images frame by frame or whole clips."""

import jax
from einops import rearrange

from jvgen.interop.formats import format_of
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.tiling import decode_tiled, encode_tiled
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.network import Parameters
from jvgen.tasks.pixels import from_uint8
from jvgen.tasks.task import activation_dtype

# What a task's clips can be coded with.
CoderConfig = ImageVAEConfig | CogVideoXVAEConfig | CVVAEConfig


def temporal_downsampling(config: CoderConfig) -> int:
    """Frames a latent frame, beyond the first."""
    return 1 if isinstance(config, ImageVAEConfig) else config.temporal_downsampling


class ClipCoder:
    """An autoencoder as two functions of clips `B F H W C`, both to be traced under `jax.jit`.

    Attributes:
      network: the autoencoder.
    """

    def __init__(self, config: CoderConfig):
        self.config = config
        self.network = format_of(config).network(config)

    def encode(self, parameters: Parameters, video: jax.Array) -> jax.Array:
        """Moments `B f h w 2z` of uint8 clips."""
        return self.moments(parameters, from_uint8(video))

    def moments(self, parameters: Parameters, clips: jax.Array) -> jax.Array:
        """Moments `B f h w 2z` of clips in [-1, 1]."""
        return self._run(parameters, clips.astype(activation_dtype(parameters)), "encode")

    def decode(self, parameters: Parameters, latents: jax.Array) -> jax.Array:
        """Clips in [-1, 1], up to the error of the network, of latents that are not normalised."""
        return self._run(parameters, latents.astype(activation_dtype(parameters)), "decode")

    def _run(self, parameters: Parameters, clips: jax.Array, method: str) -> jax.Array:
        if isinstance(self.config, CVVAEConfig) and not self.config.streams:
            # Chunks and tiles belong to the published networks; a clip of one chunk and one tile is coded as a whole.
            tiled = {"encode": encode_tiled, "decode": decode_tiled}[method]
            return tiled(lambda clip: self.network.apply(parameters, clip, method=method), clips, self.config)
        if not isinstance(self.config, ImageVAEConfig):
            return self.network.apply(parameters, clips, method=method)
        images = self.network.apply(parameters, rearrange(clips, "b f h w c -> (b f) h w c"), method=method)
        return rearrange(images, "(b f) h w c -> b f h w c", b=clips.shape[0])
