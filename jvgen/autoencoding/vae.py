"""An exported VAE as two functions of whole videos."""

import numpy as np

from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.config import Config
from jvgen.storage import Path


class VAE:
    """An image or video autoencoder that encodes and decodes videos of any length; made by `jvgen.load_vae`.

    Attributes:
      config: of the network.
    """

    def __init__(self, folder: str | Path, *, compute_dtype: str = "float32"):
        self._vae = StreamingVAE(folder, compute_dtype=compute_dtype)

    @property
    def config(self) -> Config:
        """Configuration of the network."""
        return self._vae.config

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Latents (posterior means) of a video: uint8 `F H W 3` -> float32 `f h w z`.

        Videos are padded to whole latents by repeating the last frame, row and column.

        Raises:
          ValueError: not a uint8 array of that shape.
          NotFinite: latents with NaN or infinity.
        """
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
            raise ValueError(f"video of shape {video.shape} and {video.dtype}: expected uint8 frames F H W 3.")
        return np.concatenate(list(self._vae.encode(iter(video), len(video))))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The video of latents: float32 `f h w z` -> uint8 `F H W 3`.

        CogVideoX's decodes an even number of latent frames to 4 frames each, the first among them, as diffusers does;
        `encode` gives odd numbers.

        Raises:
          ValueError: another number of channels.
          NotFinite: latents or pixels with NaN or infinity.
        """
        if latents.ndim != 4 or latents.shape[-1] != self._vae.latent_channels or not len(latents):
            raise ValueError(
                f"latents of shape {latents.shape}: expected f h w z with z = {self._vae.latent_channels}."
            )
        return np.concatenate(list(self._vae.decode(iter(latents), len(latents))))


def load_vae(folder: str | Path, *, compute_dtype: str = "float32") -> VAE:
    """Load an autoencoder that `jvgen export` or diffusers wrote.

    Args:
      folder: with `config.json` and the weights.
      compute_dtype: "bfloat16" halves the memory.

    Raises:
      ValueError: the folder holds no autoencoder.
    """
    return VAE(folder, compute_dtype=compute_dtype)
