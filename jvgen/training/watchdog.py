"""A thread that notices when a step hangs and prints the stacks of all threads."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Watchdog:
    """Watches sections of the main thread for a time limit.

    Args:
      seconds: time limit of one section; 0 turns the watchdog off.
      log: file to which the stacks are appended as well.
      on_hang: called once per hang, on the watchdog thread, after the stacks were printed.
    """

    def __init__(self, seconds: float, log: Path | None = None, on_hang: Callable[[], None] | None = None):
        self.hangs = 0
        self._seconds, self._log, self._on_hang = seconds, log, on_hang
        self._since: float | None = None
        self._what = ""
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Context of one section, named in the report."""
        self._set(time.monotonic(), what)
        try:
            yield
        finally:
            self._set(None, "")

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _set(self, since: float | None, what: str) -> None:
        with self._changed:
            self._since, self._what = since, what
            self._changed.notify()

    def _watch(self) -> None:
        reported: float | None = None
        while True:
            with self._changed:
                if self._closed:
                    return
                since, what = self._since, self._what
                if since is None or since == reported:
                    self._changed.wait()
                    continue
                left = since + self._seconds - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
            reported = since
            self._report(what)

    def _report(self, what: str) -> None:
        self.hangs += 1
        line = (
            f"WATCHDOG: {what} has taken more than {self._seconds:g} s on process {os.getpid()}; stacks of all threads:"
        )
        for stream in self._streams():
            with stream as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        if self._on_hang is not None:
            self._on_hang()

    def _streams(self) -> Iterator[contextlib.AbstractContextManager]:
        if self._log is not None:
            yield self._log.open("a")
        # In a notebook or a test sys.stderr may have no file descriptor, which faulthandler needs.
        yield contextlib.nullcontext(sys.__stderr__)
