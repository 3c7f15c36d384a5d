"""Exit codes of the `jvgen` command: one table for the code, the documentation and the launch files."""

import dataclasses
import errno
import os
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent

# Overrides the code that asks a launcher to start the same command again.
RESTART_CODE_VARIABLE = "JVGEN_RESTART_CODE"

DONE = 0
ERROR = 1
USER_ERROR = 2
DIVERGED = 65  # EX_DATAERR of sysexits.h
UNSAVED = 74  # EX_IOERR
DEFAULT_RESTART = 75  # EX_TEMPFAIL


@dataclasses.dataclass(frozen=True)
class ExitCode:
    """One row of the table.

    Attributes:
      code: exit status of the process.
      name: for messages and launch files.
      meaning: when a process ends with it.
      restart: whether a launcher should start the same command again.
    """

    code: int
    name: str
    meaning: str
    restart: bool


TABLE = (
    ExitCode(DONE, "done", "finished, or `--stop-after` reached", False),
    ExitCode(ERROR, "error", "an unexpected error: the traceback is in `errors/process_N.txt`, or printed", False),
    ExitCode(USER_ERROR, "user error", "a mistake in config, data or arguments; the message names it", False),
    ExitCode(
        DIVERGED,
        "diverged",
        "too many steps were skipped, or the state, or what was made for a file, holds NaN or infinity",
        False,
    ),
    ExitCode(UNSAVED, "unsaved", "checkpoints could not be written (a full disk, lost permissions)", False),
    ExitCode(
        DEFAULT_RESTART,
        "restart",
        "told to stop and saved, a lost process, a hang, a GPU whose memory or link failed, or a storage error that "
        "may pass",
        True,
    ),
    ExitCode(134, "aborted", "JAX or a driver aborted (SIGABRT), for example because process 0 died", True),
    ExitCode(
        137, "killed", "killed (SIGKILL), by the system for memory or by a scheduler after its grace period", True
    ),
    ExitCode(143, "terminated", "ended by SIGTERM before Python ran", True),
)
# A launcher that restarts on every other code does what the table says.
NO_RESTART = tuple(row.code for row in TABLE if not row.restart)


def restart_code() -> int:
    """The code that asks for a restart: 75, or what the environment variable `JVGEN_RESTART_CODE` says.

    Raises:
      ValueError: the variable is not a number from 1 to 255, or a code of the table that is not restarted.
    """
    text = os.environ.get(RESTART_CODE_VARIABLE)
    return DEFAULT_RESTART if not text else parse_restart_code(text, RESTART_CODE_VARIABLE)


def parse_restart_code(text: str, source: str) -> int:
    """Read a restart code; raises `ValueError` naming `source` if it is none."""
    taken = ", ".join(str(code) for code in NO_RESTART)
    code = int(text) if text.isdecimal() and len(text) <= 3 else 0
    if not 1 <= code <= 255 or code in NO_RESTART:
        raise ValueError(
            f"{source} = {text!r}: a number from 1 to 255 other than {taken}, which mean that a restart does not help; "
            f"for example {DEFAULT_RESTART}, or 42 for launchers that restart only 42 and 127-255."
        )
    return code


def markdown() -> str:
    """The table of docs/resume.md."""
    rows = [f"| {row.code} | {row.name} | {'yes' if row.restart else 'no'} | {row.meaning} |" for row in TABLE]
    return "\n".join(["| exit code | name | restart | meaning |", "|---|---|---|---|", *rows])


# Storage and network errors that may pass: a mounted bucket or a file server that was away for a moment.
_PASSING = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ENETUNREACH",
                 "EHOSTUNREACH", "ENETDOWN", "EHOSTDOWN", "EREMOTEIO", "EAGAIN", "ENOTCONN")
    if hasattr(errno, name)
)  # fmt: skip


# What CUDA says of hardware that failed: by the table of errors of its driver.
_FAILED_CHIP = ("uncorrectable ECC error", "uncorrectable NVLink error")


def is_failed_chip(error: BaseException) -> bool:
    """Whether a GPU's hardware failed, not the program on it."""
    named = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return named and any(words in str(error) for words in _FAILED_CHIP)


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def of_error(error: BaseException) -> int:
    """The exit code for an exception that ends a process.

    jvgen's own exceptions have it as their attribute `exit_code`. Of the others a missing or forbidden file is a user's
    mistake, and so are a `ValueError` and an `ImportError` (of an extra that is not installed) that jvgen raises; a
    full disk is "unsaved", failed hardware, storage and network errors that may pass ask for a restart, and the rest
    is 1.
    """
    if hasattr(error, "exit_code"):
        return error.exit_code
    if is_failed_chip(error):
        return restart_code()
    if isinstance(error, OSError):
        if is_full(error):
            return UNSAVED
        if error.errno in _PASSING or isinstance(error, (TimeoutError, ConnectionError)):
            return restart_code()
        if error.filename is not None:
            return USER_ERROR
    return USER_ERROR if isinstance(error, (ValueError, ImportError)) and _of_jvgen(error) else ERROR


def _of_jvgen(error: ValueError | ImportError) -> bool:
    """Whether the class of this error is jvgen's, or a `raise` statement of jvgen made it, rather than a library.

    jvgen raises ValueError with a message for users; JAX, Orbax and NumPy raise it for mistakes in the program.
    """
    # Errors of worker processes are raised again by the library that runs them.
    if type(error).__module__.split(".")[0] == PACKAGE.name:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    return Path(frames[-1].filename).is_relative_to(PACKAGE) and (frames[-1].line or "").startswith("raise")
