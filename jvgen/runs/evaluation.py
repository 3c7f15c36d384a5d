"""Evaluate a trained run on held-out data: the task's own metrics, and the Fréchet video distance if asked for."""

import json

import jax
import numpy as np

from jvgen.data.store.sources import splits
from jvgen.data.stream.config import SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.evaluation import i3d
from jvgen.evaluation.distribution import VideoDistance
from jvgen.runs.inference import LoadedRun, open_run, read_experiment
from jvgen.storage import Path, write_text
from jvgen.terminal import progress
from jvgen.training.experiment import Experiment
from jvgen.training.state import EVALUATE, key_for
from jvgen.training.telemetry.metrics import RunningMeans


def evaluate_run(
    run: Path,
    *,
    ema: str | None = None,
    step: int | None = None,
    data: str | None = None,
    batches: int = 16,
    out: Path | None = None,
    untrained: bool = False,
    fvd_weights: Path | None = None,
) -> dict[str, float]:
    """Evaluate the run in a folder, print its metrics and write them as JSON.

    Args:
      run: run directory.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      data, batches, fvd_weights: see `evaluate`.
      out: JSON file to write.

    Raises:
      ValueError: see `evaluate`.
      CheckpointError: no such run, or no valid checkpoint.
    """
    # Mistakes are found before weights are read.
    loader, distance = _prepare(read_experiment(run), data, batches, fvd_weights)
    loaded = open_run(run, ema, step, untrained)
    result = _evaluate(loaded, loader, batches, distance)
    for name, value in sorted(result.items()):
        print(f"{name:32s} {value:.6g}")
    if out is not None:
        document = {"run": str(run), "step": loaded.step, "batches": batches, "metrics": result}
        write_text(out, json.dumps(document, indent=1))
    return result


def evaluate(
    loaded: LoadedRun, *, data: str | None = None, batches: int = 16, fvd_weights: Path | None = None
) -> dict[str, float]:
    """Average the task's metrics over the first batches of held-out data, the same ones every time.

    Args:
      loaded: the run.
      data: data set folder instead of the run's evaluation sources; its validation split if it has one.
      batches: at most this many.
      fvd_weights: safetensors file of an I3D network: also the Fréchet video distance of predicted clips.

    Raises:
      ValueError: no data to evaluate on; a task that predicts no clips; weights that are not those of an I3D network.
    """
    loader, distance = _prepare(loaded.experiment, data, batches, fvd_weights)
    return _evaluate(loaded, loader, batches, distance)


def _prepare(
    experiment: Experiment, data: str | None, batches: int, fvd_weights: Path | None
) -> tuple[Loader, VideoDistance | None]:
    if batches < 1:
        raise ValueError(f"--batches {batches}: average over at least one batch.")
    if fvd_weights is not None and not experiment.task.supports_prediction:
        raise ValueError(
            f"--fvd-weights: {type(experiment.task).__name__} predicts no clips; this needs a run of a world model."
        )
    distance = None if fvd_weights is None else VideoDistance(i3d.features(fvd_weights))
    config = experiment.data
    if data is not None:
        split = "validation" if "validation" in splits(data) else "train"
        config = config.replace(evaluation_sources=(SourceConfig(path=data, split=split),))
    if not config.evaluation_sources:
        raise ValueError("the run names no data.evaluation_sources; name a data set with --data FOLDER.")
    experiment.task.check_data(config.replace(sources=config.evaluation_sources))
    loader = Loader(config, seed=experiment.seed, preprocess=experiment.task.build().preprocess, evaluation=True)
    return loader, distance


def _evaluate(loaded: LoadedRun, loader: Loader, batches: int, distance: VideoDistance | None) -> dict[str, float]:
    compiled = loaded.program.evaluation("evaluate")
    predict = None if distance is None else loaded.program.evaluation("predicted_clips")
    means, key = RunningMeans(), jax.random.key(loaded.experiment.seed)
    with loader.batches(0, batches) as stream:
        for number, batch in enumerate(progress(stream, "evaluating", unit="batch", total=batches)):
            placed = loaded.program.shard_batch(batch.arrays, batch.bucket)
            arguments = loaded.parameters, loaded.frozen, placed, key_for(key, EVALUATE, number)
            means.add(compiled(*arguments))
            if predict is not None:
                distance.add(*map(np.asarray, predict(*arguments)))
    return means.result() | ({} if distance is None else distance.result())
