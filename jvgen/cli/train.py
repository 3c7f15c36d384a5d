"""`jvgen train`: train a config, or resume its run."""

import argparse

from jvgen.cli.arguments import (
    add_command,
    add_config_arguments,
    add_process_arguments,
    experiment_of,
    join_processes,
    number,
    path,
)
from jvgen.training.preemption import Preemption
from jvgen.value_rules import Steps


def add_commands(commands) -> None:
    """Add `train`."""
    parser = add_command(
        commands, "train", "train a model from a config file, or resume its run",
        "jvgen train configs/demo_text_to_video.py --set optimizer.learning_rate=3e-4 --workdir runs/x",
        details="Writes checkpoints, metrics.jsonl and TensorBoard files to the run directory. The same command "
        "resumes from the latest valid checkpoint there.",
        handler=run_train,
    )  # fmt: skip
    add_config_arguments(parser)
    parser.add_argument("--workdir", type=path, required=True, metavar="DIR", help="run directory; created if missing")
    parser.add_argument(
        "--stop-after", type=number(Steps), metavar="STEP", help="save a checkpoint and exit after this training step"
    )
    parser.add_argument(
        "--allow-changes", action="store_true",
        help="resume even though model, data or seed in the config differ from the checkpoint's",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=path, metavar="DIR",
        help="folder of compiled programs, which later starts read; that of JAX_COMPILATION_CACHE_DIR if it is set, "
        "else compiled/ in the run directory",
    )  # fmt: skip
    add_process_arguments(parser)


def run_train(parsed: argparse.Namespace) -> int:
    """Join the other processes, check the run, then train."""
    # Before anything that takes time is imported: from here on SIGTERM does not kill the process.
    with Preemption(leave=True) as preemption:
        from jvgen.parallel import failing

        with failing.fail_fast(parsed.workdir):
            from jvgen.training.telemetry.startup import StartClock

            clock = StartClock.of_process()
            join_processes(parsed)
            clock.mark("processes")
            from jvgen.preflight.check import check
            from jvgen.saved_config import digest
            from jvgen.training.loop import train

            clock.mark("imports")
            experiment = experiment_of(parsed)
            failing.note_fact("config", digest(experiment))
            check(experiment, parsed.workdir)
            clock.mark("checks")
            return train(
                experiment, parsed.workdir, stop_after=parsed.stop_after, allow_changes=parsed.allow_changes,
                cache=parsed.cache, clock=clock, preemption=preemption,
            )  # fmt: skip
