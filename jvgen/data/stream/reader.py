"""Reads one batch: looks up records by row, decodes them, and substitutes records that cannot be decoded."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jvgen.data.store.records import Record
from jvgen.data.store.shards import CorruptShard
from jvgen.data.store.sources import Source
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.plan import Plan
from jvgen.data.stream.quarantine import Failure, Quarantine, TooManyFailures
from jvgen.data.stream.transforms import Resize, load_example
from jvgen.data.video_files import DecodeError
from jvgen.storage import StorageError

Preprocess = Callable[[dict[str, Any]], dict[str, np.ndarray]]


class _Slot(NamedTuple):
    id: str
    arrays: dict[str, np.ndarray]
    substituted: bool


class BatchReader:
    """Callable: step -> this process's rows of the batch, a pure function of the step and the records.

    Picklable; every copy has its own threads.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        sources: Sequence[Source],
        preprocess: Preprocess,
        resize: Resize,
        slots: dict[BucketConfig, np.ndarray],
        threads: int,
        quarantine: Quarantine,
        quarantine_failed_reads: bool = False,
    ):
        self.plan = plan
        self.sources = tuple(sources)
        self.preprocess = preprocess
        self.resize: Resize = resize
        self.slots = slots
        self.threads = threads
        self.quarantine = quarantine
        self.quarantine_failed_reads = quarantine_failed_reads
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def __call__(self, step: int) -> dict[str, Any]:
        """`step`, `arrays` stacked over the slots of this process, `record_ids`, `substitutes`.

        Raises:
          TooManyFailures: no substitute is left, or the error budget is exhausted.
          ValueError: `preprocess` returned arrays of different names, shapes or dtypes.
        """
        planned = self.plan.at(step)
        source, row = planned.source.tolist(), planned.row.tolist()
        threads = self._threads()
        pending = [
            threads.submit(self._read, step, slot, planned.bucket, source[slot], row[slot])
            for slot in self.slots[planned.bucket].tolist()
        ]
        try:
            slots = [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()
        return {
            "step": step,
            "arrays": _stack(slots, planned.bucket),
            "record_ids": [slot.id for slot in slots],
            "substitutes": sum(slot.substituted for slot in slots),
        }

    def close(self) -> None:
        """Shut down the threads after their current clips. A closed reader cannot be used again; its copies can."""
        with self._lock:
            self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int, slot: int, bucket: BucketConfig, source: int, row: int) -> _Slot:
        attempt = 0
        while True:
            spec = self.plan.sample_spec(step, slot, attempt, source, row)
            try:
                record = _record(self.sources[source], row, self.quarantine_failed_reads)
                example = load_example(record, spec, bucket, self.resize)
            except DecodeError as error:
                failure = self._failure(step, slot, source, row, error)
            else:
                self.quarantine.succeeded()
                return _Slot(record.id, self.preprocess(example), attempt > 0)
            self.quarantine.failed(failure)
            attempt += 1
            place = self.plan.substitute(step, slot, attempt)
            if place is None:
                raise TooManyFailures(
                    f"no record of the kind and source of {failure.id} ({failure.source}) that fits bucket "
                    f"{bucket.name} can be decoded; last error: {failure.error}"
                )
            source, row = place

    def _failure(self, step: int, slot: int, source: int, row: int, error: DecodeError) -> Failure:
        config = self.plan.sources[source]
        return Failure(
            step=step,
            slot=slot,
            source=f"{config.path} [{config.split}]",
            row=row,
            id=str(self.sources[source].index.id[row]),
            error=str(error),
            data=self.sources[source].index.digest,
        )

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise RuntimeError("the reader is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="jvgen-read")
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_pool": None, "_closed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _record(source: Source, row: int, quarantine_failed_reads: bool) -> Record:
    try:
        return source.read(row)
    except StorageError as error:
        if not quarantine_failed_reads:
            raise
        raise DecodeError(str(error)) from error
    except CorruptShard as error:
        raise DecodeError(str(error)) from error


def _stack(slots: Sequence[_Slot], bucket: BucketConfig) -> dict[str, np.ndarray]:
    first = {name: np.asarray(array) for name, array in slots[0].arrays.items()}
    for slot in slots[1:]:
        got = {name: np.asarray(array) for name, array in slot.arrays.items()}
        if {n: (a.shape, a.dtype) for n, a in got.items()} != {n: (a.shape, a.dtype) for n, a in first.items()}:
            differ = sorted(
                n
                for n in first.keys() | got.keys()
                if n not in first or n not in got or (first[n].shape, first[n].dtype) != (got[n].shape, got[n].dtype)
            )
            raise ValueError(
                f"bucket {bucket.name}: records {slots[0].id!r} and {slot.id!r} were preprocessed to different arrays: "
                + "; ".join(f"{name}: {_format(first.get(name))} and {_format(got.get(name))}" for name in differ)
                + ". Every example of a bucket must have the same names, shapes and dtypes."
            )
    return {name: np.stack([slot.arrays[name] for slot in slots]) for name in first}


def _format(array: np.ndarray | None) -> str:
    return "missing" if array is None else f"{array.dtype}{list(array.shape)}"
