"""`jvgen demo`: data, VAEs, video DiT, samples, export and a report, at a size for two CPU cores."""

import argparse
from pathlib import Path

from jvgen.cli.arguments import add_command


def add_commands(commands) -> None:
    """Add `demo`."""
    parser = add_command(
        commands, "demo", "run the whole pipeline at a small scale: data, VAEs, video DiT, samples, export, report",
        "jvgen demo --workdir runs/demo",
        details="Takes minutes on two CPU cores and writes report.html. Interrupts two of its training runs and "
        "resumes them. Stages that a previous demo in the same folder completed are skipped.",
        handler=run_demo,
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder for all results")
    parser.add_argument(
        "--configs", type=Path, default=Path("configs"), metavar="DIR", help="folder with the demo's config files"
    )


def run_demo(parsed: argparse.Namespace) -> int:
    """Run the demo."""
    from jvgen.demo.demo import demo

    return demo(parsed.workdir, parsed.configs)
