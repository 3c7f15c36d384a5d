"""A thread that notices when a part of the run hangs, and prints the stacks of all threads."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

from jvgen.storage import Path, appending

# The automatic limit: this many times the median step, and never less than the minimum.
STEPS, MINIMUM_SECONDS = 10, 600.0
# Before the first step, where programs compile and terabytes are read.
STARTUP_SECONDS = 7200.0
# Seconds that writing the stacks to the file may take.
WRITE_SECONDS = 10.0


class Watchdog:
    """Watches sections of the main thread for a time limit.

    Args:
      seconds: time limit of one section; 0 turns the watchdog off; None for the larger of 10 median steps and 10
        minutes.
      log: file to which the stacks are appended as well.
      on_hang: called once per hang with a sentence about it, on the watchdog thread, after the stacks were printed.
    """

    def __init__(self, seconds: float | None, log: Path | None = None, on_hang: Callable[[str], None] | None = None):
        self.hangs = 0
        self._seconds, self._log, self._on_hang = seconds, log, on_hang
        self._steps: deque[float] = deque(maxlen=101)
        # The innermost section is timed: what it is, its limit, and when it began or was returned to.
        self._sections: list[tuple[str, float]] = []
        self._since: float | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if seconds is None or seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def record_step(self, seconds: float) -> None:
        """Note how long a step took, for the automatic limit."""
        self._steps.append(seconds)

    def limit(self, times: float = 1.0) -> float:
        """Seconds that a section may take, which is `times` as long as a step."""
        if self._seconds is not None:
            return times * self._seconds
        return times * max(MINIMUM_SECONDS, STEPS * statistics.median(self._steps or [0.0]))

    @contextlib.contextmanager
    def watching(self, what: str, times: float = 1.0, startup: bool = False) -> Iterator[None]:
        """Context of one section, named in the report.

        Args:
          what: for the report.
          times: factor of the limit.
          startup: the section is before the first step, where the automatic limit is two hours.
        """
        limit = STARTUP_SECONDS if startup and self._seconds is None else self.limit(times)
        self._change(lambda: self._sections.append((what, limit)))
        try:
            yield
        finally:
            self._change(self._sections.pop)

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _change(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._since = time.monotonic() if self._sections else None
            self._changed.notify()

    def _watch(self) -> None:
        reported: float | None = None
        while True:
            with self._changed:
                if self._closed:
                    return
                since = self._since
                if since is None or since == reported:
                    self._changed.wait()
                    continue
                what, limit = self._sections[-1]
                left = since + limit - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
            reported = since
            self._report(what, limit)

    def _report(self, what: str, limit: float) -> None:
        self.hangs += 1
        told = f"{what} has taken more than {limit:g} s"
        line = f"WATCHDOG: {told} in the process with pid {os.getpid()}; stacks of all threads:"
        # In a notebook or a test sys.stderr may have no file descriptor, which faulthandler needs.
        _dump(line, sys.__stderr__)
        if self._log is not None:
            # Storage that does not answer may be what hangs: it must not keep `on_hang` from being called.
            writer = threading.Thread(target=_append, args=(line, self._log), name="watchdog file", daemon=True)
            writer.start()
            writer.join(WRITE_SECONDS)
        if self._on_hang is not None:
            self._on_hang(told)


def _dump(line: str, file: TextIO) -> None:
    print(line, file=file, flush=True)
    faulthandler.dump_traceback(file=file, all_threads=True)


def _append(line: str, path: Path) -> None:
    try:
        with appending(path) as file:
            _dump(line, file)
    except OSError as error:
        print(f"WATCHDOG: {path} could not be written: {error}", file=sys.__stderr__, flush=True)
