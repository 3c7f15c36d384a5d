"""`jvgen compile` and `jvgen estimate`: compile a training step for a TPU pod that this machine does not have."""

import argparse
import sys
from typing import TYPE_CHECKING

from jvgen.cli.arguments import add_command, add_config_arguments, add_pod_arguments, check_output, experiment_of, path

if TYPE_CHECKING:
    from jvgen.preflight.report import CompileReport


def add_commands(commands) -> None:
    """Add `compile` and `estimate`."""
    parser = add_command(
        commands, "compile", "compile the training step for a TPU pod that this machine does not have",
        "jvgen compile configs/cogvideox_2b.py --topology v5p:4x4x8",
        details="Prints memory per device against HBM, FLOPs by component, the estimated time by part, what a process "
        "reads and the largest collectives for every batch shape; exits with status 1 if one does not fit. A large "
        "network of 3-D convolutions can take the TPU compiler half an hour per batch shape. Needs the `tpu` extra, "
        "and no TPU.",
        handler=run_compile,
    )  # fmt: skip
    _add_arguments(parser)
    parser = add_command(
        commands, "estimate", "estimate how long a training step takes on a TPU pod, and where the time goes",
        "jvgen estimate configs/repvideo_2b.py --topology v5p:4x4x4",
        details="Compiles the step as `jvgen compile` does and prints for every batch shape the time and model FLOPs "
        "utilization with a range, the time of kernels, products, recomputation, copies, elementwise operations and "
        "the optimizer, and collectives by mesh axis with their rate and how much of them is hidden. Exits with status "
        "1 if a step does not fit. Needs the `tpu` extra, and no TPU.",
        handler=run_estimate,
    )  # fmt: skip
    _add_arguments(parser)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_pod_arguments(parser, required=True)
    parser.add_argument(
        "--json", type=path, metavar="FILE",
        help="also write the report to this JSON file, updated after every batch shape",
    )  # fmt: skip


def run_compile(parsed: argparse.Namespace) -> int:
    """Compile every batch shape and print the report; 1 if one does not fit."""
    report = _compile(parsed)
    print(report)
    return 0 if report.fits else 1


def run_estimate(parsed: argparse.Namespace) -> int:
    """Compile every batch shape and print how long its step takes; 1 if one does not fit."""
    report = _compile(parsed)
    print(report.times())
    return 0 if report.fits else 1


def _compile(parsed: argparse.Namespace) -> "CompileReport":
    from jvgen.parallel import libtpu
    from jvgen.preflight.ahead_of_time import compile_ahead
    from jvgen.preflight.check import with_buckets

    experiment = with_buckets(experiment_of(parsed), parsed.buckets)
    if parsed.json:
        check_output("--json", parsed.json)

    def log(report: "CompileReport") -> None:
        done, total = len(report.buckets), len(experiment.data.buckets)
        last = report.buckets[-1]
        print(f"{done}/{total}: compiled {last.bucket.name} in {last.seconds:.0f} s", file=sys.stderr, flush=True)
        if parsed.json:
            parsed.json.parent.mkdir(parents=True, exist_ok=True)
            parsed.json.write_text(report.to_json())

    with libtpu.writing_bundles():
        return compile_ahead(experiment, parsed.topology, slices=parsed.slices, on_bucket=log)
