"""Metrics of a trained run on held-out data: the task's own evaluation, printed and written as JSON."""

import json
from pathlib import Path

import jax
import numpy as np

from jvgen.data.store.sources import splits
from jvgen.data.stream.config import SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.evaluation import i3d
from jvgen.evaluation.distribution import VideoDistance
from jvgen.runs.inference import open_run, read_experiment
from jvgen.terminal import progress
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
    """Average the task's metrics over the first batches of held-out data, the same ones every time.

    Args:
      run: work folder.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      data: data set folder instead of the run's evaluation sources; its validation split if it has one.
      batches: how many, at most.
      out: JSON file to write.
      fvd_weights: safetensors file of an I3D, to measure the Fréchet video distance of predictions with as well.

    Raises:
      ValueError: nothing to evaluate on; a run that predicts no clips; weights that are no I3D's.
    """
    if batches < 1:
        raise ValueError(f"--batches {batches}: average over at least one batch.")
    experiment = read_experiment(run)
    if fvd_weights is not None and not experiment.task.predicts_clips:
        raise ValueError(
            f"--fvd-weights: a {type(experiment.task).__name__} predicts no clips to measure; give a world model's run."
        )
    distance = None if fvd_weights is None else VideoDistance(i3d.features(fvd_weights))
    config = experiment.data
    if data is not None:
        split = "validation" if "validation" in splits(data) else "train"
        config = config.replace(evaluation_sources=(SourceConfig(path=data, split=split),))
    if not config.evaluation_sources:
        raise ValueError("the run names no data.evaluation_sources; say which data set with --data FOLDER.")
    experiment.task.check_data(config.replace(sources=config.evaluation_sources))
    loader = Loader(config, seed=experiment.seed, preprocess=experiment.task.build().prepare, evaluation=True)
    loaded = open_run(run, ema, step, untrained)
    evaluate = loaded.program.evaluation("evaluate")
    predict = None if distance is None else loaded.program.evaluation("predicted_clips")
    means, key = RunningMeans(), jax.random.key(experiment.seed)
    with loader.batches(0, batches) as stream:
        for number, batch in enumerate(progress(stream, "evaluating", unit="batch", total=batches)):
            placed = loaded.program.place(batch.arrays, batch.bucket, 0, 1)
            given = loaded.parameters, loaded.frozen, placed, key_for(key, EVALUATE, number)
            means.add(evaluate(*given))
            if predict is not None:
                distance.add(*map(np.asarray, predict(*given)))
    result = means.result() | ({} if distance is None else distance.result())
    for name, value in sorted(result.items()):
        print(f"{name:32s} {value:.6g}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        document = {"run": str(run), "step": loaded.step, "batches": batches, "metrics": result}
        out.write_text(json.dumps(document, indent=1))
    return result
