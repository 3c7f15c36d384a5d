"""What a build is made of: jobs, the function that makes their records, filters, and what became of each job.

A builder is a list of `BuildJob`s and a function of a job's payload. The function is picklable and pure: it is called
in threads, in processes or on other machines, and again if a machine is lost.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jvgen.config import Config, ConfigError
from jvgen.data.image_files import DecodeError
from jvgen.data.store.records import KINDS, Record
from jvgen.value_rules import CountOrZero


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
class BuildJob:
    """Something to make records of.

    Attributes:
      split: of its records.
      name: unique; the id of its record, or the part of the ids of its records before the last slash: by it a build
        that appends knows what the data set has.
      payload: the input of the build's function; picklable, where processes or machines are used.
      state: what the records depend on besides the name and the options, such as captions: a build that was killed goes
        on only where these are the same.
      path: the file that is read, if it is one; its size says how many jobs make a shard.
      size: bytes that are read, where `path` does not say; 0 if unknown.
    """

    split: str
    name: str
    payload: Any
    state: str = ""
    path: Path | None = None
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An input that did not become a record.

    Attributes:
      name: name of its job, or id of its record.
      reason: why it was rejected.
      corrupt: whether it could not be read, rather than being filtered out.
    """

    name: str
    reason: str
    corrupt: bool


@dataclasses.dataclass(frozen=True)
class Made:
    """What a function makes of a payload, if it is not just one record.

    Attributes:
      records: any number, in order.
      notes: what was done besides what was asked for, such as encoding a file again; counted in the summary.
      rejected: reason why there is none, for inputs that are readable but unsuitable; "" otherwise.
    """

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    rejected: str = ""


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """A payload that could not be read, and why."""

    reason: str


class BuildError(ValueError):
    """Too many files are corrupt, or none can be used; the message lists them."""


def attempt(make: Callable[[Any], Any], payload: Any) -> Any:
    """What `make` makes of a payload, or `Corrupt`: one file never ends a build."""
    try:
        return make(payload)
    except ConfigError:
        raise
    except DecodeError as error:
        return Corrupt(str(error))
    except Exception as error:
        # Libraries raise many kinds of errors for damaged files.
        return Corrupt(f"{type(error).__name__}: {error}")


def sorted_out(job: BuildJob, result: Any, filters: FilterConfig) -> tuple[list[Record], list[Rejected], list[str]]:
    """The records to keep of what `attempt` returned, what is rejected, and notes."""
    if isinstance(result, Corrupt):
        return [], [Rejected(job.name, result.reason, corrupt=True)], []
    made = Made((result,)) if isinstance(result, Record) else result
    if made.rejected:
        return [], [Rejected(job.name, made.rejected, corrupt=False)], list(made.notes)
    kept, rejected = [], []
    for record in made.records:
        reason = filters.rejects(record)
        if reason is None:
            kept.append(record)
        else:
            rejected.append(Rejected(job.name if len(made.records) == 1 else record.id, reason, corrupt=False))
    return kept, rejected, list(made.notes)


def assign_splits(names: Sequence[str], validation: float, recordings: Sequence[str] | None = None) -> list[str]:
    """Assign names to "train" and "validation" by their hash.

    When names are added or removed, all but a few of the others keep their split. Of two or more recordings at least
    one is for validation, unless the fraction is 0.

    Args:
      names: what is assigned; unique.
      validation: fraction of the recordings that are held out.
      recordings: what each is a part of: parts of one recording have one split, or a model would be evaluated on what
        it was trained on. Each is a recording of its own if None.

    Raises:
      ValueError: a fraction that leaves nothing to train on.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation = {validation}: the fraction of records held out, from 0 up to 1.")
    # A recording is hashed by the first of its names: one with a single part has the split of its name.
    first: dict[str, str] = {}
    for name, recording in zip(names, names if recordings is None else recordings, strict=True):
        first[recording] = min(name, first.get(recording, name))
    wanted = max(1, round(validation * len(first))) if validation and len(first) > 1 else 0
    order = sorted(first, key=lambda recording: hashlib.blake2b(first[recording].encode()).digest())
    held_out = set(order[: min(wanted, len(first) - 1)])
    return ["validation" if recording in held_out else "train" for recording in recordings or names]


def nothing_held_out(splits: Sequence[str], validation: float, digests: Mapping[str, str], records: int) -> str:
    """A warning where a validation split is wanted and a data set of two records or more has none; "" otherwise.

    Args:
      splits: what `assign_splits` returned.
      validation: as there.
      digests: of the splits of the data set; empty for a part of one.
      records: that it has: more than recordings where these are cut.
    """
    if not validation or max(records, len(splits)) < 2 or "validation" in (digests or splits):
        return ""
    why = "no recording that was held out can be used" if "validation" in splits else "all records are of one recording"
    return (
        f"{why}: there is no split validation, which configs evaluate on. --set data.evaluation_sources.0.split=train "
        "evaluates on what is trained on."
    )


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
