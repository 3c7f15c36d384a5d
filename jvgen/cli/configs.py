"""`jvgen config`: print a config after overrides."""

import argparse
import sys

from jvgen.cli.arguments import add_command, add_config_arguments, experiment_of


def add_commands(commands) -> None:
    """Add `config show`."""
    parser = add_command(
        commands, "config", "print a config with its overrides applied", "jvgen config show configs/cogvideox_2b.py"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = add_command(
        actions, "show", "print every field of a config, one per line",
        "jvgen config show configs/cogvideox_2b.py --set training.steps=100",
        handler=run_show,
    )  # fmt: skip
    add_config_arguments(show)
    show.add_argument("--json", action="store_true", help="print JSON, in the form that checkpoints store")


def run_show(parsed: argparse.Namespace) -> int:
    """Print the config."""
    from jvgen import config, saved_config

    experiment = experiment_of(parsed)
    sys.stdout.write(saved_config.to_json(experiment) + "\n" if parsed.json else config.dump(experiment))
    return 0
