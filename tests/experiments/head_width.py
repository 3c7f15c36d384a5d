"""What wide heads cost in loss: the demo's DiT at one width with heads of 64, 128 and 256, from scratch.

make demo
python -m tests.experiments.head_width --demo runs/demo --workdir runs/heads --out runs/heads.md

Wide heads fill the matrix units of TPUs (128 wide up to v5p, 256 on v6e), narrow ones leave a part of them empty. Runs
of one seed have the same batches and noise, and runs that are there already are not repeated.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from jvgen import config as configuration
from jvgen.training.loop import train

CONFIG = Path(__file__).parents[2] / "configs" / "demo_text_to_video.py"
WIDTH, HEAD_WIDTHS = 256, (64, 128, 256)
LAYERS, BATCH_SIZE, LEARNING_RATE = 3, 4, 2e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every head width with every seed and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.head_width", description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `make demo` wrote: its latents and VAE")
    parser.add_argument("--workdir", type=Path, required=True, help="one run below it for every head width and seed")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--head-widths", type=int, nargs="+", default=HEAD_WIDTHS)
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE", help="of every run")
    chosen = parser.parse_args(arguments)
    losses: dict[int, list[tuple[float, float]]] = {head_width: [] for head_width in chosen.head_widths}
    for seed in range(chosen.seeds):
        for head_width, found in losses.items():
            folder = chosen.workdir / f"{WIDTH // head_width}x{head_width}_{seed}"
            if not (folder / "evaluation.jsonl").exists():
                train(_experiment(chosen.demo, head_width, seed, chosen.steps, chosen.sets), folder)
            found.append(_losses(folder, chosen.steps))
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(table(losses))
    print(chosen.out.read_text())
    return 0


def _experiment(demo: Path, head_width: int, seed: int, steps: int, sets: Sequence[str]) -> configuration.Config:
    latents = demo / "latents"
    found = json.loads((latents / "latent_statistics.json").read_text())
    return configuration.override(
        configuration.load(CONFIG),
        [
            f"data.sources.0.path={latents}", f"data.evaluation_sources.0.path={latents}",
            f"task.vae_weights={demo / 'export' / 'video_vae' / 'vae'}",
            f"task.latent_scale={1 / found['deviation']}", f"task.latent_shift={found['mean']}",
            f"task.denoiser.heads={WIDTH // head_width}", f"task.denoiser.head_width={head_width}",
            f"task.denoiser.layers={LAYERS}", f"data.buckets.0.batch_size={BATCH_SIZE}", "optimizer.kind=adamw",
            f"optimizer.learning_rate={LEARNING_RATE}", f"training.steps={steps}", f"training.evaluate_every={steps}",
            f"checkpoint.every={steps}", f"seed={seed}", *sets,
        ],
    )  # fmt: skip


def _losses(folder: Path, steps: int) -> tuple[float, float]:
    """Validation loss after the last step, and the mean training loss of the last fifth of the run."""
    evaluation = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[-1])
    rows = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return evaluation["validation_loss"], statistics.mean(rows[-max(1, steps // 5) :])


def table(losses: dict[int, list[tuple[float, float]]]) -> str:
    """Markdown: a row for each head width, differences to the first one within each seed."""
    first = next(iter(losses.values()))
    lines = [
        "| heads | validation loss | training loss, last fifth | validation loss against the first |",
        "|---|---|---|---|",
    ]
    for head_width, found in losses.items():
        shares = [mine[0] / base[0] - 1 for mine, base in zip(found, first, strict=False)]
        cells = [_spread([one[number] for one in found], ".4f") for number in range(2)]
        lines.append(f"| {WIDTH // head_width} x {head_width} | {' | '.join(cells)} | {_spread(shares, '+.1%')} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], style: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{style}} ± {deviation:{style.lstrip('+')}}"


if __name__ == "__main__":
    raise SystemExit(main())
