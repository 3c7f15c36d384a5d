"""`jvgen compile` and `jvgen estimate`: compile a training step for a TPU pod that this machine does not have."""

import argparse
import sys
from typing import TYPE_CHECKING

from jvgen.cli.arguments import (
    add_command,
    add_config_arguments,
    add_pod_arguments,
    check_output,
    experiment_of,
    number,
    path,
)
from jvgen.config import ConfigError
from jvgen.value_rules import Count

if TYPE_CHECKING:
    from jvgen.preflight.report import CompileReport


def add_commands(commands) -> None:
    """Add `compile` and `estimate`."""
    parser = add_command(
        commands, "compile", "compile the training step for a TPU pod that this machine does not have",
        "jvgen compile configs/cogvideox_2b.py --topology v5p:4x4x8",
        details="Prints memory per device against HBM, FLOPs by component, the estimated time by part, what a process "
        "reads and the largest collectives for every batch shape; exits with status 1 if one does not fit. A large "
        "network of convolutions can take the TPU compiler half an hour per batch shape, and a minute with "
        "`--without-code`. Needs the `tpu` extra, and no TPU.",
        handler=run_compile,
    )  # fmt: skip
    _add_arguments(parser)
    group = parser.add_argument_group(
        "options for a search",
        "Instead of the configured step, tries meshes (fsdp x seq), rematerialization and batch sizes of the first "
        "batch shape. What fits by arithmetic, likely the fastest first, is compiled; the fastest per example by the "
        "estimate of `jvgen estimate` is printed first, with the assignments for --set.",
    )
    group.add_argument("--search", action="store_true", help="search instead of compiling the configured step")
    group.add_argument(
        "--batch-sizes", type=number(Count), nargs="+", default=[], metavar="N",
        help="global batch sizes to try; that of the config by default",
    )  # fmt: skip
    group.add_argument(
        "--compilations", type=number(Count), default=6, metavar="N",
        help="how many candidates are compiled (default 6); one can take half an hour",
    )  # fmt: skip
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
        "--xla-flags", dest="flags", choices=["preset", "none"], default="none",
        help="compile with the flags that `jvgen launch` sets for these chips; none by default",
    )  # fmt: skip
    parser.add_argument(
        "--without-code", action="store_true",
        help="stop before machine code is generated: a minute where convolutions take half an hour; memory and "
        "collectives are those of the optimized program, times the least that it can take",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=path, metavar="FILE",
        help="also write the report to this JSON file, updated after every batch shape",
    )  # fmt: skip


def run_compile(parsed: argparse.Namespace) -> int:
    """Compile every batch shape, or search, and print the report; 1 if one does not fit, or if none does."""
    if parsed.search:
        return _search(parsed)
    if parsed.batch_sizes:
        raise ConfigError("--batch-sizes: only with --search.")
    report = _compile(parsed)
    print(report)
    return 0 if report.fits else 1


def run_estimate(parsed: argparse.Namespace) -> int:
    """Compile every batch shape and print how long its step takes; 1 if one does not fit."""
    report = _compile(parsed)
    print(report.times())
    return 0 if report.fits else 1


def _search(parsed: argparse.Namespace) -> int:
    from jvgen.parallel import libtpu
    from jvgen.preflight.check import with_buckets
    from jvgen.preflight.search import Found, search
    from jvgen.training.optimization.health import bucket_key

    whole = experiment_of(parsed)
    experiment = with_buckets(whole, parsed.buckets)
    searched = bucket_key(experiment.data.buckets[0])
    places = [number for number, bucket in enumerate(whole.data.buckets) if bucket_key(bucket) == searched]
    if parsed.without_code:
        raise ConfigError("--without-code: not with --search, which compares times.")
    if parsed.batch_sizes and whole.data.tokens_per_step is not None:
        raise ConfigError(
            f"--batch-sizes: data.tokens_per_step = {whole.data.tokens_per_step} chooses batch sizes; leave it out, or "
            "--set data.tokens_per_step=none."
        )
    if parsed.json:
        raise ConfigError("--json: not with --search; compile the candidate that it names.")

    def log(found: Found) -> None:
        took = "" if found.report is None else f" in {found.report.seconds:.0f} s"
        print(f"compiled {found.candidate.settings}{took}", file=sys.stderr, flush=True)

    with libtpu.writing_bundles(_flags(parsed)):
        report = search(
            experiment, parsed.topology, slices=parsed.slices, batch_sizes=parsed.batch_sizes,
            compilations=parsed.compilations, places=places, on_found=log,
        )  # fmt: skip
    print(report)
    return 0 if report.best is not None else 1


def _compile(parsed: argparse.Namespace) -> "CompileReport":
    from jvgen.parallel import libtpu
    from jvgen.preflight.ahead_of_time import compile_ahead
    from jvgen.preflight.check import with_buckets
    from jvgen.training.optimization.health import one_per_step

    experiment = with_buckets(experiment_of(parsed), parsed.buckets)
    if parsed.json:
        check_output("--json", parsed.json)

    def log(report: "CompileReport") -> None:
        done, total = len(report.buckets), len(one_per_step(experiment.data.buckets))
        last = report.buckets[-1]
        print(f"{done}/{total}: compiled {last.bucket.name} in {last.seconds:.0f} s", file=sys.stderr, flush=True)
        if parsed.json:
            parsed.json.parent.mkdir(parents=True, exist_ok=True)
            parsed.json.write_text(report.to_json())

    with libtpu.writing_bundles(_flags(parsed)):
        return compile_ahead(
            experiment, parsed.topology, slices=parsed.slices, code=not parsed.without_code, on_bucket=log
        )


def _flags(parsed: argparse.Namespace) -> list[str]:
    from jvgen.launch.flags import flags_of
    from jvgen.parallel.pods import pod_named

    return [] if parsed.flags == "none" else [str(flag) for flag in flags_of(pod_named(parsed.topology).chip)]
