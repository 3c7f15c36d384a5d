"""Quarantine: records that cannot be decoded are logged, and the run stops when there are too many."""

import dataclasses
import json
import os
import threading
import uuid
from typing import Any

from jvgen import exit_codes, storage
from jvgen.storage import Path

# With a budget above zero this many records may fail before the fraction counts: one failure among the first ten
# records does not make a bad data set.
MIN_FAILURES = 5
_MAX_NAMED = 10


class TooManyFailures(RuntimeError):
    """More records failed to decode than the budget allows; the message names them."""

    exit_code = exit_codes.USER_ERROR


@dataclasses.dataclass(frozen=True)
class Failure:
    """One record that could not be decoded.

    Attributes:
      step, slot: its position in the stream.
      source: path and split of its data set.
      row: its row in the data set.
      id: its record id.
      error: message of the decoder.
    """

    step: int
    slot: int
    source: str
    row: int
    id: str
    error: str


class Quarantine:
    """Counts failing records against a budget and logs them, from any number of threads.

    Workers of a process append to the same file, each line in one write, so lines are never interleaved. Each worker
    has its own counts: a data set that exceeds the budget does so in every worker.

    Args:
      log: JSON-lines file, one `Failure` per line; None disables the log.
      budget: allowed number of distinct failing records, as a fraction of the samples read so far; 0 allows none.
    """

    def __init__(self, log: Path | None, budget: float):
        self.log = log
        self.budget = budget
        self._lock = threading.Lock()
        self._read = 0
        self._failed: dict[tuple[str, int], Failure] = {}

    def succeeded(self) -> None:
        """Count a sample that was read."""
        with self._lock:
            self._read += 1

    def failed(self, failure: Failure) -> None:
        """Log a failure.

        Raises:
          TooManyFailures: the budget is exhausted.
        """
        if self.log is not None:
            append_line(self.log, dataclasses.asdict(failure))
        with self._lock:
            self._read += 1
            self._failed[failure.source, failure.row] = failure
            allowed = max(MIN_FAILURES, self.budget * self._read) if self.budget else 0
            if len(self._failed) <= allowed:
                return
            message = (
                f"{len(self._failed)} records could not be decoded in {self._read} read; error_budget = {self.budget} "
                f"allows {int(allowed)}. {describe(list(self._failed.values()))}\nRepair or remove them, or raise "
                "error_budget."
            )
        raise TooManyFailures(message + (f" All failures are listed in {self.log}." if self.log else ""))

    def __getstate__(self) -> dict[str, Any]:
        return {"log": self.log, "budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def describe(failures: list[Failure]) -> str:
    """The failing records, the last ones if there are many."""
    lines = [f"\n  {f.id} ({f.source}, row {f.row}): {f.error}" for f in failures[-_MAX_NAMED:]]
    more = f"\n  and {len(failures) - _MAX_NAMED} before" if len(failures) > _MAX_NAMED else ""
    return "They are:" + "".join(lines) + more


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one JSON object as a line, in one write. In a bucket, which has no append, it is a file `PATH/ID.json`."""
    if storage.is_remote(path):
        storage.write_text(path / f"{uuid.uuid4().hex}.json", json.dumps(content) + "\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(content) + "\n").encode())
    finally:
        os.close(descriptor)


def process_log(log: Path, process_index: int, process_count: int) -> Path:
    """The log file of one process: `log` for a single process, else a file with the process index in its name."""
    return log if process_count == 1 else log.with_name(f"{log.stem}-{process_index:05d}{log.suffix}")
