"""What smaller optimizer states and products in 8 bits cost in loss: the demo's DiT with AdamW.

    make demo
    python -m tests.experiments.optimizer_state --demo runs/demo --workdir runs/moments --out runs/moments.md

Every row has the same batches and noise. Products in 8 bits need the extra `quantized`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from jvgen import config as configuration
from jvgen.parallel.mesh import single_device_mesh
from jvgen.training.loop import train
from jvgen.training.optimization.parameter_paths import name_leaves
from jvgen.training.program import Program

CONFIG = Path(__file__).parents[2] / "configs" / "demo_text_to_video.py"
ROWS = {
    "float32": [],
    "first moment bfloat16": ["optimizer.first_moment=bfloat16"],
    "both bfloat16": ["optimizer.first_moment=bfloat16", "optimizer.second_moment=bfloat16"],
    "bfloat16, factored": ["optimizer.first_moment=bfloat16", "optimizer.second_moment=factored"],
    "float32, products in int8": ["training.precision.quantized=int8"],
    "float32, products in fp8": ["training.precision.quantized=fp8"],
}
# The curve: mean training loss in equal parts of the run.
PARTS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every row and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.optimizer_state", description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `make demo` wrote: its latents and VAE")
    parser.add_argument("--workdir", type=Path, required=True, help="one run below it for every row")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows of the table")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE", help="of every run")
    chosen = parser.parse_args(arguments)
    latents = chosen.demo / "latents"
    found = json.loads((latents / "latent_statistics.json").read_text())
    lines = [
        "| moments | bytes of moments per parameter | loss in fifths of the run | last fifth against the first row |",
        "|---|---|---|---|",
    ]
    first = None
    for name in chosen.only:
        experiment = configuration.override(
            configuration.load(CONFIG),
            [
                f"data.sources.0.path={latents}", f"data.evaluation_sources.0.path={latents}",
                f"task.vae_weights={chosen.demo / 'export' / 'video_vae' / 'vae'}",
                f"task.latent_scale={1 / found['deviation']}", f"task.latent_shift={found['mean']}",
                "optimizer.kind=adamw", "optimizer.learning_rate=1e-3", f"training.steps={chosen.steps}",
                f"seed={chosen.seed}", "training.log_every=50", f"checkpoint.every={chosen.steps}", *chosen.sets,
                *ROWS[name],
            ],
        )  # fmt: skip
        folder = chosen.workdir / name.replace(" ", "_").replace(",", "")
        train(experiment, folder)
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        part = len(losses) // PARTS
        curve = [statistics.mean(losses[index * part : (index + 1) * part]) for index in range(PARTS)]
        first = first or curve
        lines.append(
            f"| {name} | {moment_bytes(experiment):.2f} | {', '.join(f'{value:.4f}' for value in curve)} | "
            f"{curve[-1] / first[-1] - 1:+.2%} |"
        )
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text("\n".join(lines) + "\n")
    print(chosen.out.read_text())
    return 0


def moment_bytes(experiment: configuration.Config) -> float:
    """Bytes of moments per trained parameter."""
    abstract = Program.build(experiment, single_device_mesh()).abstract
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in name_leaves(abstract.optimizer).values())
    return size / sum(leaf.size for leaf in name_leaves(abstract.parameters).values())


if __name__ == "__main__":
    raise SystemExit(main())
