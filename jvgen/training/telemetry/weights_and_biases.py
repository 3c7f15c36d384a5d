"""Logging to Weights & Biases: metrics, evaluations, samples and the config of a run."""

import importlib
import io
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen import storage
from jvgen.config import ConfigError
from jvgen.data.video_files import encode_video
from jvgen.storage import Path, is_remote
from jvgen.training.config import WandbConfig
from jvgen.training.telemetry.hooks import Hook, RunInfo
from jvgen.training.telemetry.run_files import SAMPLE_FRAME_RATE

# Keeps the identifier of the W&B run, so that a restart continues it.
ID_FILE = "wandb_run_id"


class WeightsAndBiases(Hook):
    """Logs to one W&B run per run directory; a restart continues it.

    Steps that are repeated after a restart are logged again: the metric "step" is the x axis of every plot.

    Raises:
      ConfigError: the package `wandb` is not installed.
    """

    def __init__(self, config: WandbConfig):
        self._config = config
        self._run: Any = None
        try:
            self._wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"training.wandb.project = {config.project!r} needs the package wandb: pip install 'jvgen[wandb]', or "
                "set training.wandb.project=none."
            ) from error

    def on_start(self, run: RunInfo) -> None:
        online = self._config.mode == "online"
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=run.experiment.name,
            id=_run_id(run.workdir),
            # Offline files of several starts are joined by their common identifier when they are uploaded.
            resume="allow" if online else None,
            mode=self._config.mode,
            # W&B uploads its own files; it has no use for a bucket.
            dir=tempfile.mkdtemp(prefix="wandb-") if is_remote(run.workdir) else str(run.workdir),
            config=run.document,
            settings=self._wandb.Settings(console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_step(self, row: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in row.items() if isinstance(value, (int, float))})

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {f"evaluation/{name}": value for name, value in values.items()})

    def on_samples(self, step: int, clips: Mapping[str, np.ndarray]) -> None:
        media = {f"samples/{name}": [self._media(clip) for clip in batch] for name, batch in clips.items()}
        self._run.log({"step": step} | media)

    def on_report(self, name: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {f"{name}/{key}": value for key, value in values.items()})

    def on_end(self, status: int | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if status is None else status)

    def _media(self, clip: np.ndarray) -> Any:
        """uint8 `F H W 3` as a video, or as an image if there is one frame."""
        if clip.shape[0] == 1:
            return self._wandb.Image(clip[0])
        return self._wandb.Video(io.BytesIO(encode_video(clip, SAMPLE_FRAME_RATE)), format="mp4")


def _run_id(workdir: Path) -> str:
    path = workdir / ID_FILE
    if not path.exists():
        storage.write_text(path, uuid.uuid4().hex[:8])
    return storage.read_text(path)
