"""The loop behind every build: make records in parallel, filter and write them in order, and log the rejected ones."""

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
from typing import Any

from jvgen import storage
from jvgen.config import Config, ConfigError
from jvgen.data.store.records import KINDS, Record
from jvgen.data.store.writer import Writer
from jvgen.data.video_files import DecodeError
from jvgen.storage import Path
from jvgen.value_rules import CountOrZero

Progress = Callable[[int, int], None]
_CHUNKS_IN_FLIGHT = 4  # per worker
_CHUNK = 8  # jobs sent to a process at once
_REJECTED_LOG = "refused.jsonl"  # beside the data set


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig(Config):
    """Which records a build keeps. Evaluated at build time, so that training never skips a record.

    Attributes:
      min_frames: reject shorter clips (does not apply to images).
      min_height, min_width: reject smaller records, in pixels.
      caption_required: reject records without a caption.
      kinds: keep only these kinds; empty for all.
    """

    min_frames: CountOrZero = 1
    min_height: CountOrZero = 1
    min_width: CountOrZero = 1
    caption_required: bool = False
    kinds: tuple[str, ...] = ()

    def validate(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"kinds = {self.kinds}: each one of {', '.join(KINDS)}.")

    def rejects(self, record: Record) -> str | None:
        """Why a record is rejected, or None."""
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
class Rejected:
    """An input that did not become a record.

    Attributes:
      name: name of its job.
      reason: why it was rejected.
      corrupt: whether it could not be read, rather than being filtered out.
    """

    name: str
    reason: str
    corrupt: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a build.

    Attributes:
      out: folder of the data set.
      counts: number of records by split and kind.
      rejected: inputs that were left out, and why.
      digests: index digest of each split.
      bytes: size on disk.
      seconds: wall time.
    """

    out: Path
    counts: dict[str, dict[str, int]]
    rejected: tuple[Rejected, ...]
    digests: dict[str, str]
    bytes: int
    seconds: float

    @property
    def records(self) -> int:
        """Number of records in all splits."""
        return sum(sum(kinds.values()) for kinds in self.counts.values())

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.records} records, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"]
        for split, kinds in self.counts.items():
            parts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            lines.append(f"  {split}: {parts} (digest {self.digests[split][:12]})")
        if self.rejected:
            lines.append(f"  rejected: {len(self.rejected)} (listed in {_REJECTED_LOG})")
            lines += [f"    {item.name}: {item.reason}" for item in self.rejected[:10]]
        return "\n".join(lines)


class BuildError(ValueError):
    """Too many files are corrupt, or none can be used; the message lists all of them."""


@dataclasses.dataclass(frozen=True)
class BuildJob:
    """One record to make: its split, a name for messages, and the input of `make`."""

    split: str
    name: str
    payload: Any


def build_dataset(
    out: str | Path,
    jobs: Sequence[BuildJob],
    make: Callable[[Any], Any],
    *,
    description: str,
    metadata: dict[str, Any],
    finish: Callable[[Any], Record] | None = None,
    filters: FilterConfig | None = None,
    error_budget: float = 0.0,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    workers: int = 1,
    processes: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Make the record of every job and write the records in order.

    Args:
      out: folder of the data set.
      jobs: the records to make.
      make: maps the payload of a job to its record; raises `DecodeError` for corrupt input. With `processes` it must be
        picklable.
      description: one line for `dataset_info.json`.
      metadata: JSON values for `jvgen.json`.
      finish: maps the result of `make` to the record, in the calling thread (for work on an accelerator).
      filters: which records to keep.
      error_budget: fraction of the jobs that may be corrupt. The build fails at the end, when all have been read.
      overwrite: replace a data set at `out`.
      shard_bytes: size of the ArrayRecord files.
      workers: records made in parallel.
      processes: use processes rather than threads.
      progress: called with (done, total).

    Raises:
      BuildError: more corrupt inputs than the budget allows, or no record left. No data set is written.
      ValueError: `out` exists and may not be replaced.
    """
    began = time.perf_counter()
    filters = filters or FilterConfig()
    filters.validate()
    rejected: list[Rejected] = []
    counts: dict[str, collections.Counter] = {}
    sizes = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    with Writer(out, description=description, metadata=metadata, overwrite=overwrite, **sizes) as writer:
        made = _in_order(make, [job.payload for job in jobs], workers, processes)
        for done, (job, outcome) in enumerate(zip(jobs, made, strict=True), 1):
            if isinstance(outcome, _Corrupt):
                rejected.append(Rejected(job.name, outcome.reason, corrupt=True))
            else:
                record = finish(outcome) if finish is not None else outcome
                reason = filters.rejects(record)
                if reason is None:
                    writer.add(job.split, record)
                    counts.setdefault(job.split, collections.Counter())[record.kind] += 1
                else:
                    rejected.append(Rejected(job.name, reason, corrupt=False))
            if progress is not None:
                progress(done, len(jobs))
        _check_budget(rejected, len(jobs), error_budget, written=bool(counts))
        if rejected:
            rows = [{"name": item.name, "reason": item.reason, "damaged": item.corrupt} for item in rejected]
            writer.attach(_REJECTED_LOG, "".join(json.dumps(row) + "\n" for row in rows))
    return Summary(
        out=writer.out,
        counts={split: dict(kinds) for split, kinds in counts.items()},
        rejected=tuple(rejected),
        digests=writer.digests,
        bytes=sum(storage.size(path) for path in writer.out.iterdir()),
        seconds=time.perf_counter() - began,
    )


def assign_splits(names: Sequence[str], validation: float) -> list[str]:
    """Assign names to "train" and "validation" by their hash.

    When names are added or removed, all but a few of the others keep their split. Of two or more names at least one is
    for validation, unless the fraction is 0.

    Raises:
      ValueError: a fraction that leaves nothing to train on.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation = {validation}: the fraction of records held out, from 0 up to 1.")
    wanted = max(1, round(validation * len(names))) if validation and len(names) > 1 else 0
    order = sorted(range(len(names)), key=lambda i: hashlib.blake2b(names[i].encode()).digest())
    held_out = set(order[: min(wanted, len(names) - 1)])
    return ["validation" if i in held_out else "train" for i in range(len(names))]


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_budget(rejected: list[Rejected], total: int, budget: float, *, written: bool) -> None:
    corrupt = [item for item in rejected if item.corrupt]
    lines = "".join(f"\n  {item.name}: {item.reason}" for item in (corrupt if written else rejected))
    if len(corrupt) > budget * total:
        raise BuildError(
            f"{len(corrupt)} of {total} files cannot be used, more than the budget of {budget:.1%} "
            f"(error_budget); nothing was written:{lines}"
        )
    if not written:
        raise BuildError(f"none of {total} files can be used; nothing was written:{lines}")


@dataclasses.dataclass(frozen=True)
class _Corrupt:
    reason: str


def _in_order(make: Callable[[Any], Any], payloads: list[Any], workers: int, processes: bool) -> Iterator[Any]:
    """The results of `make` (or `_Corrupt`), in order, with a bounded number of results in memory."""
    if workers <= 1:
        for payload in payloads:
            yield _attempt(make, payload)
        return
    size = _CHUNK if processes else 1
    chunks = (payloads[start : start + size] for start in range(0, len(payloads), size))
    with _pool(workers, processes) as pool:
        pending = collections.deque(
            pool.submit(_attempt_all, make, c) for c in itertools.islice(chunks, _CHUNKS_IN_FLIGHT * workers)
        )
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(_attempt_all, make, c) for c in itertools.islice(chunks, 1))


def _pool(workers: int, processes: bool) -> concurrent.futures.Executor:
    if not processes:
        return concurrent.futures.ThreadPoolExecutor(workers)
    # A fork would copy locks held by threads of imported libraries.
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _attempt_all(make: Callable[[Any], Any], payloads: Iterable[Any]) -> list[Any]:
    return [_attempt(make, payload) for payload in payloads]


def _attempt(make: Callable[[Any], Any], payload: Any) -> Any:
    try:
        return make(payload)
    except ConfigError:
        raise
    except DecodeError as error:
        return _Corrupt(str(error))
    except Exception as error:
        # Libraries raise many kinds of errors for damaged files; one file must not end a build.
        return _Corrupt(f"{type(error).__name__}: {error}")
