"""Which kernel each kind of call takes, and why: collected while a program is traced, for its log and its reports."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel computes on one device.

    Attributes:
      operation: "attention" or "epipolar attention".
      kernel: name of the one that runs.
      dtype: of the inputs.
      width: channels of a head.
      queries, keys: tokens.
      valid: keys that are not padding.
      scale: on the scores.
      causal: whether query i sees keys 0..i only.
      ring: devices between which keys go around, so that the kernel attends to some of them at a time; 1 for none.
        Lengths are then those of a device, the last one that has valid keys.
    """

    operation: str
    kernel: str
    dtype: str
    width: int
    queries: int
    keys: int
    valid: int
    scale: float
    causal: bool = False
    ring: int = 1

    def __str__(self) -> str:
        keys = f"{self.keys} keys" if self.valid == self.keys else f"{self.valid} of {self.keys} keys"
        kind = " before each query" * self.causal + f" on each of a ring of {self.ring}" * (self.ring > 1)
        what = f"{self.queries} queries over {keys}{kind}, heads of {self.width} in {self.dtype}"
        return f"kernel {self.kernel} of {self.operation}, {what}"


class KernelReport:
    """The kernels of one or several programs, one line per kind of call, in the order in which tracing meets them.

    Args:
      log: takes each line when it is new; None to keep them only.
      on_call: takes what a kernel computes on one device when it is new; None to keep it only.

    Attributes:
      lines: as "attention of 2x17920x30x64 over 17920 keys in bfloat16: kernel tpu (TPU devices)".
      calls: what kernels compute on one device.
    """

    def __init__(self, log: Callable[[str], None] | None = None, on_call: Callable[[Call], None] | None = None):
        self.lines: list[str] = []
        self.calls: list[Call] = []
        self._log, self._on_call = log, on_call

    def add(self, line: str) -> None:
        """Append a line, unless it is there."""
        if line not in self.lines:
            self.lines.append(line)
            if self._log is not None:
                self._log(line)

    def add_call(self, call: Call) -> None:
        """Append what a kernel computes, unless it is there."""
        if call not in self.calls:
            self.calls.append(call)
            if self._on_call is not None:
                self._on_call(call)


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
    """Context that prints the kernels of programs when they are traced, each kind of call once.

    Kernels for accelerators are run once on a device before the program is, see `jvgen.nn.kernel_check.verify`.
    """

    def say(line: str) -> None:
        print(f"kernels: {line}", flush=True)

    def verify(call: Call) -> None:
        from jvgen.nn import kernel_check

        kernel_check.verify(call, say)

    return collecting(KernelReport(say, verify))


def note(shape: tuple[int, ...], keys: str, reason: str, call: Call) -> None:
    """Add a call to the report of the enclosing context; nothing outside of one.

    Args:
      shape: of the queries of all devices.
      keys: number of keys of all devices and what limits them, in words.
      reason: why the kernel was chosen, and what refused faster ones.
      call: what it computes on one device.
    """
    report = _current.get()
    if report is not None:
        sizes = "x".join(map(str, shape))
        report.add(f"{call.operation} of {sizes} over {keys} in {call.dtype}: kernel {call.kernel} ({reason})")
        report.add_call(call)
