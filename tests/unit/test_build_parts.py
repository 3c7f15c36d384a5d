"""Builds in parts, killed, resumed, merged and appended give the bytes of one build; mistakes change nothing."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.builders import assembly, build_folder, build_loop
from jvgen.data.builders.assembly import append_parts, merge_parts
from jvgen.data.builders.build_loop import BuildError, Execution
from jvgen.data.builders.folders import build_videos
from jvgen.data.builders.jobs import Corrupt, attempt
from jvgen.data.builders.media import VideoOptions
from jvgen.data.builders.robot_episodes import build_robot_episodes
from jvgen.data.builders.workers import in_order
from jvgen.data.store.sources import open_source, splits
from jvgen.data.video_files import DecodeError, encode_video

COUNT = 21


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings") / "videos"
    folder.mkdir()
    for number in range(COUNT):
        video = np.full((4, 16, 16, 3), 10 * number, np.uint8)
        (folder / f"{number:02d}.mp4").write_bytes(encode_video(video, 8))
        (folder / f"{number:02d}.txt").write_text(f"number {number}")
    (folder / "07.mp4").write_bytes(b"no video")
    return folder


def built(videos: Path, out: Path, **options) -> build_loop.Summary:
    execution = Execution(jobs_per_unit=2, **options)
    return build_videos(
        videos, out, VideoOptions(validation=0.2, keyframe_every=2), error_budget=0.1, workers=1, execution=execution
    )


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "set"
    summary = built(videos, out)
    assert summary.bytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert summary.records == COUNT - 1 and [item.name for item in summary.rejected] == ["07.mp4"]
    assert sum(splits(out).values()) == COUNT - 1
    return contents(out)


def parts_of(videos: Path, out: Path, count: int = 3) -> list[Path]:
    summaries = [built(videos, out, part=part, parts=count) for part in range(1, count + 1)]
    assert sum(summary.records for summary in summaries) == COUNT - 1 and not out.exists()
    return [Path(summary.out) for summary in summaries]


def test_merged_parts_are_the_files_of_one_build(videos: Path, whole: dict, tmp_path: Path, jvgen) -> None:
    parts = parts_of(videos, tmp_path / "set")
    assert [part.name for part in parts] == [f"set.part-{n}-of-3" for n in (1, 2, 3)]
    done = jvgen("data", "merge", *reversed(parts), "--out", tmp_path / "set")
    assert done.status == 0, done.err
    assert contents(tmp_path / "set") == whole
    assert "rejected: 1 of 21" in done.out and "1  not a readable video" in done.out and "[07.mp4]" in done.out
    # Nothing but the data set is left.
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_parts_from_the_command_line(videos: Path, tmp_path: Path, jvgen) -> None:
    for part in ("1/2", "2/2"):
        done = jvgen(
            "data", "build", "videos", videos, "--out", tmp_path / "set", "--part", part, "--error-budget", 0.1
        )
        assert done.status == 0, done.err
    done = jvgen("data", "merge", tmp_path / "set.part-1-of-2", tmp_path / "set.part-2-of-2", "--out", tmp_path / "set")
    assert done.status == 0 and sum(splits(tmp_path / "set").values()) == COUNT - 1
    for wrong in ("0/2", "3/2", "2", "a/b"):
        done = jvgen("data", "build", "videos", videos, "--out", tmp_path / "x", "--part", wrong)
        assert done.status == 2 and "expected I/N with 1 <= I <= N, for example 3/64" in done.err


KILLED = """
import os, signal, sys
from tests.unit.test_build_parts import built
from jvgen.data.builders import units
from pathlib import Path
after, commit = int(sys.argv[3]), units._commit
def counted(folder, done):
    commit(folder, done)
    if done.number == after:
        os.kill(os.getpid(), signal.SIGKILL)
units._commit = counted
built(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_build_goes_on_where_it_was(videos: Path, whole: dict, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "set"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    for after in (3, 6):
        done = subprocess.run([sys.executable, "-c", KILLED, videos, out, str(after)], env=environment)
        assert done.returncode == -signal.SIGKILL and not out.exists()
    kept = sorted((tmp_path / ".set.building").glob("unit-*.json"))
    assert len(kept) == 7
    # A shard of the attempt that was killed.
    (tmp_path / ".set.building" / "unit-000007-abcd-000.shard").write_bytes(b"half")
    read, shown = [], []

    def counted(make, payloads, *rest):
        return in_order(lambda payload: (read.append(payload), make(payload))[1], payloads, *rest)

    monkeypatch.setattr(build_loop, "in_order", counted)
    execution = Execution(jobs_per_unit=2)
    build_videos(
        videos,
        out,
        VideoOptions(validation=0.2, keyframe_every=2),
        error_budget=0.1,
        workers=1,
        execution=execution,
        progress=lambda *done: shown.append(done),
    )
    assert contents(out) == whole and len(read) == COUNT - 14
    assert shown[0] == (14, COUNT) and shown[-1] == (COUNT, COUNT)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_files_that_changed_since_are_read_again(videos: Path, tmp_path: Path, monkeypatch) -> None:
    """Also those of another folder with the same names: a data set is of one version of its recordings."""

    def killed(*arguments, **options) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr(build_folder, "_NOTHING", 0.0)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(build_loop, "complete", killed)
        built(videos, tmp_path / "set")
    assert len(list((tmp_path / ".set.building").glob("unit-*.json"))) == 11
    other = shutil.copytree(videos, tmp_path / "other")
    (other / "03.mp4").write_bytes(encode_video(np.full((7, 16, 16, 3), 200, np.uint8), 8))
    read = []

    def counted(make, payloads, *rest):
        return in_order(lambda payload: (read.append(payload.id), make(payload))[1], payloads, *rest)

    monkeypatch.setattr(build_loop, "in_order", counted)
    built(other, tmp_path / "set")
    assert len(read) == 2 and "03.mp4" in read
    monkeypatch.undo()
    built(other, tmp_path / "at once")
    assert [open_source(tmp_path / name, "train").index.digest for name in ("set", "at once")] == [
        open_source(tmp_path / "at once", "train").index.digest
    ] * 2


def test_a_kill_while_publishing_loses_nothing(videos: Path, whole: dict, tmp_path: Path, monkeypatch) -> None:
    def killed(*arguments, **options) -> None:
        raise SystemExit("killed")

    parts = parts_of(videos, tmp_path / "set")
    for name in ("publish", "move_to_out"):
        with monkeypatch.context() as patched:
            patched.setattr(assembly, name, killed)
            with pytest.raises(SystemExit):
                merge_parts(parts, tmp_path / "set")
        assert not (tmp_path / "set").exists()
    merge_parts(parts, tmp_path / "set")
    assert contents(tmp_path / "set") == whole


def test_parts_that_do_not_fit(videos: Path, whole: dict, tmp_path: Path) -> None:
    parts = parts_of(videos, tmp_path / "set")
    copy = shutil.copytree(parts[0], tmp_path / "copy")
    other = Path(
        build_videos(videos, tmp_path / "other", VideoOptions(validation=0.2, keyframe_every=3), error_budget=0.1,
                     workers=1, execution=Execution(part=2, parts=3, jobs_per_unit=2)).out
    )  # fmt: skip
    more = Path(built(videos, tmp_path / "more", part=2, parts=4).out)
    half = shutil.copytree(parts[2], tmp_path / "half")
    next(half.glob("unit-*.json")).unlink()
    damaged = shutil.copytree(parts[2], tmp_path / "damaged")
    next(damaged.glob("*.rows.npz")).unlink()
    before = {part: contents(part) for part in parts}
    for given, words in (
        (parts[:2], "of 3 parts, 3 is missing"),
        (parts[:1], "of 3 parts, 2, 3 are missing"),
        ([*parts, copy], "set.part-1-of-3 and .*copy are both part 1 of 3"),
        ([parts[0], other, parts[2]], "part-2-of-3 is of another build than .*: keyframe_every = 2 and 3"),
        ([parts[0], more, parts[2]], "is of another build than .*: one has 3 parts, the other 4"),
        ([parts[0], parts[1], half], "half has . of its . units: run its command again"),
        ([parts[0], parts[1], damaged], "damaged has . of its . units: run its command again"),
        ([parts[0], tmp_path], r"is not a part of a build \(no build.json\)"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_parts(given, tmp_path / "set")
        assert not (tmp_path / "set").exists() and {part: contents(part) for part in parts} == before
    with pytest.raises(BuildError, match="1 of 21 files cannot be used, more than the budget of 0.0%"):
        merge_parts(parts, tmp_path / "set", error_budget=0)
    merge_parts(parts, tmp_path / "set")
    assert contents(tmp_path / "set") == whole
    parts = parts_of(videos, tmp_path / "again")
    with pytest.raises(ValueError, match="already contains a data set; pass --overwrite"):
        merge_parts(parts, tmp_path / "set")
    with pytest.raises(ValueError, match="occurs twice"):
        append_parts(tmp_path / "set", parts)
    assert contents(tmp_path / "set") == whole and all(part.is_dir() for part in parts)


def test_parts_with_other_filters_are_of_another_build(tmp_path: Path) -> None:
    (tmp_path / "episodes").mkdir()
    for number in range(4):
        np.savez(tmp_path / "episodes" / f"{number}.npz", image=np.zeros((4 + number, 16, 16, 3), np.uint8))
    parts = [
        build_robot_episodes(
            tmp_path / "episodes", tmp_path / "set", validation=0, min_frames=frames, workers=1,
            execution=Execution(part=part, parts=2, jobs_per_unit=2),
        ).out
        for part, frames in ((1, 1), (2, 7))
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is of another build than .*: filters = None and .*'min_frames': 7"):
        merge_parts(parts, tmp_path / "set")


def test_one_process_writes_a_data_set(videos: Path, tmp_path: Path) -> None:
    """Two that append at once would give their shards the same names."""
    parts = parts_of(videos, tmp_path / "set")
    (tmp_path / ".set.publishing").mkdir()
    with build_folder.locked(tmp_path / ".set.publishing", ""):
        with pytest.raises(ValueError, match="set: another process is writing this data set"):
            merge_parts(parts, tmp_path / "set")
    assert merge_parts(parts, tmp_path / "set").records == COUNT - 1


def test_another_build_in_the_way(videos: Path, tmp_path: Path, monkeypatch) -> None:
    part = Path(built(videos, tmp_path / "set", part=1, parts=2).out)
    before = contents(part)
    monkeypatch.setattr(build_folder, "_CHEAP", 0.0)
    with pytest.raises(ValueError, match="h of work.*another build: keyframe_every = 2 and None.*--restart"):
        build_videos(
            videos,
            tmp_path / "set",
            VideoOptions(validation=0.2),
            workers=1,
            error_budget=0.1,
            execution=Execution(part=1, parts=2, jobs_per_unit=2),
        )
    assert contents(part) == before
    built(videos, tmp_path / "set", part=1, parts=2, restart=True)
    with build_folder.locked(part, ""), pytest.raises(ValueError, match="another process is building here"):
        built(videos, tmp_path / "set", part=1, parts=2)


def test_a_record_is_of_the_job_with_its_id_before_one_that_it_continues(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "some" / "a").mkdir(parents=True)
    (tmp_path / "some" / "a" / "b.txt").write_text("first")
    shutil.copy(videos / "00.mp4", tmp_path / "some" / "a" / "b.mp4")
    build_videos(tmp_path / "some", tmp_path / "set", VideoOptions(validation=0), workers=1)
    assert build_loop.those_in(tmp_path / "set", {"a", "a/b.mp4", "c"}) == {"a/b.mp4"}
    assert build_loop.those_in(tmp_path / "set", {"a", "c"}) == {"a"}


def test_appending(videos: Path, tmp_path: Path, jvgen) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for name in ("00", "01", "02", "03"):
        shutil.copy(videos / f"{name}.mp4", some)
        shutil.copy(videos / f"{name}.txt", some)
    build_videos(some, tmp_path / "set", VideoOptions(validation=0.25), workers=1)
    first = open_source(tmp_path / "set", "train").index
    shards = contents(tmp_path / "set")
    for name in ("04", "05", "06"):
        shutil.copy(videos / f"{name}.mp4", some)
        shutil.copy(videos / f"{name}.txt", some)
    done = jvgen("data", "build", "videos", some, "--out", tmp_path / "set", "--append", "--validation-fraction", 0)
    assert done.status == 0, done.err
    assert splits(tmp_path / "set") == {"train": 6, "validation": 1}
    source = open_source(tmp_path / "set", "train")
    assert list(source.index.id)[:3] == list(first.id) and source.read(5).captions == ("number 6",)
    kept = {name: digest for name, digest in shards.items() if "array_record" in name}
    assert kept.items() <= contents(tmp_path / "set").items()
    done = jvgen("data", "build", "videos", some, "--out", tmp_path / "set", "--append")
    assert done.status == 2 and "there is nothing to append" in done.err
    more = tmp_path / "more"
    more.mkdir()
    for name in ("08", "09"):
        shutil.copy(videos / f"{name}.mp4", more)
        shutil.copy(videos / f"{name}.txt", more)
    parts = [
        build_videos(
            more,
            tmp_path / "add",
            VideoOptions(validation=0),
            workers=1,
            execution=Execution(part=part, parts=2, jobs_per_unit=1),
        ).out
        for part in (1, 2)
    ]
    done = jvgen("data", "append", tmp_path / "set", *parts)
    assert done.status == 0, done.err
    assert list(open_source(tmp_path / "set", "train").index.id)[-2:] == ["08.mp4", "09.mp4"]
    with pytest.raises(ValueError, match="is no data set to append to"):
        build_videos(more, tmp_path / "nowhere", workers=1, execution=Execution(append=True))


def fragile(payload: int) -> int:
    if payload == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if payload == 7:
        raise DecodeError("damaged")
    return payload * payload


def test_a_file_that_ends_its_process_is_refused_alone() -> None:
    results = list(in_order(fragile, range(20), workers=2, processes=True))
    assert [r for r in results if not isinstance(r, Corrupt)] == [n * n for n in range(20) if n not in (5, 7)]
    assert "ended the process that read it" in results[5].reason and results[7].reason == "damaged"


class EndsItsProcess:
    """As a function that a spawned process cannot import."""

    def __call__(self, payload: int) -> int:
        return payload

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_processes_that_cannot_start_are_no_fault_of_files() -> None:
    with pytest.raises(BuildError, match="end when they start.*__main__"):
        list(in_order(EndsItsProcess(), range(3), workers=2, processes=True))


def test_any_error_of_a_file_is_a_refusal() -> None:
    def fails(payload: object) -> None:
        raise MemoryError("too big")

    assert attempt(fails, None) == Corrupt("MemoryError: too big")


def test_repaired_files_are_read_again(videos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build_folder, "_NOTHING", 0.0)
    copy = shutil.copytree(videos, tmp_path / "in")

    def again() -> build_loop.Summary:
        return build_videos(
            copy, tmp_path / "set", VideoOptions(validation=0), workers=1, execution=Execution(jobs_per_unit=4)
        )

    with pytest.raises(BuildError, match=r"what is finished is kept in .*\.set\.building:\n  07.mp4: not a readable"):
        again()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".set.building").glob("*.json")}
    time.sleep(0.01)
    shutil.copy(copy / "08.mp4", copy / "07.mp4")
    made = []
    write = build_loop.write_unit

    def noted(folder, unit, *rest):
        made.append(unit.number)
        return write(folder, unit, *rest)

    monkeypatch.setattr(build_loop, "write_unit", noted)
    assert again().records == COUNT and made == [1] and len(kept) > 2
