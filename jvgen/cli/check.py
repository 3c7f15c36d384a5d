"""`jvgen check`: everything that can be known about a run before it costs money, on one page."""

import argparse

from jvgen.cli.arguments import add_command, add_config_arguments, add_pod_arguments, experiment_of, path


def add_commands(commands) -> None:
    """Add `check`."""
    parser = add_command(
        commands, "check", "check a run and estimate its memory, reading, checkpoints and time, in seconds",
        "jvgen check configs/cogvideox_2b.py --topology v5p:4x4x8 --workdir runs/x",
        details="Prints one page: config, mesh, processes and what each reads, what the mesh divides, memory per "
        "device by arithmetic, data sets, open files, space for checkpoints, time to finish. Exits with status 2 if "
        "something is a problem. Allocates no array, and needs no TPU, without --kernels.",
        handler=run_check,
    )  # fmt: skip
    add_config_arguments(parser)
    add_pod_arguments(parser)
    parser.add_argument(
        "--workdir", metavar="DIR", type=path, help="run directory: whether it can be written, and its free space"
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="also compile the step of every batch shape, for the compiler's word on memory; takes minutes",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", action="store_true",
        help="also run the attention kernels of the config on an attached TPU or GPU, at its lengths, beside float32; "
        "takes a minute. Training does the same before its first step",
    )  # fmt: skip


def run_check(parsed: argparse.Namespace) -> int:
    """Print the page; 2 if something is a problem."""
    from rich.console import Console

    from jvgen.parallel.pods import pod_named
    from jvgen.preflight.check import with_buckets
    from jvgen.preflight.page import examine

    if parsed.topology is not None:
        pod_named(parsed.topology, parsed.slices)
    elif parsed.slices != 1:
        raise ValueError("--slices: needs --topology, the topology of one slice.")
    if parsed.kernels and parsed.topology is not None:
        raise ValueError("--kernels: runs on attached devices, not with --topology.")
    experiment = with_buckets(experiment_of(parsed), parsed.buckets)
    page = examine(
        experiment, topology_name=parsed.topology, slices=parsed.slices, workdir=parsed.workdir,
        compiled=parsed.compile, run_kernels=parsed.kernels,
    )  # fmt: skip
    console = Console(highlight=False)
    page.print(console if console.is_terminal else Console(width=120, highlight=False))
    return 0 if page.ok else 2
