"""An exported VAE that encodes batches of clips on all devices of this process, for caching latents on disk."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.finite import not_finite
from jvgen.interop.from_torch import read_config
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.tasks.clip_vae import VAEConfig


class ClipEncoder:
    """A `jvgen.data.builders.batches.BatchEncoder`: clips are divided over the devices, which have the VAE each.

    Args:
      folder: exported folder of an image VAE or a video VAE.
      sizes: heights and widths of the frames.
      batch: frames that a device encodes together. Longer clips pass in chunks; networks whose result depends on the
        chunks have their own.
      devices: by default all of this process.

    Attributes:
      frames_per_latent: frames that share a latent; clips have a multiple of it after their first frame.

    Raises:
      ValueError: not a VAE, or a size that its latents do not divide.
    """

    def __init__(
        self,
        folder: str,
        sizes: Sequence[tuple[int, int]],
        *,
        batch: int = 16,
        devices: Sequence[jax.Device] | None = None,
    ):
        config = read_config(folder)
        if batch < 1:
            raise ValueError(f"--batch-size {batch}: must be at least 1.")
        if not isinstance(config, VAEConfig):
            raise ValueError(f"--vae {folder}: holds a {type(config).__name__}, not a VAE.")
        for height, width in sizes:
            if height % config.downsampling or width % config.downsampling:
                raise ValueError(
                    f"--size {height}x{width}: both must be multiples of {config.downsampling} for this VAE."
                )
        devices = jax.local_devices() if devices is None else devices
        sharding = None
        if len(devices) > 1:
            sharding = Sharding(make_mesh(MeshConfig(), devices), ShardingConfig())
        self._folder = folder
        self._vae = StreamingVAE(folder, chunk_frames=batch, sharding=sharding)
        self._frames, self._devices = batch, len(devices)
        self.frames_per_latent = self._vae.frames_per_latent

    def batch(self, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
        """The size `F H W` that a clip is padded to, in which it shares a batch, and the clips of such a batch."""
        frames, height, width, _ = shape
        if (frames - 1) % self.frames_per_latent:
            raise ValueError(f"a clip of {frames} frames: this VAE needs {self.frames_per_latent}n + 1.")
        padded = self._vae.padded_frames(frames)
        return (padded, height, width), max(1, self._frames // padded) * self._devices

    def begin(self, clips: Sequence[np.ndarray]) -> Any:
        """Begin to encode at most one batch of clips `F H W 3`, uint8, of one `batch`, and do not wait for it."""
        (frames, height, width), size = self.batch(clips[0].shape)
        padded = np.zeros((size, frames, height, width, 3), np.uint8)
        for row, clip in enumerate(clips):
            padded[row, : len(clip)] = clip
            padded[row, len(clip) :] = clip[-1]
        return self._vae.begin(padded), [(len(clip) - 1) // self.frames_per_latent + 1 for clip in clips]

    def end(self, begun: Any) -> list[np.ndarray]:
        """Wait for a batch: moments `f h w 2z` of each clip, float32.

        Raises:
          NotFinite: NaN or infinity among them.
        """
        chunks, lengths = begun
        moments = np.concatenate([np.asarray(chunk)[:, shared:] for chunk, shared in chunks], axis=1)
        clips = [moments[row, :length].astype(np.float32) for row, length in enumerate(lengths)]
        if not all(np.isfinite(clip).all() for clip in clips):
            raise not_finite("latents of a clip", f"VAE {self._folder}", np.float32)
        return clips
