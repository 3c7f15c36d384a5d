"""How often plans reach their goal: with a learned world model, in the true simulator, and with random actions.

    python -m tests.experiments.planning_success --env DATA --model WORLD --cost pixels --out runs/plans
    python -m tests.experiments.planning_success --env metaworld:drawer-close-v3 --cost reward --out runs/plans

DATA is a data set of driven scenes; WORLD a run directory of a world model, or a folder with tokenizer/ and
transformer/. Without a model there are the simulator (the upper bound, with the same search) and random actions (the
lower bound). Each seed has its own episodes, the same ones for every way. The report: success (at any step of an
episode), mean sum of rewards, plans a second on this machine; the picture of the first plan.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.config import override
from jvgen.control.environments import open_environment
from jvgen.control.planning import vp2_cem
from jvgen.evaluation.contact_sheets import png_bytes
from jvgen.runs.planning import cost_for, plan_episodes
from jvgen.runs.world_models import load_world_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan all episodes, write the report after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="as `jvgen plan --env`")
    parser.add_argument("--model", type=Path, help="the learned world model")
    parser.add_argument("--ways", default="model,simulator,random", help="some of them, by comma")
    parser.add_argument("--cost", default="pixels", help="as `jvgen plan --cost`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=4, help="of each seed")
    parser.add_argument("--steps", type=int, default=15, help="actions of an episode")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the search (VP2's CEM)")
    parser.add_argument("--out", type=Path, required=True, help="the report is written here")
    parsed = parser.parse_args(arguments)
    search = override(vp2_cem(standard_deviation=(1.0,)), parsed.set)
    search.validate()
    world = load_world_model(parsed.model, greedy=True) if parsed.model else None
    environment = open_environment(parsed.env, steps=parsed.steps, size=world.tokenizer.resolution if world else None)
    ways = [way for way in parsed.ways.split(",") if way != "model" or world is not None]
    parsed.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {way: [] for way in ways}
    for seed in range(parsed.seeds):
        for way in ways:
            outcome = plan_episodes(
                environment, world, cost_for(parsed.cost), search, way=way, episodes=parsed.episodes,
                steps=parsed.steps, seed=1000 * seed, expected=False,
            )  # fmt: skip
            report[way].append(outcome.summary)
            print(seed, way, outcome.summary, flush=True)
            if outcome.sheet is not None:
                (parsed.out / f"first_plan_{seed}.png").write_bytes(png_bytes(outcome.sheet))
            (parsed.out / "report.json").write_text(json.dumps(report, indent=1))
            (parsed.out / "report.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return 0


def as_markdown(report: dict[str, Any]) -> str:
    """A table of a report."""
    lines = ["| way | success | by seed | mean sum of rewards | plans/s |", "|---|---|---|---|---|"]
    for way, seeds in report.items():
        if not seeds:
            continue
        success = [one["success"] for one in seeds]
        speed = [one["plans_per_second"] for one in seeds if "plans_per_second" in one]
        lines.append(
            f"| {way} | {np.mean(success):.0%} | {', '.join(f'{value:.0%}' for value in success)} | "
            f"{np.mean([one['return'] for one in seeds]):.2f} | {f'{np.median(speed):.2f}' if speed else ''} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
