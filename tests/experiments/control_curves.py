"""Success by environment steps: DrQ-v2 alone, and in a world model from scratch or pretrained.

    python -m tests.experiments.control_curves --env DATA --world FOLDER --workdir runs/control

DATA is a data set of driven scenes (see `configs/demo_control.py`), or another environment that `jvgen plan --env`
takes (with `--set` for its actions and episodes); FOLDER a world model of others of this kind, a run or an export.
Every way is trained with every seed, through `jvgen.training.loop.train`; runs that are finished are not trained again.
Writes `curves.png` (every seed a line), `curves.md` (means over seeds) and `curves.json`.

With `--faults` also the three faults of the released code, one at a time, in the pretrained world model (from scratch
without one), after all of these, with the first `--fault-seeds` seeds; `faults.png` compares them with it. The demo's
world model has no dropout to leave on: `dropout_in_rollouts` is compared with a run that has the published rate in
training alone.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen import config
from jvgen.config import override
from jvgen.evaluation.plots import COLORS, GRAY, STYLE
from jvgen.reinforcement.config import ReleasedFaults
from jvgen.storage import as_path
from jvgen.training.experiment import Experiment
from jvgen.training.loop import train
from jvgen.training.telemetry.json_lines import read_rows

CONFIG = Path(__file__).parents[2] / "configs" / "demo_control.py"
WAYS = {"alone": "alone", "from scratch": "from_scratch", "pretrained": "pretrained"}
FAULTS = [field.name for field in dataclasses.fields(ReleasedFaults)]
DROPOUT_FAULT, DROPOUT, RATE = "dropout_in_rollouts", "dropout in training", 0.1


def experiment_of(way: str, seed: int, given: argparse.Namespace) -> Experiment:
    """The run of one way and seed."""
    fault = way if way in FAULTS else None
    dropout = way in (DROPOUT, DROPOUT_FAULT)
    way = corrected(given) if fault or dropout else way
    experiment = config.load(f"{CONFIG}:{WAYS[way]}")
    source = experiment.data.sources[0].replace(path=given.env)
    experiment = experiment.replace(
        seed=seed, data=experiment.data.replace(sources=(source,), evaluation_sources=(source,))
    )
    imagination = experiment.task.imagination
    if dropout:
        imagination = imagination.replace(transformer=imagination.transformer.replace(attention_dropout=RATE))
    if fault:
        imagination = imagination.replace(released=ReleasedFaults(**{fault: True}))
    if way == "pretrained":
        imagination = imagination.replace(pretrained=str(given.world))
    experiment = experiment.replace(task=experiment.task.replace(imagination=imagination))
    # What is imagined is no part of the agent alone.
    below = [one for one in given.assignments if imagination is not None or not one.startswith("task.imagination.")]
    experiment = override(experiment, below)
    if given.steps is not None:
        steps = experiment.task.fit_steps + given.steps
        experiment = experiment.replace(training=experiment.training.replace(steps=steps, visualize_every=steps))
    return experiment


def corrected(given: argparse.Namespace) -> str:
    """The way that faults are compared with."""
    return "from scratch" if given.world is None else "pretrained"


def run(way: str, seed: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, unless it is finished; returns the rows of its evaluations."""
    folder = given.workdir / f"{way.replace(' ', '_')}_{seed}"
    experiment = experiment_of(way, seed, given)
    rows = read_rows(folder / "evaluation.jsonl") if folder.exists() else []
    if not any(row["step"] == experiment.training.steps for row in rows):
        status = train(experiment, as_path(folder))
        assert status == 0, f"{folder}: ended with {status}"
        rows = read_rows(folder / "evaluation.jsonl")
    # While the world model is fitted the agent does not act: only the last evaluation there counts.
    return list({row["environment_steps"]: row for row in rows}.values())


def picture(curves: dict[str, dict[int, list[dict[str, Any]]]], path: Path) -> None:
    """Two panels, success and return; a color for each way, thin lines for seeds and a thick one for their mean."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        for place, name in enumerate(("success", "return")):
            axes = figure.add_subplot(1, 2, place + 1, xlabel="environment steps", ylabel=name)
            axes.grid(color=GRAY, alpha=0.25, linewidth=0.7)
            for color, (way, seeds) in zip(COLORS, curves.items(), strict=False):
                for rows in seeds.values():
                    steps = [row["environment_steps"] for row in rows]
                    axes.plot(steps, [row[name] for row in rows], color=color, linewidth=0.7, alpha=0.4)
                steps, values = mean(seeds, name)
                axes.plot(steps, values, color=color, linewidth=2.0, label=way)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, dpi=160, facecolor="white")


def mean(seeds: dict[int, list[dict[str, Any]]], name: str) -> tuple[list[int], np.ndarray]:
    """Environment steps, and the mean over seeds of a number at them."""
    rows = list(seeds.values())
    count = min(len(one) for one in rows)
    steps = [row["environment_steps"] for row in rows[0][:count]]
    return steps, np.mean([[row[name] for row in one[:count]] for one in rows], axis=0)


def table(curves: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """Success of each way at each evaluation: mean over seeds, and the seeds' own."""
    rows = []
    for way, seeds in curves.items():
        steps, _ = mean(seeds, "success")
        for place, step in enumerate(steps):
            success = [seeds[seed][place]["success"] for seed in sorted(seeds)]
            returns = [seeds[seed][place]["return"] for seed in sorted(seeds)]
            each = ", ".join(f"{value:.2f}" for value in success)
            rows.append(f"| {way} | {step} | {np.mean(success):.2f} ({each}) | {np.mean(returns):.2f} |")
    return "\n".join(["| way | environment steps | success, mean (seeds) | return |", "|---|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", "--scenes", required=True, metavar="DATA", help="as `jvgen plan --env`")
    parser.add_argument("--world", type=Path, metavar="FOLDER", help="pretrained world model; without it two ways")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, by comma")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, metavar="N", help="actions in training, instead of the config's")
    parser.add_argument(
        "--faults", nargs="?", const=",".join(FAULTS), default="", help="also faults of the released code, by comma"
    )
    parser.add_argument("--fault-seeds", type=int, default=1, metavar="N", help="seeds of each fault")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="PATH=VALUE")
    given = parser.parse_args(arguments)
    ways = [way for way in given.ways.split(",") if way != "pretrained" or given.world is not None]
    # Seed by seed: what there is so far compares all ways.
    runs = [(way, seed) for seed in range(given.seeds) for way in ways]
    faults = [fault for fault in given.faults.split(",") if fault]
    compared = [DROPOUT, *faults] if DROPOUT_FAULT in faults else faults
    runs += [(way, seed) for seed in range(given.fault_seeds) for way in compared]
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for way, seed in runs:
        curves.setdefault(way, {})[seed] = run(way, seed, given)
        (given.workdir / "curves.json").write_text(json.dumps(curves, indent=1))
        (given.workdir / "curves.md").write_text(table(curves) + "\n")
        picture({way: of for way, of in curves.items() if way in WAYS}, given.workdir / "curves.png")
        shown = {other: of for other, of in curves.items() if other in compared}
        if shown:
            without = {seed: curves[corrected(given)][seed] for seed in range(given.fault_seeds)}
            picture({"corrected": without, **shown}, given.workdir / "faults.png")
    print(table(curves))


if __name__ == "__main__":
    main()
