"""The folder in which a build, or a part of one, keeps its finished units until they are a data set."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jvgen import storage
from jvgen.data.builders.jobs import BuildJob
from jvgen.data.builders.units import Done, Unit, read_done, remove_unfinished
from jvgen.storage import read_json_object, write_text

DESCRIPTION = "build.json"
_LOCK = "lock"
_FORMAT = 1  # of build.json
# Options that say where the recordings are on a machine.
_PLACES = ("folder", "cameras", "media", "source", "table", "videos")
# Metadata that a device computes: its last bits may be others on another machine.
_COMPUTED = ("empty_caption",)
# Seconds of work that are thrown away when a build fails, and without being asked when another one begins.
_NOTHING, _CHEAP = 10.0, 600.0


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What is being built: equal for all parts of one build, but for `part` and the places in `metadata`.

    Attributes:
      identity: hash of jobs, options and format.
      description, metadata: of the data set.
      part, parts: which part this is, from 1, of how many.
      units, jobs: numbers of the whole build.
      jobs_per_unit: at most.
      error_budget: fraction of the jobs that may be corrupt.
    """

    identity: str
    description: str
    metadata: dict[str, Any]
    part: int
    parts: int
    units: int
    jobs: int
    jobs_per_unit: int
    error_budget: float

    def numbers(self) -> range:
        """Numbers of the units of this part."""
        return range(self.part - 1, self.units, self.parts)

    def options(self) -> dict[str, Any]:
        """The options on which records depend."""
        given = self.metadata.get("options", {})
        return {"origin": self.metadata.get("origin"), **{k: v for k, v in given.items() if k not in _PLACES}}


def identity_of(jobs: Sequence[BuildJob], metadata: dict[str, Any], jobs_per_unit: int) -> str:
    """The hash that two parts of a build share: of names, states and splits of the jobs, and of the options."""
    options = {k: v for k, v in metadata.get("options", {}).items() if k not in _PLACES}
    rest = {k: v for k, v in metadata.items() if k not in ("options", *_COMPUTED)}
    state = hashlib.sha256(json.dumps([_FORMAT, rest, options, jobs_per_unit], sort_keys=True, default=str).encode())
    for job in jobs:
        state.update(json.dumps([job.split, job.name, job.state]).encode())
    return state.hexdigest()


def part_folder(out: storage.Path, part: int, parts: int) -> storage.Path:
    """Where a part of the data set at `out` is built."""
    width = len(str(parts))
    return out.parent / f"{out.name}.part-{part:0{width}d}-of-{parts}"


def read_info(folder: storage.Path) -> BuildInfo | None:
    """What is being built in a folder; None if it is not a build."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    stored = read_json_object(path)
    if stored.pop("format", None) != _FORMAT:
        raise ValueError(f"{path}: written by another version of jvgen; build it with that version, or again.")
    return BuildInfo(**stored)


@contextlib.contextmanager
def opened(folder: Path, info: BuildInfo, *, restart: bool = False) -> Iterator[list[Done]]:
    """Begin or continue a build in a folder, which nobody else builds in meanwhile; yields the units that are done.

    Raises:
      ValueError: another build is there that took long, or somebody builds in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"{folder}: another process is building here; wait for it, or use another --out."):
        before = read_info(folder)
        done = finished(folder, before) if before is not None else []
        if before is not None and (restart or before.identity != info.identity or before.parts != info.parts):
            seconds = sum(unit.seconds for unit in done)
            if not restart and seconds > _CHEAP:
                raise ValueError(
                    f"{folder} holds {len(done)} of {len(before.numbers())} units ({seconds / 3600:.1f} h of work) of "
                    f"another build: {difference(before, info)}. Finish it with its own options, or pass --restart to "
                    "remove it."
                )
            for path in folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
            done = []
        write_text(folder / DESCRIPTION, json.dumps({"format": _FORMAT, **dataclasses.asdict(info)}, indent=1) + "\n")
        remove_unfinished(folder, done)
        try:
            yield done
        except BaseException:
            if not is_worth_keeping(finished(folder, info)):
                remove(folder)
            raise


def finished(folder: storage.Path, info: BuildInfo) -> list[Done]:
    """The units of a build that are done, in order."""
    found = (read_done(folder, number) for number in info.numbers())
    return [unit for unit in found if unit is not None]


def is_worth_keeping(done: Sequence[Done]) -> bool:
    """Whether a build that fails leaves what is finished, to go on with it later."""
    return sum(unit.seconds for unit in done) > _NOTHING


def remove(folder: storage.Path) -> None:
    """Delete a build."""
    storage.remove_tree(folder)


def checked_parts(folders: Sequence[storage.Path]) -> tuple[BuildInfo, list[tuple[storage.Path, Done]]]:
    """All units of a build in order, with the folders that they are in.

    Raises:
      ValueError: a folder that is not a part, parts of different builds, a part twice, missing or unfinished. The
        message says which; nothing is changed.
    """
    infos: dict[storage.Path, BuildInfo] = {}
    for folder in dict.fromkeys(folders):
        info = read_info(folder) if folder.is_dir() else None
        if info is None:
            raise ValueError(f"{folder} is not a part of a build (no {DESCRIPTION}): pass folders that --part made.")
        infos[folder] = info
    first_folder, first = next(iter(infos.items()))
    problems = []
    by_part: dict[int, storage.Path] = {}
    for folder, info in infos.items():
        if info.identity != first.identity or info.parts != first.parts:
            problems.append(f"{folder} is of another build than {first_folder}: {difference(first, info)}")
        elif info.part in by_part:
            problems.append(f"{by_part[info.part]} and {folder} are both part {info.part} of {info.parts}")
        else:
            by_part[info.part] = folder
    missing = [str(number) for number in range(1, first.parts + 1) if number not in by_part]
    if missing and not problems:
        problems.append(f"of {first.parts} parts, {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    units: list[tuple[storage.Path, Done]] = []
    for folder in by_part.values():
        done, wanted = finished(folder, infos[folder]), len(infos[folder].numbers())
        if len(done) < wanted:
            problems.append(f"{folder} has {len(done)} of its {wanted} units: run its command again to finish it")
        units += [(folder, unit) for unit in done]
    if problems:
        raise ValueError("the parts cannot be merged, and nothing was changed:\n  " + "\n  ".join(problems))
    return first, sorted(units, key=lambda item: item[1].number)


def linked(path: storage.Path, folder: Path) -> Path:
    """A file with the same content in a local folder: a link where the disk is the same, else a copy."""
    target = folder / path.name
    if storage.is_remote(path):
        storage.copy_file(path, target)
        return target
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, target)
    return target


def of_part(units: Sequence[Unit], part: int, parts: int) -> list[Unit]:
    """The units that a part makes."""
    return list(units[part - 1 :: parts])


def difference(one: BuildInfo, other: BuildInfo) -> str:
    """How two builds differ, in words."""
    if one.parts != other.parts:
        return f"one has {one.parts} parts, the other {other.parts}"
    mine, theirs = one.options(), other.options()
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    if names:
        return ", ".join(f"{name} = {mine.get(name)!r} and {theirs.get(name)!r}" for name in names)
    if one.jobs != other.jobs:
        return f"{one.jobs} and {other.jobs} files"
    if one.jobs_per_unit != other.jobs_per_unit:
        return f"{one.jobs_per_unit} and {other.jobs_per_unit} files per unit"
    return "other files, captions or splits"


@contextlib.contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Keep a folder for this process.

    Raises:
      ValueError: another process has it; with the message.
    """
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(message) from error
        yield
