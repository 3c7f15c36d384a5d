"""Records that cannot be decoded: a line in a log for each, and an end to the run when there are too many."""

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

# A budget above zero lets this many records fail before their share counts: one failure among the first ten records
# is no sign of a bad data set.
MINIMUM = 5
_NAMED = 10


class TooManyFailures(RuntimeError):
    """More records failed to decode than the budget allows; the message names them."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """One record that could not be decoded.

    Attributes:
      step, slot: where in the stream it was asked for.
      source: path and split of its data set.
      row: its row there.
      id: its record id.
      error: what the decoder said.
    """

    step: int
    slot: int
    source: str
    row: int
    id: str
    error: str


class Quarantine:
    """Counts failing records against a budget and logs them, from any number of threads.

    Every process of a host appends to the host's file, a whole line in one write, so lines are never torn. Counts are a
    process's own: a data set that fails beyond the budget does so in each.

    Args:
      log: JSON-lines file, one `Failure` a line; None keeps no log.
      budget: share of the samples read so far that distinct failing records may amount to; 0 allows no failure at all.
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
          TooManyFailures: the budget is spent.
        """
        if self.log is not None:
            append_line(self.log, dataclasses.asdict(failure))
        with self._lock:
            self._read += 1
            self._failed[failure.source, failure.row] = failure
            allowed = max(MINIMUM, self.budget * self._read) if self.budget else 0
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
    """The failing records by name, the last ones if there are many."""
    lines = [f"\n  {f.id} ({f.source}, row {f.row}): {f.error}" for f in failures[-_NAMED:]]
    more = f"\n  and {len(failures) - _NAMED} before" if len(failures) > _NAMED else ""
    return "They are:" + "".join(lines) + more


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one JSON object as a line, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(content) + "\n").encode())
    finally:
        os.close(descriptor)


def host_log(log: Path, host: int, hosts: int) -> Path:
    """The log file of one host: the file itself when there is one host, else one with the host in its name."""
    return log if hosts == 1 else log.with_name(f"{log.stem}-{host:05d}{log.suffix}")
