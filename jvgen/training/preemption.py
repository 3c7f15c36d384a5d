"""Requests to stop, noticed at any moment from the first second of the process and obeyed by all processes together.

Imports nothing heavy: the command installs the handlers before it imports JAX.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from jvgen import exit_codes

_EVENT = "stop"


class StopRequested(Exception):
    """The run was asked to stop before its first step: there is nothing to save."""


class Preemption:
    """Context in which SIGTERM and SIGINT ask the run to save and stop instead of killing the process.

    Before `begin_steps` there is nothing to save: with `leave` the process (and with it the others of the run) ends at
    once with the restart code, whatever it is doing; without, `check` raises. From then on the loop asks `requested`
    at every point where it can stop. With several processes a signal to one of them counts for all, and they stop at
    the same point. A second SIGINT interrupts immediately.

    A signal is noticed by a thread, through a pipe to which Python's C code writes: Python's own handlers run on the
    main thread, which may be compiling for minutes.

    Args:
      leave: end the process before the first step; for commands, not for programs that call `train`.
    """

    def __init__(self, leave: bool = False) -> None:
        self._leave = leave
        self._signal: int | None = None
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}
        self._previous_wakeup: int | None = None
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        # Held while the processes agree on a point, so that none passes it.
        self._lock = threading.RLock()
        self._starting = True
        # Calls of `requested`, and the call at which all processes stop.
        self._points = 0
        self._stop_at: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.write(self._pipe[1], b"\0")
            self._thread.join()
            for end in self._pipe:
                os.close(end)

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def join_processes(self) -> None:
        """Take part in the agreement of several processes. Call it after they were initialized, on the main thread."""
        from jvgen.parallel import processes

        if processes.count() > 1:
            # JAX's coordination service installed a handler of its own, which knows only steps.
            self._install()
            processes.subscribe(_EVENT, self._on_announced)

    def check(self) -> None:
        """Raise `StopRequested` if a stop was requested before the first step."""
        if self._starting and self._signal is not None:
            raise StopRequested(self.reason)

    def begin_steps(self) -> None:
        """From now on there may be steps to save: requests wait for `requested`.

        Raises:
          StopRequested: a stop was requested before.
        """
        with self._lock:
            self.check()
            self._starting = False

    def requested(self) -> bool:
        """Whether to stop here. All processes call it at the same points of the loop and get the same answers."""
        with self._lock:
            if self._signal is not None and self._single():
                return True
            if self._stop_at is not None and self._points + 1 >= self._stop_at:
                return True
            self._points += 1
            return False

    @property
    def reason(self) -> str:
        """Name of the signal, and of the process that got it if there are several."""
        if self._reason is not None:
            return self._reason
        return signal.Signals(self._signal).name if self._signal is not None else "a request to stop"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _watch(self) -> None:
        while True:
            [number] = os.read(self._pipe[0], 1)
            if number == 0:
                return
            if number in (signal.SIGTERM, signal.SIGINT):
                self._signal = number
                self._pass_on(signal.Signals(number).name)

    def _pass_on(self, name: str) -> None:
        with self._lock:
            if self._starting and self._leave:
                self._end_now(name)
        processes = sys.modules.get("jvgen.parallel.processes")
        if processes is not None and not self._starting and processes.count() > 1:
            processes.announce(_EVENT, {"process": processes.index(), "signal": name})

    def _end_now(self, reason: str) -> None:
        code = exit_codes.restart_code()
        try:
            message = f"{reason} before the first step: nothing to save, exit code {code}"
            print(f"jvgen: {message}", file=sys.stderr, flush=True)
            # It may be half imported at this moment.
            abort: Callable[..., None] | None = getattr(sys.modules.get("jvgen.parallel.failing"), "abort", None)
            if abort is not None:
                abort(code, message)
        finally:
            os._exit(code)

    def _on_announced(self, message: dict[str, Any]) -> None:
        """Another process, or this one, was asked to stop. Called by the thread that listens for announcements."""
        self._reason = f"{message['signal']} of process {message['process']}"
        with self._lock:
            if self._starting and self._leave:
                self._end_now(self._reason)
            if self._starting:
                self._signal = getattr(signal, message["signal"])
        if not self._starting:
            # On a thread of its own: the listener has to notice a process that fails meanwhile.
            threading.Thread(target=self._agree, name="preemption agreement", daemon=True).start()

    def _agree(self) -> None:
        """Stop all processes at the first point that none of them has passed."""
        from jvgen.parallel import processes

        with self._lock, contextlib.suppress(processes.LostProcess):
            self._stop_at = processes.combine(self._points, max, "point at which to stop") + 1

    def _single(self) -> bool:
        processes = sys.modules.get("jvgen.parallel.processes")
        return processes is None or processes.count() == 1
