"""Building, merging and appending in buckets: the files of a local build, from any machine, and nothing half done."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from jvgen import storage
from jvgen.data.builders import build_folder, remote_part
from jvgen.data.builders.assembly import append_parts, merge_parts
from jvgen.data.builders.build_loop import BuildJob, Execution, build_dataset
from jvgen.data.image_files import DecodeError
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source
from jvgen.data.store.verify import verify
from jvgen.data.video_files import encode_image
from jvgen.storage import paths, retries
from tests.fake_bucket import buckets  # noqa: F401

COUNT = 11


def record(number: int) -> Record:
    if number == 4:
        raise DecodeError("damaged")
    clip = encode_image(np.full((8, 8, 3), 20 * number % 255, np.uint8))
    return Record(id=f"r{number:02d}", kind="image", clips=(clip,), height=8, width=8)


def built(out, numbers=range(COUNT), **execution):
    jobs = [BuildJob("validation" if n % 5 == 0 else "train", f"r{n:02d}", n) for n in numbers]
    return build_dataset(out, jobs, record, description="images", metadata={"origin": "test", "options": {}},
                         error_budget=0.2, execution=Execution(jobs_per_unit=2, **execution))  # fmt: skip


@pytest.fixture
def remote(buckets, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("JVGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(retries, "_sleep", lambda seconds: None)
    return f"gs://bucket/{tmp_path.name}"


def contents(folder) -> dict[str, bytes]:
    folder = storage.as_path(folder)
    names = [path for path in (*folder.iterdir(), *folder.glob("index-*/*")) if path.is_file()]
    return {str(path).removeprefix(str(folder)): storage.read_bytes(path) for path in names}


def check(out, expected: Path) -> None:
    """All files are those of a local build; records can be read."""
    mine, theirs = contents(out), contents(expected)
    assert set(mine) == set(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert not verify(out, "train")


def test_builds_merged_parts_and_appended_records_are_those_on_a_disk(remote, tmp_path):
    built(f"{remote}/one/set")
    built(tmp_path / "one" / "set")
    check(f"{remote}/one/set", tmp_path / "one" / "set")
    with pytest.raises(ValueError, match="already contains a data set"):
        built(f"{remote}/one/set")
    for place in (f"{remote}/two", tmp_path / "two"):
        parts = [built(f"{place}/set", part=part, parts=2).out for part in (1, 2)]
        merge_parts(parts, f"{place}/set")
    check(f"{remote}/two/set", tmp_path / "two" / "set")
    assert [path.name for path in storage.as_path(f"{remote}/two").iterdir()] == ["set"], "parts are removed"
    for place in (f"{remote}/two", tmp_path / "two"):
        before = open_source(f"{place}/set", "train").index.digest
        built(f"{place}/set", range(COUNT + 4), append=True)
        more = [built(f"{place}/more", range(30, 36), part=part, parts=2).out for part in (1, 2)]
        append_parts(f"{place}/set", more)
        source = open_source(f"{place}/set", "train")
        assert source.index.digest != before and "r33" in list(source.index.id)
    check(f"{remote}/two/set", tmp_path / "two" / "set")
    assert not list((tmp_path / "scratch").iterdir()), "nothing is left on this machine"


def test_parts_of_a_bucket_make_a_data_set_on_a_disk(remote, tmp_path, jvgen):
    for part in (1, 2, 3):
        built(f"{remote}/set", part=part, parts=3)
    done = jvgen("data", "merge", f"{remote}/set.part-*", "--out", tmp_path / "set")
    assert done.status == 0, done.err
    built(tmp_path / "other" / "set")
    check(tmp_path / "set", tmp_path / "other" / "set")
    done = jvgen("data", "merge", f"{remote}/set.part-*", "--out", tmp_path / "again")
    assert done.status != 0 and "no folder in the bucket matches" in done.err


def test_a_part_goes_on_on_another_machine(remote, tmp_path, monkeypatch):
    push, made = remote_part.RemotePart.push, []

    def killed(self, done):
        push(self, done)
        made.append(done.number)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(remote_part.RemotePart, "push", killed)
    with pytest.raises(KeyboardInterrupt):
        built(f"{remote}/set", part=1, parts=1 + 1)
    monkeypatch.setattr(remote_part.RemotePart, "push", push)
    shutil.rmtree(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    calls = []

    def counted(number: int) -> Record:
        calls.append(number)
        return record(number)

    jobs = [BuildJob("validation" if n % 5 == 0 else "train", f"r{n:02d}", n) for n in range(COUNT)]
    for part in (1, 2):
        build_dataset(f"{remote}/set", jobs, counted, description="images", metadata={"origin": "test", "options": {}},
                      error_budget=0.2, execution=Execution(jobs_per_unit=2, part=part, parts=2))  # fmt: skip
    assert len(calls) == COUNT - 4, "two units of two jobs were finished"
    merge_parts([f"{remote}/set.part-{part}-of-2" for part in (1, 2)], f"{remote}/set")
    built(tmp_path / "local" / "set")
    check(f"{remote}/set", tmp_path / "local" / "set")


def test_units_whose_shards_are_in_no_bucket_are_made_again(remote, tmp_path, monkeypatch):
    """They were uploaded to a folder that is gone, or to another bucket; this machine has only their rows."""
    push = remote_part.RemotePart.push

    def killed(self, done):
        push(self, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(remote_part.RemotePart, "push", killed)
    monkeypatch.setattr(build_folder, "_NOTHING", 0.0)
    with pytest.raises(KeyboardInterrupt):
        built(f"{remote}/set", part=1, parts=2)
    monkeypatch.setattr(remote_part.RemotePart, "push", push)
    assert list((tmp_path / "scratch").glob(".set.part-*/unit-*.json")), "nothing is left to be mistaken"
    storage.remove_tree(storage.as_path(f"{remote}/set.part-1-of-2"))
    merge_parts([built(f"{remote}/set", part=part, parts=2).out for part in (1, 2)], f"{remote}/set")
    built(tmp_path / "local" / "set")
    check(f"{remote}/set", tmp_path / "local" / "set")


def test_a_part_that_another_process_has_begun_since_is_left_to_it(remote, tmp_path, monkeypatch):
    """Two machines with the same --part: one ends, with a message, and the other finishes the part."""
    push, begun = remote_part.RemotePart.push, []

    def interrupted(self, done):
        push(self, done)
        if not begun:
            begun.append(remote_part.RemotePart(self.remote, self._local, self._info))
            begun[0].fetch(restart=False)

    monkeypatch.setattr(remote_part.RemotePart, "push", interrupted)
    with pytest.raises(ValueError, match=r"set.part-1-of-2: process \d+ on .* has begun to build this part since"):
        built(f"{remote}/set", part=1, parts=2)
    parts = [built(f"{remote}/set", part=part, parts=2).out for part in (1, 2)]
    merge_parts(parts, f"{remote}/set")
    built(tmp_path / "one" / "set")
    check(f"{remote}/set", tmp_path / "one" / "set")


def test_files_are_copied_between_buckets_of_two_kinds(remote, monkeypatch):
    monkeypatch.setitem(paths.SCHEMES, "s3", ("json", "s3"))  # the package is not needed here
    source, target = storage.as_path(f"{remote}/x"), storage.as_path("s3://bucket/copied")
    storage.write_bytes(source, b"shard")
    storage.copy_file(source, target)
    assert storage.read_bytes(target) == b"shard" and not storage.as_path("gs://bucket/copied").exists()


def test_mistakes_change_nothing(remote, tmp_path):
    parts = [built(f"{remote}/set", part=part, parts=2).out for part in (1, 2)]
    with pytest.raises(ValueError, match="of 2 parts, 1 is missing"):
        merge_parts(parts[1:], f"{remote}/set")
    with pytest.raises(ValueError, match="holds another build: 11 and 9 files"):
        built(f"{remote}/set", range(9), part=1, parts=2)
    with pytest.raises(ValueError, match="is in a bucket; build on a disk that all machines see"):
        built(f"{remote}/set", engine="ray")
    merge_parts(parts, f"{remote}/set")
    with pytest.raises(ValueError, match="has all 11 records already|nothing to append"):
        built(f"{remote}/set", [n for n in range(COUNT) if n != 4], append=True)
    more = [
        built(f"{remote}/more", range(8, 14), part=1, parts=1 + 1).out,
        built(f"{remote}/more", range(8, 14), part=2, parts=2).out,
    ]
    before = contents(f"{remote}/set")
    with pytest.raises(ValueError, match="occurs twice"):
        append_parts(f"{remote}/set", more)
    assert contents(f"{remote}/set") == before
