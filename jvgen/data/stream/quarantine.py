"""Quarantine: records that cannot be decoded are logged, and the run stops when there are too many."""

import contextlib
import dataclasses
import json
import os
import re
import threading
import uuid
from typing import Any

from jvgen import exit_codes, storage
from jvgen.storage import Path

# With a budget above zero this many records may fail before the fraction counts: one failure among the first ten
# records does not make a bad data set.
MIN_FAILURES = 5
_MAX_NAMED = 10
_PROCESS = re.compile(r"-\d{5}$")  # of the name of a process's log


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
      data: digest of the data set.
    """

    step: int
    slot: int
    source: str
    row: int
    id: str
    error: str
    data: str = ""


class Quarantine:
    """Counts failing records against a budget and logs them, from any number of threads.

    Workers of a process append to the same file, each line in one write, so lines are never interleaved. Each worker
    has its own counts: a data set that exceeds the budget does so in every worker.

    Failures in the logs that a run wrote before it was started again are remembered, of all its processes: they count
    against the budget, as the samples read before do, and are not logged again. Other windows of such a record are
    read, as in a run that was not interrupted, so that it resumes with the same batches.

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
        self._remembered = {} if log is None else remembered(log)

    @property
    def known(self) -> int:
        """Number of records that failed before the run was started again."""
        return len(self._remembered)

    def read_before(self, samples: int) -> None:
        """Count the samples that the run read before it was started again."""
        with self._lock:
            self._read = max(self._read, samples)

    def succeeded(self) -> None:
        """Count a sample that was read."""
        with self._lock:
            self._read += 1

    def failed(self, failure: Failure) -> None:
        """Log a failure.

        Raises:
          TooManyFailures: the budget is exhausted.
        """
        known = (failure.data, failure.row) in self._remembered
        if self.log is not None and not known:
            append_line(self.log, dataclasses.asdict(failure))
        with self._lock:
            self._read += 1
            if known:
                return
            self._failed[failure.source, failure.row] = failure
            failed = [*self._remembered.values(), *self._failed.values()]
            allowed = max(MIN_FAILURES, self.budget * self._read) if self.budget else 0
            if len(failed) <= allowed:
                return
            message = (
                f"{len(failed)} records could not be decoded in {self._read} read; error_budget = {self.budget} "
                f"allows {int(allowed)}. {describe(failed)}\nRepair or remove them, or raise error_budget."
            )
        raise TooManyFailures(message + (f" All failures are listed in {self.log}." if self.log else ""))

    def __getstate__(self) -> dict[str, Any]:
        return {"log": self.log, "budget": self.budget, "remembered": self._remembered, "read": self._read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(None, state["budget"])
        self.log, self._remembered, self._read = state["log"], state["remembered"], state["read"]


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


def remembered(log: Path) -> dict[tuple[str, int], Failure]:
    """The failures in the logs of a run, of all its processes, by digest of the data set and row."""
    stem = _PROCESS.sub("", log.stem)
    logs = [path for path in log.parent.glob(f"{stem}*{log.suffix}") if _PROCESS.sub("", path.stem) == stem]
    found = {}
    for path in sorted(logs):
        for text in [storage.read_text(part) for part in (path.iterdir() if path.is_dir() else [path])]:
            for line in text.splitlines():
                # Lines of 0.1.0 do not say of which data they are; the last line may have been cut off by a kill.
                with contextlib.suppress(ValueError, TypeError):
                    failure = Failure(**json.loads(line))
                    if failure.data:
                        found[failure.data, failure.row] = failure
    return found


def process_log(log: Path, process_index: int, process_count: int) -> Path:
    """The log file of one process: `log` for a single process, else a file with the process index in its name."""
    return log if process_count == 1 else log.with_name(f"{log.stem}-{process_index:05d}{log.suffix}")
