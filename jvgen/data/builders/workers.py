"""Calls a function for many payloads, in threads or processes, in order. A payload for which a process dies, or that
does not end in time, costs itself only."""

import collections
import concurrent.futures
import faulthandler
import itertools
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from jvgen.data.builders.jobs import BuildError, Corrupt, attempt

_CHUNKS_IN_FLIGHT = 4  # per worker
_CHUNK = 4  # payloads sent to a process at once
# Bytes of results of threads that wait to be taken, or are being made.
_MOST_AHEAD = 4 << 30
_DIED = "ended the process that read it (a crash of a library, or not enough memory)"
_GIVEN_UP = "given up after {:g} s: reading it takes longer (raise --file-timeout), or hangs"


def in_order(
    make: Callable[[Any], Any],
    payloads: Iterable[Any],
    workers: int,
    processes: bool,
    limit: float | None = None,
    large: bool = False,
) -> Iterator[Any]:
    """What `attempt` returns for each payload, in order, with a bounded number of results in memory.

    Args:
      make: picklable, with `processes`.
      payloads: read as they are needed.
      workers: calls at a time; 1 calls it in this thread.
      processes: use processes rather than threads.
      limit: seconds after which a payload is given up. A process is ended then; a thread is left to itself, which helps
        where a library that hangs lets others run meanwhile.
      large: results may have hundreds of megabytes (`nbytes`): threads wait for the size of the first.
    """
    if processes and workers > 1:
        yield from _in_processes(make, iter(payloads), workers, limit)
    elif workers <= 1 and limit is None:
        for payload in payloads:
            yield attempt(make, payload)
    else:
        yield from _in_threads(make, iter(payloads), max(1, workers), limit, large)


def _in_threads(
    make: Callable[[Any], Any], payloads: Iterator[Any], workers: int, limit: float | None, large: bool
) -> Iterator[Any]:
    calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
    ahead_of = _Ahead(unknown=large)
    threads = [_thread(make, calls) for _ in range(workers)]
    ahead = _CHUNKS_IN_FLIGHT * workers if workers > 1 else 1
    pending: collections.deque[_Call] = collections.deque()
    try:
        while True:
            for payload in itertools.islice(payloads, ahead - len(pending)):
                pending.append(_Call(payload, ahead_of))
                calls.put(pending[-1])
            if not pending:
                return
            call = pending.popleft()
            ahead_of.wants(call)
            if call.ended_within(limit):
                yield call.result
            else:
                threads.append(_thread(make, calls))  # in place of the one that hangs
                yield Corrupt(_GIVEN_UP.format(limit))
    finally:
        ahead_of.abandon(pending)
        for _ in threads:
            calls.put(None)


class _Ahead:
    """Holds calls back while others that are not wanted yet have, or will have, too many bytes of results.

    A call that runs is counted with the largest result so far: of one per CPU, there may be hundreds.
    """

    def __init__(self, unknown: bool) -> None:
        self._changed = threading.Condition()
        self._bytes = 0
        # None before there was one: then only the call whose result is wanted runs.
        self._largest: int | None = None if unknown else 0

    def admit(self, call: "_Call") -> bool:
        """Wait for room; the one whose result is wanted now needs none. False if it is not wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: call.wanted or call.abandoned or self._has_room())
            if not call.wanted:
                self._count(call, self._largest or 0)
            return not call.abandoned

    def put(self, call: "_Call", result: Any) -> None:
        """Keep a result until it is wanted."""
        with self._changed:
            call.result = result
            size = getattr(result, "nbytes", 0)
            if not isinstance(result, Corrupt):
                self._largest = max(size, self._largest or 0)
            self._count(call, 0 if call.wanted else size)

    def wants(self, call: "_Call") -> None:
        """Its result is taken as soon as it is there."""
        with self._changed:
            call.wanted = True
            self._count(call, 0)

    def abandon(self, calls: Iterable["_Call"]) -> None:
        """Do not begin these."""
        with self._changed:
            for call in calls:
                call.abandoned = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._largest is not None and self._bytes + self._largest <= _MOST_AHEAD

    def _count(self, call: "_Call", size: int) -> None:
        self._bytes += size - call.bytes
        call.bytes = size
        self._changed.notify_all()


class _Call:
    """A payload for a thread, and what became of it."""

    def __init__(self, payload: Any, ahead: _Ahead):
        self.payload = payload
        self.result: Any = None
        self.abandoned = self.wanted = False
        self.bytes = 0
        self._ahead = ahead
        self._began: float | None = None
        self._ended = threading.Event()

    def run(self, make: Callable[[Any], Any]) -> None:
        if not self._ahead.admit(self):
            return
        self._began = time.monotonic()
        try:
            self._ahead.put(self, attempt(make, self.payload))
        except BaseException as error:  # raised where it is waited for
            self.result = error
        self._ended.set()

    def ended_within(self, limit: float | None) -> bool:
        """Wait for it; raises what ends the build."""
        while not self._ended.wait(None if limit is None else self._left(limit)):
            if self._left(limit) <= 0:
                return False
        if isinstance(self.result, BaseException):
            raise self.result
        return True

    def _left(self, limit: float) -> float:
        """Seconds; calls are begun in order, so the one that is waited for has a thread soon."""
        return limit if self._began is None else max(0.0, limit - (time.monotonic() - self._began))


def _thread(make: Callable[[Any], Any], calls: "queue.SimpleQueue[_Call | None]") -> threading.Thread:
    def run() -> None:
        while (call := calls.get()) is not None:
            call.run(make)

    # One that hangs does not keep the process from ending.
    thread = threading.Thread(target=run, name="build", daemon=True)
    thread.start()
    return thread


def _in_processes(
    make: Callable[[Any], Any], payloads: Iterator[Any], workers: int, limit: float | None
) -> Iterator[Any]:
    pool = _Pool(make, workers, limit)
    pending: collections.deque[tuple[list[Any], concurrent.futures.Future]] = collections.deque()
    try:
        while True:
            while len(pending) < _CHUNKS_IN_FLIGHT * workers and (chunk := list(itertools.islice(payloads, _CHUNK))):
                pending.append((chunk, pool.submit(chunk)))
            if not pending:
                return
            chunk, future = pending.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:
                # Which of the chunks in flight it was is not known. This one is made file by file, the others again.
                pool.close()
                results = _one_by_one(make, chunk, limit)
                pool = _Pool(make, workers, limit)
                pending = collections.deque((waiting, pool.submit(waiting)) for waiting, _ in pending)
            yield from results
    finally:
        pool.close()


def _one_by_one(make: Callable[[Any], Any], chunk: list[Any], limit: float | None) -> list[Any]:
    results = []
    pool = _started(make, limit)
    try:
        for payload in chunk:
            began = time.monotonic()
            try:
                results += pool.submit([payload]).result()
            except BrokenProcessPool:
                late = limit is not None and time.monotonic() - began >= limit
                results.append(Corrupt(_GIVEN_UP.format(limit) if late else _DIED))
                pool.close()
                pool = _started(make, limit)
    finally:
        pool.close()
    return results


def _started(make: Callable[[Any], Any], limit: float | None) -> "_Pool":
    """A process that runs: what ends before it has a payload is not the payload's fault."""
    pool = _Pool(make, 1, limit)
    try:
        pool.submit([]).result()
    except BrokenProcessPool as error:
        pool.close()
        raise BuildError(
            "processes that read files end when they start. A script that builds a data set calls the builder under "
            "`if __name__ == '__main__':`, since they import it; or use workers = 1."
        ) from error
    return pool


class _Pool:
    """Processes that have the function."""

    def __init__(self, make: Callable[[Any], Any], workers: int, limit: float | None):
        # A fork would copy locks held by threads of imported libraries.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_receive, initargs=(make, limit)
        )

    def submit(self, chunk: list[Any]) -> concurrent.futures.Future:
        try:
            return self._pool.submit(_attempt_all, chunk)
        except BrokenProcessPool as error:
            future: concurrent.futures.Future = concurrent.futures.Future()
            future.set_exception(error)
            return future

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


_make: Callable[[Any], Any] | None = None  # of a worker process
_limit: float | None = None


def _receive(make: Callable[[Any], Any], limit: float | None) -> None:
    global _make, _limit
    _make, _limit = make, limit


def _attempt_all(chunk: list[Any]) -> list[Any]:
    if _limit is None:
        return [attempt(_make, payload) for payload in chunk]
    results = []
    with open(os.devnull, "w") as nowhere:
        for payload in chunk:
            # It ends the process from a thread of its own, without Python: whatever hangs, and wherever.
            faulthandler.dump_traceback_later(_limit, exit=True, file=nowhere)
            try:
                results.append(attempt(_make, payload))
            finally:
                faulthandler.cancel_dump_traceback_later()
    return results
