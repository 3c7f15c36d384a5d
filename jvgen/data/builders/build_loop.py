"""Builds data sets: jobs in parallel, here or on an engine, in units that survive kills and that parts are made of."""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as LocalPath
from typing import Any, Literal

from jvgen import storage
from jvgen.data.builders.batches import BatchEncoder, encoded
from jvgen.data.builders.build_folder import (
    BuildInfo,
    checked_parts,
    finished,
    identity_of,
    is_worth_keeping,
    linked,
    locked,
    of_part,
    opened,
    part_folder,
    read_info,
    remove,
)
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
from jvgen.data.builders.summary import REJECTED_LOG, Summary, log_line, summary_of
from jvgen.data.builders.units import Done, Unit, Work, forget, jobs_per_unit, units_of, write_unit
from jvgen.data.builders.workers import in_order
from jvgen.data.store import dataset_info
from jvgen.data.store.out_folder import check_out, move_to_out
from jvgen.data.store.publish import append, append_in_bucket, publish, publish_to_bucket
from jvgen.data.store.shard_writer import rows_path
from jvgen.data.store.sources import read_metadata
from jvgen.data.store.writer import SHARD_BYTES
from jvgen.storage import Path, absolute, is_remote

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
    "append_parts",
    "assign_splits",
    "available_cpus",
    "build_dataset",
    "merge_parts",
]

Progress = Callable[[int, int], None]
# Fewer jobs are done before processes have started.
FEW_JOBS = 64


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
      ValueError: `out` exists and may not be replaced; another unfinished build is in the way.
    """
    began = time.perf_counter()
    execution = execution or Execution()
    execution.validate()
    filters = filters or FilterConfig()
    filters.validate()
    target = absolute(out)
    if execution.append:
        jobs = _new_jobs(target, jobs)
        _check_alike(target, metadata)
    elif execution.parts == 1:
        check_out(target, overwrite)
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
            remove(folder)
            return summary_of(remote.remote, done, {}, remote.size(), began)
        if execution.parts > 1:
            size_on_disk = sum(path.stat().st_size for path in folder.iterdir())
            return summary_of(folder, done, {}, size_on_disk, began)
        return _complete(target, info, [(folder, unit) for unit in done], error_budget, overwrite, execution, began)


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


def merge_parts(
    parts: Sequence[str | Path],
    out: str | Path,
    *,
    error_budget: float | None = None,
    overwrite: bool = False,
) -> Summary:
    """Make a data set of the parts of a build: the same files as a build without parts makes.

    The parts are removed when the data set is there.

    Args:
      parts: their folders, in any order; they and the data set may be in buckets, and shards are copied within these.
      out: folder of the data set.
      error_budget: fraction of all jobs that may be corrupt; that of the build if None.
      overwrite: replace a data set at `out`.

    Raises:
      ValueError: parts of different builds, a part twice, missing or not finished, or `out` exists. Nothing is changed.
      BuildError: more corrupt inputs than the budget allows.
    """
    began = time.perf_counter()
    target = absolute(out)
    check_out(target, overwrite)
    info, units = checked_parts([absolute(part) for part in parts])
    budget = info.error_budget if error_budget is None else error_budget
    return _complete(target, info, units, budget, overwrite, Execution(), began)


def append_parts(out: str | Path, parts: Sequence[str | Path], *, error_budget: float | None = None) -> Summary:
    """Add the parts of a build to a data set; arguments and errors as in `merge_parts`.

    Raises:
      ValueError: also for records that the data set has.
    """
    began = time.perf_counter()
    target = absolute(out)
    info, units = checked_parts([absolute(part) for part in parts])
    budget = info.error_budget if error_budget is None else error_budget
    return _complete(target, info, units, budget, False, Execution(append=True), began)


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
    made = in_order(work.make, payloads, workers, processes, work.limit)
    with contextlib.closing(made):
        results = made
        if encoder is not None:
            results = encoded(zip((unit.number for unit in units for _ in unit.jobs), made, strict=True), encoder)
        for unit in units:
            mine = (next(results) for _ in unit.jobs)
            done = write_unit(folder, unit, work, mine, lambda: report.add(1))
            if remote is not None:
                remote.push(done)


def _complete(
    out: Path,
    info: BuildInfo,
    units: Sequence[tuple[Path, Done]],
    budget: float,
    overwrite: bool,
    execution: Execution,
    began: float,
) -> Summary:
    """Publish finished units, and remove the folders that they were in."""
    done = [unit for _, unit in units]
    folders = list(dict.fromkeys(folder for folder, _ in units))
    _check_budget(done, info.jobs, budget, folders)
    with _staged(out) as staging:
        shards: dict[str, list[Any]] = {}
        for folder, unit in units:
            for name in unit.files:
                if is_remote(out):
                    shards.setdefault(unit.split, []).append(folder / name)
                    continue
                shards.setdefault(unit.split, []).append(linked(folder / name, staging / "shards"))
                linked(rows_path(folder / name), staging / "shards")
        log = "".join(log_line(item) for unit in done for item in unit.rejected)
        data = staging / "data"
        if execution.append:
            indices = _append(out, info, shards, log, data)
        elif is_remote(out):
            check_out(out, overwrite)
            remove(out)
            data.mkdir()
            if log:
                (data / REJECTED_LOG).write_text(log)
            indices = publish_to_bucket(out, shards, data, description=info.description, metadata=info.metadata)
        else:
            indices = publish(data, shards, description=info.description, metadata=info.metadata,
                              name=dataset_info.identifier(out.name))  # fmt: skip
            if log:
                (data / REJECTED_LOG).write_text(log)
            move_to_out(data, out, overwrite)
    for folder in folders:
        remove(folder)
    size = sum(storage.size(path) for path in (*out.iterdir(), *out.glob("index-*/*")) if path.is_file())
    return summary_of(out, done, {split: index.digest for split, index in indices.items()}, size, began)


def _check_alike(out: Path, added: dict[str, Any]) -> None:
    """Raise `ValueError` for latents or embeddings that were made otherwise than those of the data set."""
    there, added = read_metadata(out), json.loads(json.dumps(added))
    for name in ("latents", "text_embeddings"):
        before, now = there.get(name) or {}, added.get(name) or {}
        wrong = [key for key in before | now if before.get(key) != now.get(key)]
        if wrong:
            raise ValueError(
                f"{out}: cannot be appended to: {name}.{wrong[0]} is {before.get(wrong[0])!r} in it and "
                f"{now.get(wrong[0])!r} in what is added. Make both with the same, or append to another data set."
            )


def _append(out: Path, info: BuildInfo, shards: dict[str, list[Any]], log: str, draft: LocalPath) -> dict[str, Any]:
    _check_alike(out, info.metadata)
    metadata = read_metadata(out)
    added = {"origin": info.metadata.get("origin"), "options": info.metadata.get("options", {})}
    # What a data set that is derived from another one was made of, is that of now.
    derived = {name: info.metadata[name] for name in ("source_digests", "address") if name in info.metadata}
    metadata = {**metadata, **derived, "appended": [*metadata.get("appended", []), added]}
    if is_remote(out):
        draft.mkdir()
        indices = append_in_bucket(out, shards, draft, metadata=metadata)
    else:
        indices = append(LocalPath(out), shards, metadata=metadata)
    if log:
        with storage.appending(out / REJECTED_LOG) as file:
            file.write(log)
    return indices


def _build_folder(out: Path, execution: Execution) -> LocalPath:
    if execution.parts > 1:
        folder = part_folder(out, execution.part, execution.parts)
        return _beside(out) / f".{folder.name}.building" if is_remote(out) else LocalPath(folder)
    if execution.append:
        return _beside(out) / f".{out.name}.appending"
    return _beside(out) / f".{out.name}.building"


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[LocalPath]:
    """An empty folder for what becomes the data set, or part of it, while no other process writes there."""
    folder = _beside(out) / f".{out.name}.publishing"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"{out}: another process is writing this data set; wait for it, then run the command again."):
        for name in ("shards", "data"):
            remove(folder / name)
        (folder / "shards").mkdir()
        try:
            yield folder
        finally:
            remove(folder)


def _beside(out: Path) -> LocalPath:
    return LocalPath(tempfile.gettempdir()) if is_remote(out) else LocalPath(out.parent)


def _new_jobs(out: Path, jobs: Sequence[BuildJob]) -> list[BuildJob]:
    from jvgen.data.store.index_files import load_index

    folder = out
    if not (folder / dataset_info.NAME).is_file():
        raise ValueError(f"out = {str(out)!r} is no data set to append to; build it first.")
    known: set[str] = set()
    for split in dataset_info.read(folder):
        for id in load_index(folder, split).id:
            # Records of one file are FILE/0000, FILE/0001 ...
            known.update((id, id.rpartition("/")[0]))
    new = [job for job in jobs if job.name not in known]
    if not new:
        raise ValueError(f"out = {str(out)!r} has all {len(jobs)} records already; there is nothing to append.")
    return new


def _retry_corrupt(folder: LocalPath, done: Sequence[Done], budget: float) -> None:
    """Forget units with files that could not be read, if they were too many: they may have been repaired since."""
    if sum(unit.corrupt() for unit in done) > budget * sum(unit.jobs for unit in done):
        for unit in done:
            if unit.corrupt():
                forget(folder, unit.number)


def _check_budget(done: Sequence[Done], total: int, budget: float, folders: Sequence[Path]) -> None:
    rejected = [item for unit in done for item in unit.rejected]
    written = any(unit.kinds for unit in done)
    corrupt = [item for item in rejected if item.corrupt]
    lines = "".join(f"\n  {item.name}: {item.reason}" for item in (corrupt if written else rejected))
    kept = "nothing was written"
    if is_worth_keeping(done):
        kept = f"no data set was written; what is finished is kept in {', '.join(map(str, folders))}"
    if len(corrupt) > budget * total:
        raise BuildError(
            f"{len(corrupt)} of {total} files cannot be used, more than the budget of {budget:.1%} "
            f"(error_budget); {kept}:{lines}"
        )
    if not written:
        for folder in folders:
            remove(folder)
        raise BuildError(f"none of {total} files can be used; nothing was written:{lines}")


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
