"""Builds data sets: jobs in parallel, here or on an engine, in units that survive kills and that parts are made of.

What builders need besides is importable from here too.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path as LocalPath
from typing import Any

from jvgen.data.builders.assembly import beside, check_alike, complete
from jvgen.data.builders.batches import BatchEncoder, encoded
from jvgen.data.builders.build_folder import (
    BuildInfo,
    finished,
    identity_of,
    of_part,
    opened,
    part_folder,
    read_info,
    remove,
)
from jvgen.data.builders.execution import Execution, Progress, Team
from jvgen.data.builders.jobs import (
    BuildError,
    BuildJob,
    FilterConfig,
    Made,
    Rejected,
    assign_splits,
    available_cpus,
)
from jvgen.data.builders.remote_part import RemotePart
from jvgen.data.builders.summary import Summary, summary_of
from jvgen.data.builders.units import Done, Unit, Work, forget, jobs_per_unit, sizes_of, units_of, write_unit
from jvgen.data.builders.workers import in_order
from jvgen.data.store import dataset_info
from jvgen.data.store.index_files import load_index
from jvgen.data.store.out_folder import check_out, out_folder
from jvgen.data.store.writer import SHARD_BYTES
from jvgen.storage import Path, is_remote

__all__ = [
    "BuildError",
    "BuildJob",
    "FEW_JOBS",
    "Execution",
    "FilterConfig",
    "Made",
    "Progress",
    "Rejected",
    "Summary",
    "Team",
    "assign_splits",
    "available_cpus",
    "build_dataset",
]

# Fewer jobs are done before processes have started.
FEW_JOBS = 64
# Threads that look up sizes of files, which takes a while on network disks.
_LOOKING_UP = 16


def build_dataset(
    out: str | Path,
    jobs: Sequence[BuildJob],
    make: Callable[[Any], Any],
    *,
    description: str,
    metadata: dict[str, Any],
    encoder: BatchEncoder | None = None,
    filters: FilterConfig | None = None,
    error_budget: float = 0.0,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    processes: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Make the records of every job and write them in order.

    What is finished stays in a hidden folder beside `out` (in `TMPDIR` for a data set in a bucket) until the data set
    is complete: a build that was killed, or that failed, goes on there when it is run again.

    Args:
      out: folder of the data set.
      jobs: what to make records of.
      make: maps the payload of a job to its record, or to `Made`; raises `DecodeError` for corrupt input. With
        `processes` or an engine it must be picklable.
      description: one line for `dataset_info.json`.
      metadata: JSON values for `jvgen.json`.
      encoder: encodes what `make` leaves `ToEncode`, in the calling thread (an accelerator's work).
      filters: which records to keep.
      error_budget: fraction of the jobs that may be corrupt. The build fails at the end, when all have been read.
      overwrite: replace a data set at `out`.
      shard_bytes: size of the ArrayRecord files.
      workers: records made in parallel.
      processes: use processes rather than threads.
      progress: called with (done, total).
      execution: parts, engine, appending.

    Raises:
      BuildError: more corrupt inputs than the budget allows, or no record left. No data set is written.
      ValueError: `out` exists and may not be replaced, or is a mount point; another unfinished build is in the way.
    """
    began = time.perf_counter()
    execution = execution or Execution()
    execution.validate()
    filters = filters or FilterConfig()
    filters.validate()
    target = out_folder(out)
    if execution.append:
        jobs = _new_jobs(target, jobs)
        check_alike(target, metadata)
    elif execution.parts == 1:
        check_out(target, overwrite)
    metadata = _with_filters(metadata, filters)
    size = execution.jobs_per_unit or jobs_per_unit(jobs)
    identity = identity_of(jobs, metadata, size)
    units = units_of(jobs, size)
    info = BuildInfo(
        identity, description, metadata, execution.part, execution.parts, len(units), len(jobs), size, error_budget
    )
    if execution.engine == "ray" and is_remote(target):
        raise ValueError(
            f"engine = 'ray': {target} is in a bucket; build on a disk that all machines see, then copy it."
        )
    team = execution.team
    if team.count > 1 and is_remote(target):
        raise ValueError(f"{target}: processes of one build need a disk that all see; build there, then copy it.")
    folder = _build_folder(target, execution)
    work = Work(make, filters, shard_bytes, execution.limit)
    mine = of_part(units, execution.part, execution.parts)
    with _opened(folder, info, team, execution.restart) as done:
        remote = None
        if execution.parts > 1 and is_remote(target):
            remote = RemotePart(part_folder(target, execution.part, execution.parts), folder, info)
            remote.fetch(execution.restart)
            remote.push_missing(done)
            done = finished(folder, info)
        if team.index == 0:
            _retry_corrupt(folder, done, error_budget)
            _forget_changed(folder, done, units)
        team.wait("the start of the build")
        done = _done_of(folder, info)
        # Not those of `missing`: the others may have finished some of them already.
        mine = of_part(mine, team.index + 1, team.count)
        own = {unit.number for unit in mine}
        done = [unit for unit in done if unit.number in own]
        report = _Report(progress, sum(len(unit.jobs) for unit in mine), sum(unit.jobs for unit in done))
        numbers = {unit.number for unit in done}
        missing = [unit for unit in mine if unit.number not in numbers]
        if execution.engine == "ray":
            from jvgen.data.builders.ray_engine import make_units

            if encoder is not None:
                raise ValueError("engine = 'ray': this builder works on this machine's accelerator; use parts.")
            for made in make_units(folder, missing, work, execution.address):
                report.add(made.jobs)
        else:
            _make_here(folder, missing, work, encoder, workers, processes, report, remote)
        if team.index > 0:
            # Process 0 removes the folder when all have come here.
            done = [unit for unit in finished(folder, info) if unit.number in own]
            team.wait("the last unit of the build")
            return summary_of(folder, done, {}, 0, began)
        team.wait("the last unit of the build")
        done = finished(folder, info)
        if remote is not None:
            remote.close()
            remove(folder)
            return summary_of(remote.remote, done, {}, remote.size(), began)
        if execution.parts > 1:
            size_on_disk = sum(path.stat().st_size for path in folder.iterdir())
            return summary_of(folder, done, {}, size_on_disk, began)
        return complete(
            target, info, [(folder, unit) for unit in done], error_budget, overwrite=overwrite,
            appends=execution.append, began=began,
        )  # fmt: skip


def _with_filters(metadata: dict[str, Any], filters: FilterConfig) -> dict[str, Any]:
    """Metadata that names the filters, by which units and parts of one build are told from those of another."""
    options = metadata.get("options", {})
    if "filters" in options or filters == FilterConfig():
        return metadata
    return {**metadata, "options": {**options, "filters": json.loads(json.dumps(dataclasses.asdict(filters)))}}


@contextlib.contextmanager
def _opened(folder: LocalPath, info: BuildInfo, team: Team, restart: bool) -> Iterator[list[Done]]:
    """As `opened`, by process 0 for all."""
    if team.index == 0:
        with opened(folder, info, restart=restart) as done:
            yield done
    else:
        yield []


def _done_of(folder: LocalPath, info: BuildInfo) -> list[Done]:
    """The units that are done, of the build that process 0 has opened."""
    found = read_info(folder)
    if found is None or found.identity != info.identity:
        raise ValueError(
            f"{folder}: holds {'nothing' if found is None else 'another build'} here, although process 0 builds "
            "there: all processes need the same command, data set and disk."
        )
    return finished(folder, info)


def _make_here(
    folder: LocalPath,
    units: Sequence[Unit],
    work: Work,
    encoder: BatchEncoder | None,
    workers: int,
    processes: bool,
    report: "_Report",
    remote: RemotePart | None,
) -> None:
    """Make units with this machine's threads or processes, which begin the next one while one is written."""
    payloads = (job.payload for unit in units for job in unit.jobs)
    made = in_order(work.make, payloads, workers, processes, work.limit, encoder is not None)
    with contextlib.closing(made):
        results = made
        if encoder is not None:
            results = encoded(zip((unit.number for unit in units for _ in unit.jobs), made, strict=True), encoder)
        for unit in units:
            mine = (next(results) for _ in unit.jobs)
            done = write_unit(folder, unit, work, mine, lambda: report.add(1))
            if remote is not None:
                remote.push(done)


def _build_folder(out: Path, execution: Execution) -> LocalPath:
    if execution.parts > 1:
        folder = part_folder(out, execution.part, execution.parts)
        return beside(out) / f".{folder.name}.building" if is_remote(out) else LocalPath(folder)
    if execution.append:
        return beside(out) / f".{out.name}.appending"
    return beside(out) / f".{out.name}.building"


def _new_jobs(out: Path, jobs: Sequence[BuildJob]) -> list[BuildJob]:
    if not (out / dataset_info.NAME).is_file():
        raise ValueError(f"out = {str(out)!r} is no data set to append to; build it first.")
    known = those_in(out, {job.name for job in jobs})
    new = [job for job in jobs if job.name not in known]
    if not new:
        raise ValueError(f"out = {str(out)!r} has all {len(jobs)} records already; there is nothing to append.")
    return new


def those_in(folder: Path, names: Collection[str]) -> set[str]:
    """Which of these jobs have records in a data set: with their name as id, or FILE/0000, FILE/0001 ... of FILE."""
    found: set[str] = set()
    for split in dataset_info.read(folder):
        for id in load_index(folder, split).id:
            # "a/b" may be a file of its own, beside a file "a".
            name = id if id in names else id.rpartition("/")[0]
            if name in names:
                found.add(name)
    return found


def _retry_corrupt(folder: LocalPath, done: Sequence[Done], budget: float) -> None:
    """Forget units with files that could not be read, if they were too many: they may have been repaired since."""
    if sum(unit.corrupt() for unit in done) > budget * sum(unit.jobs for unit in done):
        for unit in done:
            if unit.corrupt():
                forget(folder, unit.number)


def _forget_changed(folder: LocalPath, done: Sequence[Done], units: Sequence[Unit]) -> None:
    """Forget units whose files have other sizes than when they were made: the data set would be of two versions."""
    members = {unit.number: unit.jobs for unit in units}
    kept = [unit for unit in done if unit.sizes]
    with concurrent.futures.ThreadPoolExecutor(_LOOKING_UP) as pool:
        for unit, sizes in zip(kept, pool.map(lambda unit: sizes_of(members[unit.number]), kept), strict=True):
            if sizes != unit.sizes:
                forget(folder, unit.number)


class _Report:
    """Counts jobs for the progress display; what was finished before is reported first."""

    def __init__(self, progress: Progress | None, total: int, before: int):
        self._progress, self._total, self._done = progress, total, before
        if progress is not None and before:
            progress(before, total)

    def add(self, jobs: int) -> None:
        self._done += jobs
        if self._progress is not None:
            self._progress(self._done, self._total)
