"""What tests of launch files share: `jvgen launch` in this process, and the configs and topologies they use."""

import contextlib
import io
import shlex
from pathlib import Path

from jvgen.cli.main import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch"
IMAGE = "us-docker.pkg.dev/project/images/jvgen:tpu"


def launch(arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `jvgen launch ARGUMENTS`, with configs found in the repository."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(["launch", *shlex.split(arguments)])
    return status, output.getvalue(), errors.getvalue()


def launch_file(arguments: str) -> str:
    """The text that `jvgen launch ARGUMENTS` prints."""
    status, output, errors = launch(arguments)
    assert status == 0, errors
    return output
