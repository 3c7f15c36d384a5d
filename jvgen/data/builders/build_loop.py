"""The loop behind every build: make records side by side, filter them, split them, and account for what was refused."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jvgen.config import Config
from jvgen.data.store.records import KINDS, Record
from jvgen.data.store.writer import Writer
from jvgen.data.video_files import DecodeError

Progress = Callable[[int, int], None]
_AHEAD = 4  # pieces of work in flight for each worker
_PIECE = 8  # jobs handed to a process at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig(Config):
    """Which records a build keeps. Evaluated here, so that no pipeline ever has to skip one.

    Attributes:
      min_frames: clips with fewer are left out (images always have one and are not held to this).
      min_height, min_width: smaller ones are left out.
      caption_required: leave out records without a caption.
      kinds: keep only these kinds; empty for all.
    """

    min_frames: int = 1
    min_height: int = 1
    min_width: int = 1
    caption_required: bool = False
    kinds: tuple[str, ...] = ()

    def validate(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"kinds = {self.kinds}: each one of {', '.join(KINDS)}.")

    def refuses(self, record: Record) -> str | None:
        """Why a record is left out, or None."""
        if self.kinds and record.kind not in self.kinds:
            return f"kind {record.kind} is not one of {', '.join(self.kinds)}"
        if record.kind != "image" and record.frames < self.min_frames:
            return f"{record.frames} frames, fewer than {self.min_frames}"
        if record.height < self.min_height or record.width < self.min_width:
            return f"{record.width}x{record.height}, smaller than {self.min_width}x{self.min_height}"
        if self.caption_required and not record.captions:
            return "has no caption"
        return None


@dataclasses.dataclass(frozen=True)
class Refused:
    """Something that did not become a record: its name, why, and whether it is damaged or merely filtered out."""

    name: str
    reason: str
    damaged: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a build did.

    Attributes:
      out: the data set's folder.
      counts: records by split and kind.
      refused: what was left out, and why.
      digests: the index digest of each split.
      bytes: size on disk.
      seconds: how long it took.
    """

    out: Path
    counts: dict[str, dict[str, int]]
    refused: tuple[Refused, ...]
    digests: dict[str, str]
    bytes: int
    seconds: float

    @property
    def records(self) -> int:
        """Records in all splits."""
        return sum(sum(kinds.values()) for kinds in self.counts.values())

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.records} records, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"]
        for split, kinds in self.counts.items():
            parts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            lines.append(f"  {split}: {parts} (digest {self.digests[split][:12]})")
        if self.refused:
            lines.append(f"  left out: {len(self.refused)} (listed in refused.jsonl)")
            lines += [f"    {item.name}: {item.reason}" for item in self.refused[:10]]
        return "\n".join(lines)


class BuildError(ValueError):
    """Too many files are damaged, or none can be used; the message lists them all."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work: the split and the name of the record to be, and what its maker needs."""

    split: str
    name: str
    payload: Any


def assemble(
    out: str | Path,
    tasks: Sequence[Task],
    make: Callable[[Any], Any],
    *,
    description: str,
    metadata: dict[str, Any],
    finish: Callable[[Any], Record] | None = None,
    filters: FilterConfig | None = None,
    refuse_budget: float = 0.0,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    workers: int = 1,
    processes: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Make a record of every task and write them, in order.

    Args:
      out: the data set's folder.
      tasks: what is to be made.
      make: turns a task's payload into a record; raises `DecodeError` for a damaged one. With `processes` it must be
        picklable.
      description: one line for `dataset_info.json`.
      metadata: JSON values for `jvgen.json`.
      finish: turns what `make` returns into the record, in this thread (for work on an accelerator).
      filters: which records to keep.
      refuse_budget: share of the tasks that may be damaged before the build stops (after having looked at all).
      overwrite: replace a data set at `out`.
      shard_bytes: size of the ArrayRecord files.
      workers: records made side by side.
      processes: in processes rather than threads.
      progress: called with (done, total).

    Raises:
      BuildError: over the budget, or nothing left. No data set is written then.
      ValueError: something is in the way at `out`.
    """
    began = time.perf_counter()
    filters = filters or FilterConfig()
    filters.validate()
    refused: list[Refused] = []
    counts: dict[str, collections.Counter] = {}
    sizes = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    with Writer(out, description=description, metadata=metadata, overwrite=overwrite, **sizes) as writer:
        made = _in_order(make, [task.payload for task in tasks], workers, processes)
        for done, (task, outcome) in enumerate(zip(tasks, made, strict=True), 1):
            if isinstance(outcome, _Damaged):
                refused.append(Refused(task.name, outcome.reason, damaged=True))
            else:
                record = finish(outcome) if finish is not None else outcome
                reason = filters.refuses(record)
                if reason is None:
                    writer.add(task.split, record)
                    counts.setdefault(task.split, collections.Counter())[record.kind] += 1
                else:
                    refused.append(Refused(task.name, reason, damaged=False))
            if progress is not None:
                progress(done, len(tasks))
        _check_budget(refused, len(tasks), refuse_budget, written=bool(counts))
        if refused:
            lines = [json.dumps(dataclasses.asdict(item)) + "\n" for item in refused]
            writer.attach("refused.jsonl", "".join(lines))
    return Summary(
        out=writer.out,
        counts={split: dict(kinds) for split, kinds in counts.items()},
        refused=tuple(refused),
        digests=writer.digests,
        bytes=sum(path.stat().st_size for path in writer.out.iterdir()),
        seconds=time.perf_counter() - began,
    )


def split_of(names: Sequence[str], validation: float) -> list[str]:
    """Put names into "train" and "validation" by their hash.

    A name keeps its side when others come or go, but for a few at the border. At least one of two or more names is for
    validation unless the share is 0.

    Raises:
      ValueError: a share that leaves nothing to train on.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation = {validation}: the share of records held out, from 0 up to 1.")
    wanted = max(1, round(validation * len(names))) if validation and len(names) > 1 else 0
    order = sorted(range(len(names)), key=lambda i: hashlib.blake2b(names[i].encode()).digest())
    held_out = set(order[: min(wanted, len(names) - 1)])
    return ["validation" if i in held_out else "train" for i in range(len(names))]


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_budget(refused: list[Refused], total: int, budget: float, *, written: bool) -> None:
    damaged = [item for item in refused if item.damaged]
    lines = "".join(f"\n  {item.name}: {item.reason}" for item in (damaged if written else refused))
    if len(damaged) > budget * total:
        raise BuildError(
            f"{len(damaged)} of {total} files cannot be used, more than the budget of {budget:.1%} "
            f"(refuse_budget); nothing was written:{lines}"
        )
    if not written:
        raise BuildError(f"none of {total} files can be used; nothing was written:{lines}")


@dataclasses.dataclass(frozen=True)
class _Damaged:
    reason: str


def _in_order(make: Callable[[Any], Any], payloads: list[Any], workers: int, processes: bool) -> Iterator[Any]:
    """What `make` returns (or `_Damaged`), in order, with a bounded number of results in memory."""
    if workers <= 1:
        for payload in payloads:
            yield _attempt(make, payload)
        return
    size = _PIECE if processes else 1
    pieces = (payloads[start : start + size] for start in range(0, len(payloads), size))
    with _pool(workers, processes) as pool:
        waiting = collections.deque(
            pool.submit(_attempt_all, make, p) for p in itertools.islice(pieces, _AHEAD * workers)
        )
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_attempt_all, make, p) for p in itertools.islice(pieces, 1))


def _pool(workers: int, processes: bool) -> concurrent.futures.Executor:
    if not processes:
        return concurrent.futures.ThreadPoolExecutor(workers)
    # A fork would copy the threads' locks of whatever the program has imported.
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _attempt_all(make: Callable[[Any], Any], payloads: Iterable[Any]) -> list[Any]:
    return [_attempt(make, payload) for payload in payloads]


def _attempt(make: Callable[[Any], Any], payload: Any) -> Any:
    try:
        return make(payload)
    except DecodeError as error:
        return _Damaged(str(error))
