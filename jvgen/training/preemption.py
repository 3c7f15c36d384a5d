"""Requests to stop: signals with one process, an agreed step with several."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the run was saved and can resume. Launchers restart the same command on this status.
EXIT_RESTART = 75


class Preemption:
    """Context in which SIGTERM and SIGINT ask the loop to save and stop instead of killing the process.

    With several processes JAX's coordination service catches SIGTERM on any of them and makes all agree on one step;
    no handler is installed here, which would hide the signal from it. A second SIGINT interrupts immediately.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop before this step; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    @property
    def reason(self) -> str:
        """Name of the signal, or "preemption"."""
        return signal.Signals(self._signal).name if self._signal is not None else "preemption"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
