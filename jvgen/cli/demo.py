"""`jvgen demo`: data, VAEs, video DiT, samples, export and a report, at a size for two CPU cores."""

import argparse
import importlib
from pathlib import Path

from jvgen.cli.arguments import add_command

# Name -> module with `demo(workdir, configs)`, and its default folder.
DEMOS = {
    "video": ("jvgen.demo.demo", "runs/demo"),
    "world": ("jvgen.demo.world", "runs/demo_world"),
    "views": ("jvgen.demo.views", "runs/demo_views"),
}


def add_commands(commands) -> None:
    """Add `demo`."""
    parser = add_command(
        commands, "demo", "run a whole pipeline at a small scale: data, training, samples, export, report",
        "jvgen demo --workdir runs/demo", "jvgen demo world", "jvgen demo views",
        details="Takes minutes on two CPU cores and writes report.html. Interrupts two of its training runs and "
        "resumes them. Stages that a previous demo in the same folder completed are skipped.",
        handler=run_demo,
    )  # fmt: skip
    parser.add_argument(
        "which", nargs="?", choices=list(DEMOS), default="video",
        help="video: two VAEs and a text-to-video DiT (default). world: a world model, played and planned in. views: "
        "two cameras on one generated scene",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR",
        help=f"folder for all results; {', '.join(folder for _, folder in DEMOS.values())} if omitted",
    )  # fmt: skip
    parser.add_argument(
        "--configs", type=Path, default=Path("configs"), metavar="DIR", help="folder with the demo's config files"
    )


def run_demo(parsed: argparse.Namespace) -> int:
    """Run one of the demos."""
    module, folder = DEMOS[parsed.which]
    return importlib.import_module(module).demo(parsed.workdir or Path(folder), parsed.configs)
