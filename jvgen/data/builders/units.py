"""The unit of a build: consecutive jobs of one split, whose records fill shards of their own.

A unit is done when its JSON file is there, which is written last and in one rename. Which process or machine made it,
and how often it was begun, shows nowhere: the same jobs give the same bytes.
"""

import collections
import contextlib
import dataclasses
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvgen import storage
from jvgen.data.builders.jobs import BuildJob, FilterConfig, Rejected, sorted_out
from jvgen.data.builders.workers import in_order
from jvgen.data.store.records import Record
from jvgen.data.store.shard_writer import ShardWriter, is_complete, rows_path
from jvgen.data.store.writer import SHARD_BYTES

_TARGET_BYTES = 256 << 20  # of recordings per unit
_FEWEST, _MOST, _UNKNOWN = 16, 4096, 1024  # jobs per unit
_SAMPLED = 64  # files whose sizes are looked up


class Unit(NamedTuple):
    """Jobs [start, stop) of a split.

    Attributes:
      number: over all splits.
      split: name of the split.
      jobs: in order.
    """

    number: int
    split: str
    jobs: Sequence[BuildJob]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done with each job.

    Attributes:
      make: maps a payload to a `Record` or `Made`; raises `DecodeError` for corrupt input.
      filters: which records to keep.
      shard_bytes: size at which a unit begins another ArrayRecord file.
      limit: seconds after which a payload is given up; None for no limit.
    """

    make: Callable[[Any], Any]
    filters: FilterConfig
    shard_bytes: int = SHARD_BYTES
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a unit.

    Attributes:
      number, split: as `Unit`.
      files: names of its shards, in order.
      kinds: records by kind.
      action_widths: records by numbers per action.
      rewarded: records with rewards.
      rejected: jobs and records that were left out.
      notes: how often each note was made.
      jobs: number of its jobs.
      seconds: time that it took.
      sizes: bytes of the file of each job when it was begun (`sizes_of`).
    """

    number: int
    split: str
    files: tuple[str, ...]
    kinds: dict[str, int]
    action_widths: dict[str, int]
    rejected: tuple[Rejected, ...]
    notes: dict[str, int]
    jobs: int
    seconds: float
    rewarded: int = 0
    sizes: tuple[int, ...] = ()

    def corrupt(self) -> int:
        """Number of jobs that could not be read."""
        return sum(item.corrupt for item in self.rejected)


def units_of(jobs: Sequence[BuildJob], size: int) -> list[Unit]:
    """The jobs of each split in groups of `size`."""
    by_split: dict[str, list[BuildJob]] = {}
    for job in jobs:
        by_split.setdefault(job.split, []).append(job)
    groups = [
        (split, members[start : start + size])
        for split, members in by_split.items()
        for start in range(0, len(members), size)
    ]
    return [Unit(number, split, members) for number, (split, members) in enumerate(groups)]


def jobs_per_unit(jobs: Sequence[BuildJob]) -> int:
    """A power of two such that the recordings of a unit have about 256 MiB, by the sizes of some files."""
    sizes = []
    for job in jobs[:: -(-len(jobs) // _SAMPLED) or 1]:
        if job.size:
            sizes.append(job.size)
        elif job.path is not None:
            with contextlib.suppress(OSError):
                sizes.append(job.path.stat().st_size)
    if not sizes:
        return _UNKNOWN
    many = max(1, _TARGET_BYTES * len(sizes) // max(1, sum(sizes)))
    return min(_MOST, max(_FEWEST, 1 << many.bit_length() - 1))


def sizes_of(jobs: Sequence[BuildJob]) -> tuple[int, ...]:
    """Bytes of the file of each job, -1 where there is none; empty if no job has a file."""
    known: dict[Path | None, int] = {None: -1}
    for path in {job.path for job in jobs} - {None}:
        try:
            # Folders have a size, too, which says nothing about what is in them.
            known[path] = path.stat().st_size if path.is_file() else -1
        except OSError:
            known[path] = -1
    return tuple(known[job.path] for job in jobs) if len(known) > 1 else ()


def records_per_unit(record_bytes: float) -> int:
    """A power of two such that the records of a unit, of about this many bytes each, have about 256 MiB."""
    many = max(1, int(_TARGET_BYTES / max(record_bytes, 1.0)))
    return min(_UNKNOWN, max(_FEWEST, 1 << many.bit_length() - 1))


def make_unit(folder: Path, unit: Unit, work: Work) -> Done:
    """Make a unit in this process."""
    results = in_order(work.make, (job.payload for job in unit.jobs), 1, False, work.limit)
    return write_unit(folder, unit, work, results)


def write_unit(
    folder: Path,
    unit: Unit,
    work: Work,
    results: Iterable[Any],
    report: Callable[[], None] | None = None,
) -> Done:
    """Write the shards of a unit, then its JSON file.

    Args:
      folder: of the build.
      unit: its jobs.
      work: what is done with them.
      results: what `attempt` returned for each job, in order.
      report: called after each job.
    """
    began, sizes = time.perf_counter(), sizes_of(unit.jobs)
    rejected: list[Rejected] = []
    kinds, widths, notes = collections.Counter(), collections.Counter(), collections.Counter()
    rewarded = 0
    with _Shards(folder, unit, work.shard_bytes) as shards:
        for job, result in zip(unit.jobs, results, strict=True):
            kept, left_out, noted = sorted_out(job, result, work.filters)
            for record in kept:
                try:
                    shards.add(record)
                except ValueError as error:
                    # Inconsistent fields, or more bytes than a record may have.
                    left_out.append(Rejected(record.id, str(error), corrupt=True))
                    continue
                kinds[record.kind] += 1
                widths[str(record.actions.shape[1] if record.has_action else 0)] += 1
                rewarded += record.rewards.size > 0
            rejected += left_out
            notes.update(noted)
            if report is not None:
                report()
        files = shards.close()
    done = Done(
        unit.number, unit.split, tuple(files), dict(kinds), dict(widths), tuple(rejected), dict(notes), len(unit.jobs),
        time.perf_counter() - began, rewarded, sizes,
    )  # fmt: skip
    _commit(folder, done)
    return done


def read_done(folder: Path, number: int) -> Done | None:
    """What became of a unit; None if it is not complete."""
    try:
        stored = json.loads(storage.read_text(unit_path(folder, number)))
    except FileNotFoundError:
        return None
    stored["files"] = tuple(stored["files"])
    stored["sizes"] = tuple(stored.get("sizes", ()))
    stored["rejected"] = tuple(Rejected(**item) for item in stored["rejected"])
    done = Done(**stored)
    return done if all(is_complete(folder / name) for name in done.files) else None


def forget(folder: Path, number: int) -> None:
    """Make a unit not done."""
    unit_path(folder, number).unlink(missing_ok=True)


def remove_unfinished(folder: Path, done: Iterable[Done]) -> None:
    """Delete the files of attempts that were not completed. Nobody may be writing."""
    kept = {name for unit in done for name in unit.files}
    kept |= {rows_path(Path(name)).name for name in kept}
    for path in folder.iterdir():
        if path.name.startswith("unit-") and path.suffix != ".json" and path.name not in kept:
            path.unlink(missing_ok=True)


def unit_path(folder: Path, number: int) -> Path:
    """The file that says that a unit is done."""
    return folder / f"unit-{number:06d}.json"


def _commit(folder: Path, done: Done) -> None:
    path = unit_path(folder, done.number)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with draft.open("w") as file:
        file.write(json.dumps(dataclasses.asdict(done)))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class _Shards:
    """The shards of a unit while they are written, with names of this attempt: a lost one may still be writing."""

    def __init__(self, folder: Path, unit: Unit, limit: int):
        self._stem = folder / f"unit-{unit.number:06d}-{uuid.uuid4().hex[:8]}"
        self._limit = limit
        self._names: list[str] = []
        self._shard: ShardWriter | None = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def add(self, record: Record) -> None:
        if self._shard is None:
            path = self._stem.with_name(f"{self._stem.name}-{len(self._names):03d}.shard")
            self._shard = ShardWriter(path)
            self._names.append(path.name)
        self._shard.add(record)
        if self._shard.bytes >= self._limit:
            self._close()

    def close(self) -> list[str]:
        self._close()
        return self._names

    def _close(self) -> None:
        if self._shard is None:
            return
        if len(self._shard):
            self._shard.close()
        else:
            self._shard.abandon()
            self._names.pop()
        self._shard = None
