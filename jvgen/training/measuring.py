"""Metrics of a trained run on held-out data: the task's own evaluation, printed and written as JSON."""

import json
from pathlib import Path

import jax

from jvgen.data.config import SourceConfig
from jvgen.data.loader import Loader
from jvgen.data.sources import splits
from jvgen.terminal import progress
from jvgen.training.inference import open_run, read_experiment
from jvgen.training.metrics import RunningMeans
from jvgen.training.state import EVALUATE, key_for
from jvgen.training.video_distance import VideoDistance, i3d_features


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
      ema, step, untrained: which weights, see `jvgen.training.inference.open_run`.
      data: data set folder instead of the run's evaluation sources; its validation split if it has one.
      batches: how many, at most.
      out: JSON file to write.
      fvd_weights: safetensors file of an I3D, to measure the Fréchet video distance of predictions with as well.

    Raises:
      ValueError: nothing to evaluate on; weights that are no I3D's.
    """
    if batches < 1:
        raise ValueError(f"--batches {batches}: average over at least one batch.")
    features = None if fvd_weights is None else i3d_features(fvd_weights)
    experiment = read_experiment(run)
    config = experiment.data
    if data is not None:
        split = "validation" if "validation" in splits(data) else "train"
        config = config.replace(evaluation_sources=(SourceConfig(path=data, split=split),))
    if not config.evaluation_sources:
        raise ValueError("the run names no data.evaluation_sources; say which data set with --data FOLDER.")
    experiment.task.check_data(config.replace(sources=config.evaluation_sources))
    loader = Loader(config, seed=experiment.seed, prepare=experiment.task.build().prepare, evaluation=True)
    loaded = open_run(run, ema, step, untrained)
    evaluate = loaded.program.evaluation("evaluate")
    distance = None if features is None else VideoDistance(loaded.program, features)
    means, key = RunningMeans(), jax.random.key(experiment.seed)
    with loader.batches(0, batches) as stream:
        for number, batch in enumerate(progress(stream, "evaluating", unit="batch", total=batches)):
            placed = loaded.program.place(batch.arrays, batch.bucket, 0, 1)
            given = loaded.parameters, loaded.frozen, placed, key_for(key, EVALUATE, number)
            means.add(evaluate(*given))
            if distance is not None:
                distance.add(*given)
    result = means.result() | ({} if distance is None else distance.result())
    for name, value in sorted(result.items()):
        print(f"{name:32s} {value:.6g}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        document = {"run": str(run), "step": loaded.step, "batches": batches, "metrics": result}
        out.write_text(json.dumps(document, indent=1))
    return result
