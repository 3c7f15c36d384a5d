"""`jvgen analyze`: measures of every layer of a trained run on held-out clips, as plots and numbers."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.store.sources import splits
from jvgen.data.stream.config import SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.evaluation.plots import heat_maps, save_plot
from jvgen.nn.network import Parameters
from jvgen.runs.generation import largest_bucket
from jvgen.runs.inference import LoadedRun, open_run, read_experiment
from jvgen.storage import Path, write_text
from jvgen.tasks.task import Batch
from jvgen.training.experiment import Experiment
from jvgen.training.state import EVALUATE, key_for

# Raw timesteps of the four stages of denoising in RepVideo's figures.
TIMESTEPS = (900.0, 600.0, 300.0, 50.0)
SIMILARITIES = ("before", "mean", "read", "after")


def analyze_run(
    run: Path,
    out: Path,
    *,
    ema: str | None = None,
    step: int | None = None,
    data: str | None = None,
    timesteps: Sequence[float] = TIMESTEPS,
    batches: int = 1,
    untrained: bool = False,
) -> dict[str, Any]:
    """Analyze the layers of the run in a folder, print a table, and name the files that `analyze` writes.

    Args:
      run: run directory.
      out: folder for the files.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      data, timesteps, batches: see `analyze`.

    Raises:
      ValueError: see `analyze`.
      CheckpointError: no such run, or no valid checkpoint.
    """
    # Mistakes are found before weights are read.
    loader = _prepare(read_experiment(run), data, timesteps, batches)
    loaded = open_run(run, ema, step, untrained)
    found = _measure(loaded, loader, timesteps, batches)
    document, written = _write(found, out, {"run": str(run), "step": loaded.step, "batches": batches})
    print(table(found))
    print("\n".join(str(path) for path in written))
    return document


def analyze(
    loaded: LoadedRun,
    out: Path,
    *,
    data: str | None = None,
    timesteps: Sequence[float] = TIMESTEPS,
    batches: int = 1,
) -> dict[str, Any]:
    """Write `analysis.json` and plots of a video DiT's layers.

    Args:
      loaded: the run.
      out: folder for the files.
      data: data set folder instead of the run's evaluation sources; its validation split if it has one.
      timesteps: raw noise levels, from 0 (clean) to 999.
      batches: held-out batches to average over, of the run's largest clips.

    Returns:
      What `analysis.json` holds: for every timestep the measures of `jvgen.tasks.task.Task.analyze_layers`.

    Raises:
      ValueError: a task without layers to analyze, a run without evaluation data, or timesteps out of range.
    """
    loader = _prepare(loaded.experiment, data, timesteps, batches)
    found = _measure(loaded, loader, timesteps, batches)
    about = {"run": loaded.experiment.name, "step": loaded.step, "batches": batches}
    return _write(found, out, about)[0]


def _prepare(experiment: Experiment, data: str | None, timesteps: Sequence[float], batches: int) -> Loader:
    if not timesteps or not all(0 <= t <= 999 for t in timesteps):
        raise ValueError(f"--timesteps {','.join(f'{t:g}' for t in timesteps)}: raw timesteps from 0 to 999.")
    if batches < 1:
        raise ValueError(f"--batches {batches}: average over at least one batch.")
    config = experiment.data
    if data is not None:
        split = "validation" if "validation" in splits(data) else "train"
        config = config.replace(evaluation_sources=(SourceConfig(path=data, split=split),))
    if not config.evaluation_sources:
        raise ValueError("the run has no data.evaluation_sources; give a data set with --data FOLDER.")
    experiment.task.check_data(config.replace(sources=config.evaluation_sources))
    return Loader(config, seed=experiment.seed, preprocess=experiment.task.build().preprocess, evaluation=True)


def _write(
    found: Sequence[tuple[float, dict[str, np.ndarray]]], out: Path, about: dict[str, Any]
) -> tuple[dict[str, Any], list[Path]]:
    out.mkdir(parents=True, exist_ok=True)
    document = {
        **about,
        "timesteps": {f"{t:g}": {name: np.vectorize(lambda x: float(f"{x:.6g}"))(array).tolist()
                                 for name, array in measures.items()} for t, measures in found},
    }  # fmt: skip
    write_text(out / "analysis.json", json.dumps(document))
    return document, [out / "analysis.json", *draw(found, out)]


def _measure(
    loaded: LoadedRun, loader: Loader, timesteps: Sequence[float], batches: int
) -> list[tuple[float, dict[str, np.ndarray]]]:
    task = loaded.task

    @jax.jit
    def measure(parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array) -> Any:
        with loaded.program.tracing():
            return task.analyze_layers(parameters, frozen, batch, key, timestep)

    parameters, seed = loaded.compute_parameters(), jax.random.key(loaded.experiment.seed)
    totals: list[dict[str, np.ndarray]] = [{} for _ in timesteps]
    # Clips of other lengths have statistics of other shapes.
    bucket = largest_bucket(loaded.experiment.task, loader.buckets)
    with loader.batches(0, None) as stream:
        wanted = (batch for batch in stream if batch.bucket == bucket)
        for number, batch in enumerate(itertools.islice(wanted, batches)):
            placed = loaded.program.shard_batch(batch.arrays, batch.bucket)
            for total, timestep in zip(totals, timesteps, strict=True):
                found = measure(
                    parameters, loaded.frozen, placed, key_for(seed, EVALUATE, number), jnp.float32(timestep)
                )
                for name, value in found.items():
                    total[name] = total.get(name, 0.0) + np.asarray(value, np.float64) / batches
    return list(zip(timesteps, totals, strict=True))


def draw(found: Sequence[tuple[float, dict[str, np.ndarray]]], out: Path) -> list[Path]:
    """Write the plots as PNG and SVG: one of similarities, and two of attention for every timestep."""
    written: list[Path] = []
    shown = [(t, name, measures[f"similarity_{name}"]) for t, measures in found for name in SIMILARITIES
             if f"similarity_{name}" in measures]  # fmt: skip
    if shown:
        figure = heat_maps(
            [array for _, _, array in shown],
            [f"t = {t:g}, {name}" for t, name, _ in shown],
            x_label="pair of neighboring frames",
            y_label="layer",
            color_label="cosine similarity",
            title="Similarity of neighboring frames",
            columns=len(SIMILARITIES),
        )
        written += save_plot(figure, out / "similarity")
    for t, measures in found:
        for kind, unit in (("frames", "frame (0: text)"), ("rows", "stretch of the sequence, text first")):
            maps = list(measures[f"attention_of_{kind}"])
            figure = heat_maps(
                # Most weights are small: their square roots show more.
                [np.sqrt(matrix) for matrix in maps],
                [f"layer {number}" for number in range(len(maps))],
                x_label=f"to {unit}",
                y_label=f"from {unit}",
                color_label="square root of attention",
                title=f"Attention at t = {t:g}",
            )
            written += save_plot(figure, out / f"attention_of_{kind}_t{t:03.0f}")
    return written


def table(found: Sequence[tuple[float, dict[str, np.ndarray]]]) -> str:
    """Similarities of neighboring frames by layer and timestep, as text."""
    lines = []
    for t, measures in found:
        if "similarity_before" not in measures:
            continue
        lines.append(f"t {t:g}: cosine of neighboring frames, mean over pairs; attention across frames")
        lines.append("layer  " + "  ".join(f"{name:>7s}" for name in (*SIMILARITIES, "across")))
        columns = [measures[f"similarity_{name}"].mean(axis=1) for name in SIMILARITIES]
        columns.append(measures["intensity"].mean(axis=1))
        for layer, values in enumerate(zip(*columns, strict=True)):
            lines.append(f"{layer:5d}  " + "  ".join(f"{value:7.4f}" for value in values))
    return "\n".join(lines)
