"""Calls a function for many payloads, in threads or processes, in order; a process that dies costs its payload only."""

import collections
import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from jvgen.data.builders.jobs import BuildError, Corrupt, attempt

_CHUNKS_IN_FLIGHT = 4  # per worker
_CHUNK = 4  # payloads sent to a process at once
_DIED = "ended the process that read it (a crash of a library, or not enough memory)"


def in_order(make: Callable[[Any], Any], payloads: Iterable[Any], workers: int, processes: bool) -> Iterator[Any]:
    """What `attempt` returns for each payload, in order, with a bounded number of results in memory.

    Args:
      make: picklable, with `processes`.
      payloads: read as they are needed.
      workers: calls at a time; 1 calls it in this thread.
      processes: use processes rather than threads.
    """
    if processes and workers > 1:
        yield from _in_processes(make, iter(payloads), workers)
    elif workers <= 1:
        for payload in payloads:
            yield attempt(make, payload)
    else:
        payloads = iter(payloads)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            pending = collections.deque(
                pool.submit(attempt, make, p) for p in itertools.islice(payloads, _CHUNKS_IN_FLIGHT * workers)
            )
            try:
                while pending:
                    yield pending.popleft().result()
                    pending.extend(pool.submit(attempt, make, p) for p in itertools.islice(payloads, 1))
            finally:
                for future in pending:
                    future.cancel()


def _in_processes(make: Callable[[Any], Any], payloads: Iterator[Any], workers: int) -> Iterator[Any]:
    pool = _Pool(make, workers)
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
                results = _one_by_one(make, chunk)
                pool = _Pool(make, workers)
                pending = collections.deque((waiting, pool.submit(waiting)) for waiting, _ in pending)
            yield from results
    finally:
        pool.close()


def _one_by_one(make: Callable[[Any], Any], chunk: list[Any]) -> list[Any]:
    results = []
    pool = _started(make)
    try:
        for payload in chunk:
            try:
                results += pool.submit([payload]).result()
            except BrokenProcessPool:
                results.append(Corrupt(_DIED))
                pool.close()
                pool = _started(make)
    finally:
        pool.close()
    return results


def _started(make: Callable[[Any], Any]) -> "_Pool":
    """A process that runs: what ends before it has a payload is not the payload's fault."""
    pool = _Pool(make, 1)
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

    def __init__(self, make: Callable[[Any], Any], workers: int):
        # A fork would copy locks held by threads of imported libraries.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_receive, initargs=(make,)
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


def _receive(make: Callable[[Any], Any]) -> None:
    global _make
    _make = make


def _attempt_all(chunk: list[Any]) -> list[Any]:
    return [attempt(_make, payload) for payload in chunk]
