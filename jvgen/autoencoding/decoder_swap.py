"""Decode the samples of a text-to-video run with another VAE that shares its latents (CV-VAE, section 4.3)."""

import copy

from jvgen.interop.from_torch import import_folder, read_config
from jvgen.nn.network import Parameters
from jvgen.storage import Path
from jvgen.tasks.clip_vae import ClipVAE, VAEConfig, temporal_downsampling
from jvgen.tasks.task import TaskConfig
from jvgen.tasks.text_to_video import TextToVideo, TextToVideoConfig


class DecoderSwap:
    """An exported VAE in place of a run's own.

    A video VAE decodes the latents of n images to 4(n - 1) + 1 frames; an image VAE decodes those of 4(n - 1) + 1
    frames to n images.

    Args:
      folder: as `jvgen export` or diffusers write it.
      task: of the run.

    Raises:
      ValueError: another kind of run or of network, or a VAE that cannot share the run's latents.
    """

    def __init__(self, folder: Path, task: TaskConfig):
        self._folder, self._config = folder, read_config(folder)
        if not isinstance(self._config, VAEConfig):
            kind = type(self._config).__name__
            raise ValueError(f"--vae {folder}: holds a {kind}, not an autoencoder of images or clips.")
        if not isinstance(task, TextToVideoConfig) or task.vae is None:
            raise ValueError(
                f"--vae {folder}: only text-to-video runs with a VAE of their own decode with another; one that names "
                "none is loaded with it, `jvgen.load_run(RUN, vae=DIR)`."
            )
        for name in ("latent_channels", "downsampling"):
            ours, theirs = getattr(task.vae, name), getattr(self._config, name)
            if ours != theirs:
                raise ValueError(f"--vae {folder}: its {name} is {theirs}, that of the run's VAE {ours}: take another.")
        frames = temporal_downsampling(self._config)
        # An image VAE decodes any latents, frame by frame.
        if frames != 1 and task.temporal_compression not in (1, frames):
            raise ValueError(
                f"--vae {folder}: {frames} frames share a latent, but {task.temporal_compression} in the run; "
                f"take a VAE of {task.temporal_compression}."
            )

    def load(self) -> Parameters:
        """Parameters of the VAE."""
        return import_folder(self._folder)[1]

    def apply_to(self, task: TextToVideo) -> TextToVideo:
        """A copy of the task that decodes with this VAE; its frozen "vae" is what `load` returns."""
        swapped = copy.copy(task)
        swapped.coder = ClipVAE(self._config)
        return swapped
