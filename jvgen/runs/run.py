"""A trained run as an object: its networks and parameters, sampling, evaluation and export. What notebooks use."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jvgen import saved_config
from jvgen.config import Config, ConfigError
from jvgen.geometry.cameras import Cameras
from jvgen.nn.network import Network, Parameters
from jvgen.runs.analysis import analyze
from jvgen.runs.evaluation import evaluate
from jvgen.runs.exporting import export
from jvgen.runs.inference import LoadedRun, open_run
from jvgen.runs.model_card import model_card
from jvgen.runs.sampling import sample_arrays
from jvgen.runs.view_sampling import sample_view_arrays
from jvgen.storage import Path, as_path


@dataclasses.dataclass(frozen=True)
class LoadedNetwork:
    """One network with its parameters.

    Attributes:
      config: its configuration; None for networks that have none.
      network: its structure; `network.apply` is a pure function of parameters and inputs.
      parameters: nested dict of arrays.
    """

    config: Config | None
    network: Network
    parameters: Parameters

    def __call__(self, *inputs: Any, method: str | None = None, **options: Any) -> Any:
        """Apply the network, or one of its methods, to inputs, compiled."""
        if method is not None:
            options["method"] = method
        return jax.jit(lambda parameters, *arrays: self.network.apply(parameters, *arrays, **options))(
            self.parameters, *inputs
        )


class Run(LoadedRun):
    """A run loaded onto this machine's devices; made by `jvgen.load_run`."""

    def network(self, name: str) -> LoadedNetwork:
        """A trained or frozen network of the task.

        Raises:
          ConfigError: the task has no network of this name.
        """
        networks = {**self.task.networks, **self.task.frozen_networks}
        if name not in networks:
            raise ConfigError(f"network {name!r}: this run has {', '.join(sorted(networks))}.")
        trained = name in self.task.networks
        parameters = self.parameters[name] if trained else self.frozen[name]
        return LoadedNetwork(self.task.network_configs.get(name), networks[name], parameters)

    def sample(self, prompts: str | Sequence[str], **options: Any) -> np.ndarray:
        """Generate clips: uint8 `P C F H W 3` for P prompts and C clips of each.

        Args:
          prompts: a text or several.
          options: `count`, `frames`, `size`, `steps`, `guidance`, `enhance`, `seed`, `batch`, `vae`, `given` (images
            or a video, `jvgen.runs.given_files.GivenFiles`), see `jvgen.runs.sampling.sample_run`.

        Raises:
          ValueError: a request that the run cannot serve.
        """
        return sample_arrays(self, _texts(prompts), **options)

    def sample_views(
        self, prompts: str | Sequence[str], cameras: str | Sequence[str], **options: Any
    ) -> tuple[np.ndarray, Cameras]:
        """Generate several views of a scene: uint8 `P C V F H W 3`, and the cameras `V F ...`.

        Args:
          prompts: a text or several.
          cameras: the name of a camera path (`jvgen.geometry.paths.PATHS`), or one camera file per view.
          options: `views`, `distance`, `count`, `frames`, `steps`, `seed` ..., see
            `jvgen.runs.view_sampling.sample_views`.

        Raises:
          ValueError: the run generates single clips, or a request or cameras that it cannot serve.
        """
        return sample_view_arrays(self, _texts(prompts), cameras=_texts(cameras), **options)

    def evaluate(self, **options: Any) -> dict[str, float]:
        """Average the task's metrics over held-out batches.

        Args:
          options: `data`, `batches`, `sampling`, `i3d`, `clip_model`, `dinov2`, see `jvgen.runs.evaluation.evaluate`.
        """
        return evaluate(self, **options)

    def analyze_layers(self, folder: str | Path, **options: Any) -> dict[str, Any]:
        """Measure every layer of a video DiT on held-out clips, and write the numbers and plots to a folder.

        Args:
          folder: for `analysis.json`, `similarity.png`, `attention_of_frames_t300.png` ...
          options: `data`, `timesteps`, `batches`, see `jvgen.runs.analysis.analyze`.

        Returns:
          What `analysis.json` holds: for every timestep the measures of each layer.

        Raises:
          ValueError: a task without layers to analyze, or no evaluation data.
        """
        return analyze(self, as_path(folder), **options)

    def export(self, folder: str | Path, **options: Any) -> Path:
        """Write a pipeline, or every trained network, as folders for `from_pretrained` of diffusers or transformers.

        Args:
          folder: to write; it appears complete or not at all.
          options: `dtype`, `overwrite`, `layout`, `network`, `merge_lora`, `vae`, see `jvgen.runs.exporting.export`.
        """
        about = {
            "experiment": self.experiment.name, "config_digest": saved_config.digest(self.experiment),
            "step": self.step, "ema": self.ema,
        }  # fmt: skip
        card = model_card(
            self.experiment, step=self.step, ema=str(self.ema), imported=self.imported, vae=options.get("vae")
        )
        data = self.experiment.data
        return export(self.task, self.parameters, as_path(folder), about, card=card, data=data, **options)


def load_run(
    folder: str | Path, ema: str | float | None = None, step: int | None = None, vae: str | Path | None = None
) -> Run:
    """Load a trained run onto all devices of this machine.

    Args:
      folder: run directory, what `jvgen train --workdir` wrote, or one checkpoint of it, `RUN/checkpoints/STEP`.
      ema: an EMA decay that the run keeps (0.9999), "raw" for the parameters themselves, or None for the largest
        decay, which are the parameters themselves where the run keeps no EMA.
      step: checkpoint step; by default the latest valid one.
      vae: folder of the VAE that made the latents of a run that names none, to sample and to export a pipeline.

    Raises:
      CheckpointError: no such run, or no valid checkpoint.
      ConfigError: an EMA that the run does not keep.
      ValueError: a VAE that does not fit, or that the run has no use for.
    """
    loaded = open_run(as_path(folder), ema, step, vae=vae)
    return Run(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)
