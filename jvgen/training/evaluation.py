"""Evaluation during training: the same held-out batches and keys every time, raw and averaged parameters."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvgen import nested
from jvgen.data.stream.loader import LoadedBatch
from jvgen.data.video_files import encode_image, encode_video
from jvgen.nn.network import Parameters
from jvgen.tasks.task import Batch
from jvgen.training.program import Program
from jvgen.training.state import EVALUATE, VISUALIZE, TrainState, key_for
from jvgen.training.telemetry.metrics import RunningMeans

# Frames per second of written samples whose own rate is not known.
DISPLAY_RATE = 8
MOST_SAMPLES = 8


class Evaluator:
    """Runs a task's `evaluate` and `visualize` on the evaluation stream.

    Args:
      program: the run.
      batches: (start, stop) -> closable iterator of evaluation batches (`Loader.batches`).
    """

    def __init__(self, program: Program, batches: Callable[[int, int], Any]):
        self._program, self._batches = program, batches
        self._evaluate = program.evaluation("evaluate")
        self._visualize = program.evaluation("visualize")

    def evaluate(self, state: TrainState, count: int) -> dict[str, float]:
        """Metrics over the first `count` batches: "loss" of the raw parameters, "ema_0.9999/loss" of each average."""
        variants = weights(state)
        means = {name: RunningMeans() for name in variants}
        for number, (_, batch) in enumerate(self._placed(count)):
            key = key_for(state.key, EVALUATE, number)
            for name, parameters in variants.items():
                means[name].add(self._evaluate(parameters, state.frozen, batch, key))
        return {
            metric if name == RAW else f"{name}/{metric}": value
            for name, mean in means.items()
            for metric, value in mean.result().items()
        }

    def visualize(self, state: TrainState) -> dict[str, np.ndarray]:
        """Clips of the first evaluation batch with the slowest average, uint8 `B F H W 3` by name."""
        clips: dict[str, np.ndarray] = {}
        parameters = list(weights(state).values())[-1]
        for _, batch in self._placed(1):
            key = key_for(state.key, VISUALIZE, 0)
            shown = jax.device_get(self._visualize(parameters, state.frozen, batch, key))
            clips = {name: np.asarray(value)[:MOST_SAMPLES] for name, value in shown.items()}
        return clips

    def _placed(self, count: int) -> Iterator[tuple[LoadedBatch, Batch]]:
        with self._batches(0, count) as loaded:
            for batch in loaded:
                yield batch, self._program.place(batch.arrays, batch.bucket, jax.process_index(), jax.process_count())


RAW = "raw"


def weights(state: TrainState) -> dict[str, Parameters]:
    """The parameters to evaluate: "raw", then every average from the fastest to the slowest."""
    averages = {f"ema_{name}": nested.merge(state.parameters, state.ema[name]) for name in sorted(state.ema, key=float)}
    return {RAW: state.parameters} | averages


def write_samples(folder: Path, step: int, clips: dict[str, np.ndarray]) -> None:
    """Write clips as mp4, single frames as png: `folder/step_00001000/NAME_0.mp4`."""
    target = folder / f"step_{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    for name, batch in clips.items():
        for number, clip in enumerate(batch):
            if clip.shape[0] == 1:
                (target / f"{name}_{number}.png").write_bytes(encode_image(clip[0]))
            else:
                (target / f"{name}_{number}.mp4").write_bytes(encode_video(clip, DISPLAY_RATE))
