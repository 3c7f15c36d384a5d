"""Which kernel each kind of call takes, and why: collected while a program is traced, for its log and its reports."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import numpy as np


class KernelReport:
    """The kernels of one or several programs, one line per kind of call, in the order in which tracing meets them.

    Args:
      log: takes each line when it is new; None to keep them only.

    Attributes:
      lines: as "attention of 2x17920x30x64 over 17920 keys in bfloat16: kernel tpu (TPU devices)".
    """

    def __init__(self, log: Callable[[str], None] | None = None):
        self.lines: list[str] = []
        self._log = log

    def add(self, line: str) -> None:
        """Append a line, unless it is there."""
        if line not in self.lines:
            self.lines.append(line)
            if self._log is not None:
                self._log(line)


_current: contextvars.ContextVar[KernelReport | None] = contextvars.ContextVar("kernel_report", default=None)


@contextlib.contextmanager
def collecting(report: KernelReport) -> Iterator[KernelReport]:
    """Within this context, on this thread, calls that are traced add their kernels to the report."""
    token = _current.set(report)
    try:
        yield report
    finally:
        _current.reset(token)


def announced() -> contextlib.AbstractContextManager[KernelReport]:
    """Context that prints the kernels of programs when they are traced, each kind of call once."""
    return collecting(KernelReport(lambda line: print(f"kernels: {line}", flush=True)))


def note(operation: str, shape: tuple[int, ...], keys: str, dtype: np.dtype, kernel: str, reason: str) -> None:
    """Add a call to the report of the enclosing context; nothing outside of one.

    Args:
      operation: "attention" or the like.
      shape: of the queries of all devices.
      keys: number of keys and what limits them, in words.
      dtype: of the inputs.
      kernel: name of the one that runs.
      reason: why it was chosen, and what refused faster ones.
    """
    report = _current.get()
    if report is not None:
        sizes = "x".join(map(str, shape))
        report.add(f"{operation} of {sizes} over {keys} in {dtype.name}: kernel {kernel} ({reason})")
