"""What sub-commands share: adding one, the format of its help, and the arguments that several of them take."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from jvgen.value_rules import Count, CountOrZero, Frames, Pixels, Step, problems

if TYPE_CHECKING:
    from jvgen.storage import Path
    from jvgen.training.experiment import Experiment

Handler = Callable[[argparse.Namespace], int | None]
DTYPES = ("float32", "bfloat16", "float16")


class HelpFormatter(argparse.HelpFormatter):
    """Shows defaults other than None, False and empty ones, and keeps the lines of examples."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=28, **options)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        silent = default is None or default is False or default in (argparse.SUPPRESS, "", [])
        if silent or not action.option_strings:
            return action.help
        shown = "%(default)s"
        if isinstance(default, tuple):  # a size, 256x256, or words that follow the flag
            shown = ("x" if isinstance(default[0], int) else " ").join(map(str, default))
        return f"{action.help} (default: {shown})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Example") else super()._fill_text(text, width, indent)


def add_command(
    commands: Any, name: str, summary: str, *examples: str, details: str = "", handler: Handler | None = None
) -> argparse.ArgumentParser:
    """Add one sub-command.

    Args:
      commands: what `add_subparsers` returned.
      name: of the sub-command.
      summary: one line without a period, for the list of commands; it also starts the description.
      examples: complete command lines.
      details: more sentences for the description.
      handler: gets the parsed arguments and returns the exit status; None if the command has sub-commands of its own.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
        epilog="\n  ".join(("Example:" if len(examples) == 1 else "Examples:", *examples)),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    if handler is not None:
        parser.set_defaults(handler=handler)
    return parser


def number(rule: Any) -> Callable[[str], int | float]:
    """A flag's number, for argparse: `type=number(Count)` with a name of `jvgen.value_rules`."""
    kind = get_args(rule)[0]

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from error
        for _, _, problem in problems(value, rule, ""):
            raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
        return value

    return parse


def frame_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` as numbers, for argparse."""
    height, separator, width = text.partition("x")
    if not (separator and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH, for example 480x720")
    pixels = number(Pixels)
    return pixels(height), pixels(width)


def path(text: str) -> "Path":
    """A local path or one in a bucket (`gs://BUCKET/...`, `s3://BUCKET/...`), for argparse."""
    from jvgen.config import ConfigError
    from jvgen.storage import as_path

    if not text:
        raise argparse.ArgumentTypeError("'': a path is not empty; the current folder is '.'")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: a path has no zero bytes")
    try:
        return as_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_set_argument(parser: argparse.ArgumentParser, metavar: str = "PATH=VALUE", help: str | None = None) -> None:
    """Add `--set`; the assignments are parsed as `assignments`."""
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar=metavar,
        help=help or "override one config field by its dotted path; the value is checked against its type (repeatable)",
    )  # fmt: skip


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and `--set`: `experiment_of` reads them."""
    parser.add_argument(
        "config", type=path, metavar="CONFIG",
        help="config file: a Python file with a function experiment(), optionally with its arguments "
        "(configs/cv_vae.py:sd3), or "
        "the saved config.json of a run",
    )  # fmt: skip
    add_set_argument(parser)


def add_pod_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add `--topology`, `--slices` and `--bucket` (parsed as `buckets`)."""
    parser.add_argument(
        "--topology", required=required, metavar="CHIP:SHAPE",
        help="TPU topology of one slice: v5e:16x16, v5p:4x4x8, v6e:16x16, ..."
        + ("" if required else "; the attached devices if omitted"),
    )  # fmt: skip
    parser.add_argument("--slices", type=number(Count), default=1, metavar="N", help="number of such TPU slices")
    parser.add_argument(
        "--bucket", dest="buckets", action="append", default=[], metavar="VIEWSxFRAMESxHEIGHTxWIDTH",
        help="only this batch shape of data.buckets (repeatable)",
    )  # fmt: skip


def check_foreign(parsed: argparse.Namespace, options: Sequence[argparse.Action], needed: str) -> None:
    """Check that options of another form of the command were not given.

    Args:
      parsed: the parsed arguments.
      options: those that need `needed`.
      needed: for the message: "RUN".

    Raises:
      ValueError: one of them differs from its default; the message names all of those.
    """
    given = [action.option_strings[0] for action in options if getattr(parsed, action.dest) != action.default]
    if given:
        raise ValueError(f"{', '.join(given)}: only valid with {needed}.")


def experiment_of(parsed: argparse.Namespace) -> "Experiment":
    """The experiment that CONFIG and `--set` describe, validated."""
    from jvgen.training.experiment import load_experiment

    return load_experiment(parsed.config, parsed.assignments)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run of several processes, which `join_processes` reads, and `--restart-code`."""
    group = parser.add_argument_group(
        "options for several processes",
        "All three or none of the first: without them Slurm, Open MPI, Cloud TPUs and Kubernetes are detected.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="address at which process 0 listens and the others find it (also JVGEN_COORDINATOR)",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=number(Count), metavar="N",
        help="number of processes (also JVGEN_PROCESSES); 1 for a process of its own, without detection",
    )  # fmt: skip
    group.add_argument(
        "--process-id",
        type=number(CountOrZero),
        metavar="I",
        help="number of this process, from 0 (also JVGEN_PROCESS_ID)",
    )
    group.add_argument(
        "--restart-code", metavar="CODE",
        help="exit code that asks the launcher to start the same command again (also JVGEN_RESTART_CODE; default: 75)",
    )  # fmt: skip


def join_processes(parsed: argparse.Namespace) -> None:
    """Join the other processes of a run, if there are any, as the arguments of `add_process_arguments` say.

    Raises:
      ConfigError: numbers that are incomplete or impossible.
      LostProcess: the coordinator cannot be reached.
    """
    from jvgen import exit_codes
    from jvgen.config import ConfigError
    from jvgen.parallel import processes

    try:
        if parsed.restart_code is not None:
            exit_codes.parse_restart_code(parsed.restart_code, "--restart-code")
            os.environ[exit_codes.RESTART_CODE_VARIABLE] = parsed.restart_code
        exit_codes.restart_code()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    processes.initialize(parsed.coordinator, parsed.processes, parsed.process_id)


def check_output(flag: str, out: "Path", *, folder: bool = False) -> None:
    """Raise `ValueError` before long work rather than after it, if results cannot be written to a file (or folder)."""
    if out.exists() and out.is_dir() != folder:
        raise ValueError(f"{flag} {out}: this is a {'file; name a folder' if folder else 'folder; name a file'}.")
    above = next((parent for parent in out.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{flag} {out}: {above} is a file, so no folder can be created there.")


def add_run_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> list[argparse.Action]:
    """Add RUN, `--ema` and `--step`; returns the last two, which need a run."""
    parser.add_argument(
        "run", type=path, nargs="?" if optional else None, metavar="RUN",
        help="run directory (what `jvgen train --workdir` wrote), or one checkpoint of it, RUN/checkpoints/STEP",
    )  # fmt: skip
    return add_checkpoint_arguments(parser)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add `--ema` and `--step`: which parameters of a run are loaded."""
    return [
        parser.add_argument(
            "--ema", default="best", metavar="DECAY|raw|best",
            help="which parameters to load: the EMA with this decay, the raw ones, or best, which is the EMA with the "
            "largest decay that the run keeps and raw if it keeps none",
        ),
        parser.add_argument(
            "--step", type=number(Step), metavar="STEP",
            help="training step of the checkpoint; the latest valid one if omitted",
        ),
    ]  # fmt: skip


def add_variant_argument(parser: Any) -> argparse.Action:
    """Add `--variant`: which files of a folder of weights are read."""
    return parser.add_argument(
        "--variant", metavar="NAME",
        help="read the files of this variant, as diffusers and transformers name them (model.fp16.safetensors): fp16, "
        "bf16; those without a variant if omitted",
    )  # fmt: skip


def add_coder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the VAE that encodes or decodes files, and how much of a video it takes at a time."""
    parser.add_argument(
        "--vae", type=path, required=True, metavar="DIR", help="exported folder of an image or video VAE"
    )
    add_variant_argument(parser)
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--chunk-frames", type=number(Frames), default=16, metavar="N",
        help="video frames that pass through the network at once: fewer take less memory and more time; networks "
        "with a fixed chunk size ignore it",
    )  # fmt: skip
    parser.add_argument(
        "--compute-dtype", choices=["float32", "bfloat16"], default="float32",
        help="dtype of parameters and activations; bfloat16 halves their memory",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
