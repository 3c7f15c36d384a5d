"""An exported VAE as a function from the frames of a clip to latent moments, for caching latents on disk."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.finite import not_finite
from jvgen.interop.from_torch import import_folder, read_config
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nn.network import Network
from jvgen.tasks.clip_vae import VAEConfig, temporal_downsampling
from jvgen.tasks.pixels import from_uint8


class FrameEncoder:
    """Calls turn uint8 frames `F H W 3` of a clip into float32 moments `f h w 2z`.

    Args:
      folder: exported folder of an image VAE or a video VAE.
      height, width: of the frames.
      batch: frames encoded together by an image VAE, about as many by a video VAE.

    Attributes:
      frames_per_latent: frames that share a latent; clips have a multiple of it after their first frame.

    Raises:
      ValueError: not a VAE, or a size that its latents do not divide.
      NotFinite: by a call: latents with NaN or infinity.
    """

    def __init__(self, folder: str, height: int, width: int, *, batch: int = 16):
        config = read_config(folder)
        if batch < 1:
            raise ValueError(f"--batch-size {batch}: must be at least 1.")
        if not isinstance(config, VAEConfig):
            raise ValueError(f"--vae {folder}: holds a {type(config).__name__}, not a VAE.")
        if height % config.downsampling or width % config.downsampling:
            raise ValueError(f"--size {height}x{width}: both must be multiples of {config.downsampling} for this VAE.")
        self._batch, self._folder = batch, folder
        self.frames_per_latent = temporal_downsampling(config)
        self._video_vae = None if isinstance(config, ImageVAEConfig) else StreamingVAE(folder, chunk_frames=batch)
        if self._video_vae is None:
            _, parameters = import_folder(folder)
            network = Network.of(lambda rngs: ImageVAE(config, rngs=rngs))
            self._encode = jax.jit(
                lambda tree, frames: network.apply(tree, from_uint8(frames), method="encode").astype(jnp.float32)
            )
            self._parameters = jax.device_put(parameters)

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        if (len(frames) - 1) % self.frames_per_latent:
            raise ValueError(f"a clip of {len(frames)} frames: this VAE needs {self.frames_per_latent}n + 1.")
        if self._video_vae is None:
            chunks = self._encode_images(frames)
        else:
            chunks = self._video_vae.moments(iter(frames), len(frames))
        moments = np.concatenate(list(chunks))
        if not np.isfinite(moments).all():
            raise not_finite("latents of a clip", f"VAE {self._folder}", np.float32)
        return moments

    def _encode_images(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(frames), self._batch):
            batch = frames[start : start + self._batch]
            # Padded to one shape, so that there is one compilation.
            padded = np.concatenate([batch, np.zeros((self._batch - len(batch), *batch.shape[1:]), np.uint8)])
            yield np.asarray(self._encode(self._parameters, padded))[: len(batch)]
