"""Why RepVideo is behind CogVideoX at the demo's scale: depth, first gates, their learning rate, what it starts from.

    make demo
    python -m tests.experiments.repvideo_depth --demo runs/demo --workdir runs/depth --out depth.md

At each depth the width is chosen for about the same number of parameters. Every form is trained from scratch, and from
the CogVideoX of the same depth and seed, as the paper does; all runs of a depth and seed see the same clips in the same
order. A line is kept for every run that is done, and no run is done twice. `--continued-only` leaves out the other
forms from scratch; `--figure FILE` draws by how much the training loss of each form is over CogVideoX's, step by step.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.models.video_dit.config import AggregationConfig
from jvgen.runs.evaluation import evaluate_run
from jvgen.training.config import InitFromConfig
from jvgen.training.loop import train
from tests.experiments import repvideo_ablation

WIDTHS = {6: (2, 64), 12: (2, 48), 24: (2, 32)}  # layers -> heads, head width
BASELINE = "CogVideoX"
GATES = ".*aggregation/gates"


@dataclasses.dataclass(frozen=True)
class Form:
    """An aggregation and the factor on its gates' learning rate."""

    aggregation: AggregationConfig | None
    gates_rate: float = 1.0


FORMS = {
    BASELINE: Form(None),
    "gates from 0.5": Form(AggregationConfig()),
    "gates from 0": Form(AggregationConfig(initial=0.0)),
    "gates from 0.5, ten times their rate": Form(AggregationConfig(), 10.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.repvideo_depth", description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `make demo` wrote: its latents and VAE")
    parser.add_argument("--workdir", type=Path, required=True, help="one run below it for every form, depth and seed")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--layers", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=240, help="of a run from scratch")
    parser.add_argument("--more", type=int, default=120, help="steps of a run from the CogVideoX of these steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), help="besides CogVideoX")
    parser.add_argument("--continued-only", action="store_true", help="from scratch train CogVideoX alone")
    parser.add_argument("--figure", type=Path, help="picture to draw, PNG")
    chosen = parser.parse_args(arguments)
    chosen.workdir.mkdir(parents=True, exist_ok=True)
    kept = chosen.workdir / "runs.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for seed in map(int, chosen.seeds.split(",")):
        for layers in map(int, chosen.layers.split(",")):
            for start in ("scratch", BASELINE):
                for form in forms_of(chosen, start):
                    which = {"layers": layers, "start": start, "form": form, "seed": seed}
                    if any(all(row[key] == value for key, value in which.items()) for row in rows):
                        continue
                    rows.append({**which, **measure(chosen, layers, start, form, seed)})
                    with kept.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    chosen.out.write_text(report(chosen, rows))
    chosen.out.write_text(report(chosen, rows))
    if chosen.figure:
        draw(chosen.workdir, rows, chosen.figure)
    print(chosen.out.read_text())
    return 0


def forms_of(chosen: argparse.Namespace, start: str) -> list[str]:
    """What is trained from a start, CogVideoX first: the others are compared with it."""
    others = [] if chosen.continued_only and start == "scratch" else chosen.forms
    return [form for form in FORMS if form == BASELINE or form in others]


def measure(chosen: argparse.Namespace, layers: int, start: str, form: str, seed: int) -> dict[str, Any]:
    """Train one run and evaluate it."""
    run = folder(chosen.workdir, layers, start, form, seed)
    heads, head_width = WIDTHS[layers]
    steps = chosen.steps if start == "scratch" else chosen.more
    setting = repvideo_ablation.Setting(
        latents=chosen.demo / "latents",
        vae=chosen.demo / "export" / "video_vae" / "vae",
        workdir=chosen.workdir,
        steps=steps,
        seeds=(seed,),
        size=(17, 32, 32),
        batches=4,
        clips=0,
        scored=False,
        sets=(
            f"task.denoiser.layers={layers}",
            f"task.denoiser.heads={heads}",
            f"task.denoiser.head_width={head_width}",
            f"data.buckets.0.batch_size={chosen.batch}",
        ),
    )
    experiment = repvideo_ablation.experiment(setting, BASELINE, seed)
    denoiser = experiment.task.denoiser.replace(aggregation=FORMS[form].aggregation)
    optimizer = experiment.optimizer
    if FORMS[form].gates_rate != 1.0:
        optimizer = optimizer.replace(multipliers={GATES: FORMS[form].gates_rate})
    origin = InitFromConfig()
    if start != "scratch":
        # Other clips than those of the first steps, and half the rate of the run that it continues.
        optimizer = optimizer.replace(learning_rate=optimizer.learning_rate / 2)
        origin = InitFromConfig(run=str(folder(chosen.workdir, layers, "scratch", BASELINE, seed)), allow_partial=True)
        experiment = experiment.replace(seed=seed + 1000)
    experiment = experiment.replace(
        task=experiment.task.replace(denoiser=denoiser), optimizer=optimizer, init_from=origin
    )
    began = time.perf_counter()
    status = train(experiment, run)
    assert status == 0, f"{run} ended with status {status}"
    seconds = time.perf_counter() - began
    gates = repvideo_ablation.gates_of(run)
    return {"steps": steps, "seconds": seconds, "loss": evaluate_run(run, batches=4)["loss"], "gates": gates}


def folder(workdir: Path, layers: int, start: str, form: str, seed: int) -> Path:
    """Run directory of one run."""
    return workdir / f"{layers}_{start}_{form.replace(' ', '_').replace(',', '')}_{seed}".lower()


def report(chosen: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: losses by depth, start and form, and their difference from CogVideoX at equal seeds."""
    lines = [
        f"# RepVideo by depth: {chosen.steps} steps from scratch, or {chosen.more} more from CogVideoX",
        "",
        f"Batches of {chosen.batch} clips of the demo; validation loss, mean and deviation over seeds; differences at "
        "equal seeds.",
        "",
        "| layers x width | start | form | seeds | loss | against CogVideoX | smallest and largest gate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layers, (heads, head_width) in WIDTHS.items():
        for start in ("scratch", BASELINE):
            of_start = [row for row in rows if (row["layers"], row["start"]) == (layers, start)]
            base = {row["seed"]: row["loss"] for row in of_start if row["form"] == BASELINE}
            for form in FORMS:
                ours = {row["seed"]: row for row in of_start if row["form"] == form}
                if not ours:
                    continue
                differences = [row["loss"] - base[seed] for seed, row in ours.items()]
                gates = [gate for row in ours.values() for gate in row["gates"] or ()]
                cells = [
                    f"{layers} x {heads * head_width}",
                    "scratch" if start == "scratch" else "CogVideoX",
                    form,
                    str(len(ours)),
                    _spread([row["loss"] for row in ours.values()]),
                    "" if form == BASELINE else _spread(differences, "+"),
                    f"{min(gates):.2f}, {max(gates):.2f}" if gates else "",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(workdir: Path, rows: Sequence[dict[str, Any]], path: Path, window: int = 20) -> None:
    """Draw, per depth and form, training losses over those of CogVideoX on the same clips and noise.

    Args:
      workdir: of the runs.
      rows: of the runs that are done.
      path: PNG file to write.
      window: steps that each point is the mean of.
    """
    import matplotlib
    from matplotlib.figure import Figure

    starts = [
        start for start in ("scratch", BASELINE) if any(r["start"] == start and r["form"] != BASELINE for r in rows)
    ]
    depths = sorted({row["layers"] for row in rows})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(3.2 * len(depths), 2.9 * len(starts)), layout="constrained")
        grid = figure.subplots(len(starts), len(depths), sharey="row", squeeze=False)
        for axes_of, start in zip(grid, starts, strict=True):
            for axes, layers in zip(axes_of, depths, strict=True):
                axes.axhline(0.0, color="gray", linewidth=0.8)
                axes.set_title(f"{layers} layers, from {start}", fontsize=10)
                axes.set_xlabel("step")
                for color, form in zip(
                    ("#3d6db5", "#c2541d", "#5b8f3a"), [f for f in FORMS if f != BASELINE], strict=True
                ):
                    seeds = [r["seed"] for r in rows if (r["layers"], r["start"], r["form"]) == (layers, start, form)]
                    if not seeds:
                        continue
                    over = np.mean([_over(workdir, layers, start, form, seed) for seed in seeds], axis=0)
                    smooth = np.convolve(over, np.ones(window) / window, mode="valid")
                    axes.plot(np.arange(len(smooth)) + window, smooth, color=color, linewidth=1.5, label=form)
            axes_of[0].set_ylabel("loss over CogVideoX's")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, dpi=150, facecolor="white")


def _over(workdir: Path, layers: int, start: str, form: str, seed: int) -> np.ndarray:
    one, other = (
        [json.loads(line)["loss"] for line in (folder(workdir, layers, start, name, seed) / "metrics.jsonl").open()]
        for name in (form, BASELINE)
    )
    return np.subtract(one, other)


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
