"""Goodput: what the wall time of a run was spent on, over all of its starts."""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from jvgen import storage

FILE = "goodput.json"
# Seconds between two writes of the file. What a killed start did after the last one counts as time between starts.
WRITE_SECONDS = 30.0

# Training steps that count; everything else is badput.
STEP = "step"
START, COMPILE, DATA_WAIT, SAVE, EVALUATION = "start", "compile", "data_wait", "save", "evaluation"
# Steps that a restart did again because they were not saved, and the time between two starts.
LOST, DOWN = "lost", "down"
PARTS = (STEP, START, COMPILE, DATA_WAIT, SAVE, EVALUATION, LOST, DOWN)


@dataclasses.dataclass
class _Start:
    """One start of the run.

    Attributes:
      began, ended: seconds since 1970; `ended` is the last time known.
      first_step, step: steps done when it began, and at `ended`.
      seconds: by part; the time that no part names is that of steps.
    """

    began: float
    ended: float
    first_step: int
    step: int
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return max(0.0, self.ended - self.began - sum(self.seconds.values()))


class Goodput:
    """Measures the parts of this start and adds those of earlier starts, which a file in the run directory keeps.

    Args:
      workdir: run directory; None for processes that keep no file (all but process 0).
      start_step: steps done before.
      age: seconds since this start began.
      spent: seconds of it by part.
    """

    def __init__(
        self, workdir: storage.Path | None, start_step: int, age: float = 0.0, spent: Mapping[str, float] | None = None
    ):
        self._file = None if workdir is None else workdir / FILE
        self._earlier = [] if self._file is None else _read(self._file)
        now = time.time()
        self._now = _Start(now - age, now, start_step, start_step, dict(spent or {}))
        self._written = 0.0

    def add(self, part: str, seconds: float) -> None:
        """Count seconds of this start as a part."""
        self._now.seconds[part] = self._now.seconds.get(part, 0.0) + seconds

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Context whose time counts as a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - start)

    def update(self, step: int, *, write: bool = False) -> bool:
        """Note that this many steps are done; writes the file if `WRITE_SECONDS` have passed, or `write` is set.

        Returns:
          Whether the file was due: the interval at which to report.
        """
        self._now.step, self._now.ended = step, time.time()
        if not write and self._now.ended - self._written < WRITE_SECONDS:
            return False
        self._written = self._now.ended
        if self._file is not None:
            rows = [dataclasses.asdict(start) for start in (*self._earlier, self._now)]
            storage.write_text(self._file, json.dumps({"starts": rows}, indent=1))
        return True

    def close(self) -> None:
        """Write the file a last time; a run that ends with an error may not be able to."""
        with suppress(OSError):
            self.update(self._now.step, write=True)

    def summary(self) -> dict[str, float]:
        """Seconds by part ("step_seconds" ...), their sum "total_seconds", "fraction" of it in steps, "starts"."""
        starts = [*self._earlier, self._now]
        seconds = dict.fromkeys(PARTS, 0.0)
        for index, start in enumerate(starts):
            for part, value in start.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + value
            # The step that a later start went back to, if it did.
            kept = min([start.step, *(later.first_step for later in starts[index + 1 :])])
            done, lost = start.step - start.first_step, start.step - max(kept, start.first_step)
            share = lost / done if done else 0.0
            seconds[LOST] += start.step_seconds * share
            seconds[STEP] += start.step_seconds * (1 - share)
            if index:
                seconds[DOWN] += max(0.0, start.began - starts[index - 1].ended)
        total = sum(seconds.values())
        summary = {f"{part}_seconds": value for part, value in seconds.items()}
        return summary | {
            "total_seconds": total,
            "fraction": seconds[STEP] / total if total else 0.0,
            "starts": float(len(starts)),
        }


def goodput_line(summary: Mapping[str, float]) -> str:
    """The summary as one line: shares of the total by part, in the order of `PARTS`; parts below 0.1% are left out."""
    total = summary["total_seconds"]
    shares = {part: summary[f"{part}_seconds"] / total if total else 0.0 for part in PARTS}
    listed = ", ".join(f"{part.replace('_', ' ')} {share:.1%}" for part, share in shares.items() if share >= 0.001)
    starts = int(summary["starts"])
    return f"goodput {summary['fraction']:.1%} of {_duration(total)} in {starts} start{'s'[: starts > 1]}: {listed}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _read(file: storage.Path) -> list[_Start]:
    """The starts that a file lists; none if it does not exist or cannot be read, because no run may fail over it."""
    try:
        rows: Any = json.loads(storage.read_text(file))["starts"]
        return [_Start(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []
