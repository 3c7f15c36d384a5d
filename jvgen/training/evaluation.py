"""Evaluation during training: raw and EMA parameters on the same held-out batches with the same keys every time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jvgen import nested
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.loader import LoadedBatch
from jvgen.finite import Clips
from jvgen.nn.kernel_report import KernelReport, collecting
from jvgen.nn.network import Parameters
from jvgen.tasks.task import Batch
from jvgen.training.compilation import Programs
from jvgen.training.program import Program
from jvgen.training.state import EVALUATE, VISUALIZE, TrainState, key_for, on_devices
from jvgen.training.telemetry.metrics import RunningMeans, result_names

MAX_SAMPLES = 8
RAW = "raw"


class Evaluator:
    """Runs a task's `evaluate` and `visualize` on the evaluation stream.

    Args:
      program: the run.
      batches: (start, stop) -> closable iterator of evaluation batches (`Loader.batches`).
      programs: the compiled evaluation programs.
      log: takes messages for the user.
    """

    def __init__(
        self,
        program: Program,
        batches: Callable[[int, int], Any],
        programs: Programs,
        log: Callable[[str], None] = print,
    ):
        self._program, self._batches, self._programs, self._log = program, batches, programs, log

    def evaluate(
        self,
        state: TrainState,
        count: int,
        *,
        stop: Callable[[], bool] = lambda: False,
        watching: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> dict[str, float] | None:
        """Metrics over the first `count` batches: "loss" of the raw parameters, "ema_0.9999/loss" of each EMA.

        Args:
          state: of the run.
          count: number of batches.
          stop: asked before every batch; if it says so, the evaluation ends and returns None.
          watching: context in which a batch, named by its argument, is read and evaluated.
        """
        variants = parameter_variants(state)
        means = {name: RunningMeans() for name in variants}
        with self._batches(0, count) as batches:
            for index in range(count):
                if stop():
                    return None
                with watching(f"batch {index} of the evaluation"):
                    bucket, batch = self._next(batches)
                    evaluate = self._programs.evaluation("evaluate", bucket)
                    key = key_for(state.key, EVALUATE, index)
                    for name, parameters in variants.items():
                        means[name].add(evaluate(parameters, state.frozen, batch, key))
        return {
            metric if name == RAW else f"{name}/{metric}": value
            for name, mean in means.items()
            for metric, value in mean.result().items()
        }

    def visualize(self, state: TrainState) -> dict[str, np.ndarray]:
        """Clips of the first evaluation batch with the EMA of largest decay, uint8 `B F H W 3` by name.

        Clips that networks made of numbers that are not finite are no pixels: they are left out, with a warning.
        """
        parameters = list(parameter_variants(state).values())[-1]
        key = key_for(state.key, VISUALIZE, 0)
        with self._batches(0, 1) as batches:
            bucket, batch = self._next(batches)
            visualize = self._programs.evaluation("visualize", bucket)
            shown = jax.device_get(visualize(parameters, state.frozen, batch, key))
        pixels = {}
        for name, value in shown.items():
            clips = value if isinstance(value, Clips) else Clips(value, np.ones(len(value), bool))
            if clips.finite.all():
                pixels[name] = np.asarray(clips.pixels)[:MAX_SAMPLES]
            else:
                dtype = self._program.experiment.training.precision.compute_dtype
                self._log(
                    f"WARNING: {name!r} samples of step {int(state.step)} are left out: {np.sum(~clips.finite)} of "
                    f"{len(clips.finite)} clips hold NaN or infinity, from the task's networks in {dtype}."
                )
        return pixels

    def _next(self, batches: Iterator[LoadedBatch]) -> tuple[BucketConfig, Batch]:
        loaded = next(batches)
        return loaded.bucket, self._program.shard_batch(loaded.arrays, loaded.bucket)


def metric_names(program: Program, bucket: BucketConfig) -> list[str]:
    """Names of the metrics that evaluation gives on batches of a bucket, found by tracing the task's `evaluate`."""
    state = program.abstract_state()
    batch = program.abstract_batch(bucket)
    # The program reports its kernels when it is compiled.
    with collecting(KernelReport()):
        metrics = jax.eval_shape(program.evaluation("evaluate"), state.parameters, state.frozen, batch, state.key)
    variants = [RAW, *(f"ema_{decay}" for decay in sorted(program.abstract.ema, key=float))]
    return [
        metric if variant == RAW else f"{variant}/{metric}" for variant in variants for metric in result_names(metrics)
    ]


def parameter_variants(state: TrainState) -> dict[str, Parameters]:
    """The parameters to evaluate: "raw", then every EMA ("ema_0.9999") by increasing decay."""
    ema = {
        f"ema_{decay}": nested.merge(state.parameters, on_devices(state.ema[decay]))
        for decay in sorted(state.ema, key=float)
    }
    return {RAW: state.parameters} | ema
