"""Where and how a build runs."""

import dataclasses
from collections.abc import Callable
from typing import Literal

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes that build together, each with devices of its own; they see `out` under one path.

    Attributes:
      index: number of this process, from 0.
      count: number of processes.
      wait: returns when all processes have called it with this name.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = lambda name: None


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where and how a build runs; its records do not depend on it.

    Attributes:
      part, parts: build only this part, from 1, of so many; `merge_parts` makes a data set of all.
      engine: "local", or "ray": units are made on the machines of a Ray cluster, which see `out` and the recordings
        under the same paths.
      address: of the Ray cluster; None for the one that this machine belongs to, or else one on this machine.
      restart: throw away what an earlier build left unfinished.
      append: add to the data set at `out`; jobs whose names are ids of its records are left out.
      jobs_per_unit: jobs that are finished, or lost in a crash, together; by the sizes of the files if None.
      limit: seconds after which a file is given up, since its decoder hangs; None to wait for ever.
      team: processes that divide the units of this build, or of this part; process 0 makes the data set of them.
    """

    part: int = 1
    parts: int = 1
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    restart: bool = False
    append: bool = False
    jobs_per_unit: int | None = None
    limit: float | None = 1800.0
    team: Team = Team()

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        if not 1 <= self.part <= self.parts:
            raise ValueError(f"part = {self.part}/{self.parts}: from 1/{self.parts} to {self.parts}/{self.parts}.")
        if self.append and self.parts > 1:
            raise ValueError("append, part: build the parts, then add them with `jvgen data append`.")
        if self.jobs_per_unit is not None and self.jobs_per_unit < 1:
            raise ValueError(f"jobs_per_unit = {self.jobs_per_unit}: at least 1.")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit = {self.limit}: must be positive, in seconds.")
        if self.team.count > 1 and self.engine == "ray":
            raise ValueError("engine = 'ray': Ray divides the work itself; start one process.")
