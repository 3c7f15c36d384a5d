"""The `jvgen` command: builds the parser of all sub-commands, runs one and reports its errors."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from jvgen import __version__, exit_codes
from jvgen.cli import check as checking
from jvgen.cli import compile as compiling
from jvgen.cli import configs, data, demo, evaluate, launch, plan, play, sample, train, vae, weights
from jvgen.cli.arguments import HelpFormatter
from jvgen.nn import kernel_report
from jvgen.parallel import libtpu
from jvgen.versions import git_commit

DESCRIPTION = "Pretrain video generators at pod scale: train, resume, sample, evaluate, export to PyTorch."
# In the order of `jvgen --help`.
FAMILIES = (demo, data, configs, checking, compiling, launch, train, sample, evaluate, play, plan, vae, weights)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `jvgen` command and return its exit code (see `jvgen.exit_codes`).

    Users' mistakes and other named errors are shown as their message. Everything else is raised, and so printed with
    its traceback; one line is shown if that is in the error file of a run directory.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if parsed.command != "launch":  # which touches no device, and may hand its environment to a job on other machines
        libtpu.silence_without_tpu(os.environ)
    try:
        # What training compiles on other threads and what `check` and `compile` trace goes to their own reports.
        with kernel_report.announced():
            return parsed.handler(parsed) or 0
    except Exception as error:
        code = exit_codes.of_error(error)
        recorded = getattr(error, "recorded", None) is not None
        if os.environ.get("JVGEN_TRACEBACK") or (code == exit_codes.ERROR and not recorded):
            raise
        if code == exit_codes.ERROR:
            from jvgen.parallel.failing import describe_error

            print(describe_error(error, f"jvgen {parsed.command}: "), file=sys.stderr)
            return code
        print(f"jvgen {parsed.command}: {_told(error)}", file=sys.stderr)
        print("(set JVGEN_TRACEBACK=1 for the traceback)", file=sys.stderr)
        return code


def _told(error: Exception) -> str:
    # Python's words, "[Errno 17] File exists", leave open what is wrong with an output folder.
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename is not None:
        return f"{error.filename}: a folder is needed there, and it or a part of it is a file. Give another path."
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="jvgen", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the versions of jvgen and JAX and the git commit, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in FAMILIES:
        family.add_commands(commands)
    return parser


class _Version(argparse.Action):
    """Prints, for example, "jvgen 0.2.0 (git 0123456789ab, JAX 0.8.0)" and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        commit = git_commit()
        short = f"git {commit[:12]}{commit[40:]}, " if commit else ""  # the last is the "+" of a changed checkout
        print(f"jvgen {__version__} ({short}JAX {metadata.version('jax')})")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
