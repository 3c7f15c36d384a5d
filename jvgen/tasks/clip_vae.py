"""An autoencoder as functions of clips, whether it codes whole clips or frame by frame."""

import jax
from einops import rearrange

from jvgen.interop.formats import format_of
from jvgen.models.cogvideox_vae import flops as cogvideox_vae_flops
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cv_vae import flops as cv_vae_flops
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.tiling import decode_tiled, encode_tiled
from jvgen.models.image_vae import flops as image_vae_flops
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.network import Parameters
from jvgen.tasks.pixels import from_uint8
from jvgen.tasks.task import activation_dtype

# The autoencoders of images and clips.
VAEConfig = ImageVAEConfig | CogVideoXVAEConfig | CVVAEConfig


def temporal_downsampling(config: VAEConfig) -> int:
    """Frames per latent frame, after the first."""
    return 1 if isinstance(config, ImageVAEConfig) else config.temporal_downsampling


class ClipVAE:
    """An autoencoder of clips `B F H W C`; its methods are pure and are traced under `jax.jit`.

    Attributes:
      network: the autoencoder.
    """

    def __init__(self, config: VAEConfig):
        self.config = config
        self.network = format_of(config).network(config)

    def encode(self, parameters: Parameters, video: jax.Array) -> jax.Array:
        """Moments `B f h w 2z` of uint8 clips."""
        return self.moments(parameters, from_uint8(video))

    def moments(self, parameters: Parameters, clips: jax.Array) -> jax.Array:
        """Moments `B f h w 2z` of clips in [-1, 1]."""
        return self._run(parameters, clips.astype(activation_dtype(parameters)), "encode")

    def encode_flops(self, frames: int, height: int, width: int) -> float:
        """Forward FLOPs of encoding one clip, without the overlap of chunks and tiles."""
        if isinstance(self.config, ImageVAEConfig):
            return frames * sum(image_vae_flops.encode(self.config, height, width).values())
        count = cv_vae_flops if isinstance(self.config, CVVAEConfig) else cogvideox_vae_flops
        return sum(count.encode(self.config, frames, height, width).values())

    def decode(self, parameters: Parameters, latents: jax.Array) -> jax.Array:
        """Clips, in [-1, 1] up to the error of the network, of latents that are not normalized."""
        return self._run(parameters, latents.astype(activation_dtype(parameters)), "decode")

    def _run(self, parameters: Parameters, clips: jax.Array, method: str) -> jax.Array:
        if isinstance(self.config, CVVAEConfig) and not self.config.is_causal:
            # Chunks and tiles are part of the published networks; a clip within one chunk and tile is coded whole.
            tiled = {"encode": encode_tiled, "decode": decode_tiled}[method]
            return tiled(lambda clip: self.network.apply(parameters, clip, method=method), clips, self.config)
        if not isinstance(self.config, ImageVAEConfig):
            return self.network.apply(parameters, clips, method=method)
        images = self.network.apply(parameters, rearrange(clips, "b f h w c -> (b f) h w c"), method=method)
        return rearrange(images, "(b f) h w c -> b f h w c", b=clips.shape[0])
