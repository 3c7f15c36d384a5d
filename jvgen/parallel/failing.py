"""What happens when one process of a run fails: it says why, all end within seconds, and with one exit code."""

import contextlib
import datetime
import faulthandler
import os
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from jvgen import __version__, exit_codes
from jvgen.parallel.processes import announce, announced, count, index, note, notes, subscribe
from jvgen.storage import Path, Retries, read_text, write_text

# Seconds for which process 0 waits until the others have seen that it fails: when it ends, JAX aborts them.
ABORT_SECONDS = 3.0
# Seconds that the functions of `before_exit` may take.
LEAVE_SECONDS = 10.0
# What errors of collectives say when another process is gone: of JAX's store, gloo and NCCL (its sockets, its
# InfiniBand and what XLA makes of either).
_LOST = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "onnection reset", "onnection closed", "Gloo",
    "remote process exited", "ncclRemoteError", "ncclSystemError", "unhandled system error",
)  # fmt: skip
# The event by which a process tells the others.
EVENT = "abort"

# What an error file says of the run, beside versions and the command.
_facts: dict[str, str] = {}
_before_exit: list[Callable[[], None]] = []
_aborting = threading.Lock()


@contextlib.contextmanager
def before_exit(function: Callable[[], None]) -> Iterator[None]:
    """Have a quick function called if the process is ended by `abort` while the body runs."""
    _before_exit.append(function)
    try:
        yield
    finally:
        _before_exit.remove(function)


@contextlib.contextmanager
def fail_fast(workdir: Path | None = None) -> Iterator[None]:
    """Context in which an exception ends all processes of the run within seconds.

    The traceback is written to `workdir/errors/process_N.txt`; where that is, is kept as the exception's `recorded`
    (None if it could not be written). With one process the exception is raised on. With several it is told, the others
    are told, and all end with the same code: waiting for the others, as Python would at its end, would take minutes,
    because they wait for this process.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not hasattr(error, "recorded"):
            error.recorded = None
            error.recorded = record_error(error, workdir)
        if count() > 1:
            _print_error(error)
            abort(code_of(error), f"{type(error).__name__}: {error}")
        raise


def code_of(error: BaseException) -> int:
    """The exit code for an exception; errors of a lost connection count as a lost process if there are several."""
    code = exit_codes.of_error(error)
    if code == exit_codes.ERROR and count() > 1 and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return exit_codes.restart_code() if any(word in str(error) for word in _LOST) else code
    return code


def _print_error(error: BaseException) -> None:
    prefix = f"jvgen: process {index()} of {count()} ends with exit code {code_of(error)}: "
    print(describe_error(error, prefix), file=sys.stderr, flush=True)


def describe_error(error: BaseException, prefix: str) -> str:
    """What a terminal shows of an error that ends a process.

    The message of a named error; of an unexpected one its first line and the file with the traceback, or the traceback
    if there is no such file.
    """
    if exit_codes.of_error(error) != exit_codes.ERROR:
        return f"{prefix}{error}"
    file = getattr(error, "recorded", None)
    if file is None or os.environ.get("JVGEN_TRACEBACK"):
        return f"{''.join(traceback.format_exception(error))}{prefix}{type(error).__name__}: {error}"
    first = str(error).strip().partition("\n")[0]
    return f"{prefix}{type(error).__name__}: {first[:500]} (the traceback is in {file})"


def abort(code: int, reason: str, stacks: bool = False) -> NoReturn:
    """End all processes of the run with an exit code, at once and without Python's usual end.

    If another process has aborted before, its code and reason hold: this process's error is a consequence.

    Args:
      code: exit code.
      reason: for the logs of the others.
      stacks: the others print the stacks of their threads, to show where they wait.
    """
    with _aborting:
        if count() > 1:
            # What a lost connection says arrives before the news of why.
            time.sleep(0.5)
            message = {"process": index(), "code": code, "reason": reason[:2000], "stacks": stacks}
            announce(EVENT, message)
            first = announced(EVENT) or message
            if first["process"] != index():
                code = first["code"]
                _print_abort(first)
            _acknowledge()
        _leave(code)


def _obey_abort(message: dict[str, Any]) -> None:
    with _aborting:
        if message["process"] != index():
            _print_abort(message)
            if message["stacks"]:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        _acknowledge()
        _leave(message["code"])


subscribe(EVENT, _obey_abort)


def _print_abort(message: dict[str, Any]) -> None:
    print(
        f"jvgen: process {index()} of {count()} ends with exit code {message['code']}, because process "
        f"{message['process']} failed: {message['reason']}",
        file=sys.stderr,
        flush=True,
    )


def _acknowledge() -> None:
    """Note that this process knows; process 0, which runs the store, waits for the others to know."""
    note(EVENT)
    if index() == 0:
        end = time.monotonic() + ABORT_SECONDS
        while len(notes(EVENT)) < count() and time.monotonic() < end:
            time.sleep(0.05)
        # Time for them to end.
        time.sleep(0.2)


def _leave(code: int) -> NoReturn:
    def finish() -> None:
        for function in reversed(_before_exit):
            with contextlib.suppress(Exception):
                function()

    # Storage that does not answer may be why the process ends.
    finishing = threading.Thread(target=finish, name="before exit", daemon=True)
    finishing.start()
    finishing.join(LEAVE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def note_fact(name: str, value: str) -> None:
    """Have something that is known of the run written into its error files."""
    _facts[name] = value


def record_error(error: BaseException, workdir: Path | None) -> Path | None:
    """Append an exception with its traceback to `workdir/errors/process_N.txt`, as plain text; returns the file.

    A user's mistake creates no run directory, and writes nothing into a data set that was named as one. An error while
    writing is printed, and nothing more.
    """
    if workdir is None:
        return None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    jax = sys.modules.get("jax")
    text = (
        f"{now}  process {index()} of {count()} on {socket.gethostname()}, pid {os.getpid()}\n"
        f"command: {shlex.join(sys.argv)}\n"
        f"jvgen {__version__}, JAX {getattr(jax, '__version__', 'not imported')}, Python {sys.version.split()[0]}\n"
        + "".join(f"{name}: {value}\n" for name, value in _facts.items())
        + f"exit code {code_of(error)}\n{''.join(traceback.format_exception(error))}\n"
    )
    file = workdir / "errors" / f"process_{index()}.txt"
    # The others wait for this process.
    once = Retries(attempts=1)
    try:
        no_run = not workdir.exists() or workdir.is_file() or (workdir / "dataset_info.json").is_file()
        if no_run and exit_codes.of_error(error) == exit_codes.USER_ERROR:
            return None
        before = read_text(file, once) if file.exists() else ""
        # The latest errors of a run that is restarted again and again.
        write_text(file, before[-100_000:] + text, once)
    except Exception as problem:  # libraries of buckets raise their own; the error itself must not be lost
        print(f"jvgen: {file} could not be written: {problem}", file=sys.stderr)
        return None
    return file
