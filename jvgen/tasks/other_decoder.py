"""Decoding what a text-to-video run makes with another autoencoder that shares its latents (CV-VAE, section 4.3)."""

import copy
from pathlib import Path

from jvgen.interop.from_torch import import_folder, read_config
from jvgen.nn.network import Parameters
from jvgen.tasks.clip_coder import ClipCoder, CoderConfig, temporal_downsampling
from jvgen.tasks.task import TaskConfig
from jvgen.tasks.text_to_video import TextToVideo, TextToVideoConfig


class OtherDecoder:
    """An exported autoencoder in place of the run's own.

    A video autoencoder makes 4(n - 1) + 1 frames of the latents that an image autoencoder would make n frames of; an
    image autoencoder makes n frames of those that a video autoencoder would make 4(n - 1) + 1 of.

    Args:
      folder: as `jvgen export` or diffusers write it.
      task: of the run.

    Raises:
      ValueError: another kind of run or of network, or latents that cannot be those of the run.
    """

    def __init__(self, folder: Path, task: TaskConfig):
        self._folder, self._config = folder, read_config(folder)
        if not isinstance(self._config, CoderConfig):
            kind = type(self._config).__name__
            raise ValueError(f"--vae {folder}: holds a {kind}, not an autoencoder of images or clips.")
        if not isinstance(task, TextToVideoConfig) or task.vae is None:
            raise ValueError(f"--vae {folder}: only text-to-video runs with a VAE of their own decode with another.")
        for name in ("latent_channels", "downsampling"):
            ours, theirs = getattr(task.vae, name), getattr(self._config, name)
            if ours != theirs:
                raise ValueError(f"--vae {folder}: its {name} is {theirs}, that of the run's VAE {ours}: take another.")
        group = temporal_downsampling(self._config)
        # One of images reads any latents, frame by frame.
        if group != 1 and task.temporal_compression not in (1, group):
            raise ValueError(
                f"--vae {folder}: {group} frames share a latent, but {task.temporal_compression} in the run; "
                f"take a VAE of {task.temporal_compression}."
            )

    def load(self) -> Parameters:
        """Its parameters."""
        return import_folder(self._folder)[1]

    def of(self, task: TextToVideo) -> TextToVideo:
        """A task that samples as the given one does, and decodes with this; its frozen "vae" is what `load` returns."""
        other = copy.copy(task)
        other.coder = ClipCoder(self._config)
        return other
