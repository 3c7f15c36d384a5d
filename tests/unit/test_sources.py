"""Data sets are written atomically, and read in random order by any thread or process, without TensorFlow."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jvgen import exit_codes
from jvgen.data.store import shards
from jvgen.data.store.records import Record
from jvgen.data.store.shards import CorruptShard
from jvgen.data.store.sources import Source, find_dataset, open_source, read_metadata, splits
from jvgen.data.store.writer import Writer
from jvgen.storage import StorageUnavailable, retries


def record(number: int) -> Record:
    rng = np.random.default_rng(number)
    frames = 1 + number % 4
    return Record(
        id=f"r{number}", kind="dynamic", clips=(rng.bytes(500 + number),), captions=("a", "b")[: number % 3],
        frames_per_second=8, frames=frames, height=16, width=16,
        actions=rng.normal(size=(frames, 2)).astype(np.float32) if number % 2 else np.zeros((0, 0), np.float32),
    )  # fmt: skip


def write(out: Path, train: int = 12, validation: int = 3, **options) -> Path:
    with Writer(out, description="test", metadata={"origin": "test"}, **options) as writer:
        for number in range(train + validation):
            writer.add("train" if number < train else "validation", record(number))
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "set", shard_bytes=2000)


def check(source: Source, rows: range | list[int]) -> None:
    for row in rows:
        read = source.read(row)
        assert read.id == f"r{row}" and read.clips == record(row).clips and read.captions == record(row).captions
        np.testing.assert_array_equal(read.actions, record(row).actions)


def test_random_access_over_several_files(dataset: Path) -> None:
    assert len(list(dataset.glob("*array_record*train*"))) + len(list(dataset.glob("*train*array_record*"))) > 2
    source = open_source(dataset, "train")
    assert len(source) == len(source.index) == 12
    check(source, [11, 0, 5, 5, 3])
    with pytest.raises(IndexError):
        source.read(12)
    assert splits(dataset) == {"train": 12, "validation": 3}
    assert open_source(dataset, "validation").read(0).id == "r12"
    assert read_metadata(dataset)["digests"]["train"] == source.index.digest


def test_pickled_copies_and_threads(dataset: Path) -> None:
    source = open_source(dataset, "train")
    check(source, [1])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.index.digest == source.index.digest
    failures = []

    def work(seed: int) -> None:
        try:
            check(copy, np.random.default_rng(seed).integers(0, 12, 20).tolist())
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_bounded_number_of_shards_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many shards as records, eight threads, three open files."""
    folder = write(tmp_path / "set", shard_bytes=1, train=30)
    assert len(list(folder.glob("*train*array_record*"))) == 30
    opened = shards.OpenShards(limit=3)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", opened)
    source = open_source(folder, "train")
    check(source, [0])

    def descriptors() -> int:
        names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum(str(folder) in name and "array_record" in name for name in names)

    with ThreadPoolExecutor(8) as threads:
        rows = np.random.default_rng(0).integers(0, 30, (8, 60)).tolist()
        list(threads.map(lambda row: check(source, row), rows))
    assert len(opened) == 3 == descriptors()
    # The one that was used last is still open; the one that was used first is not.
    check(source, [1, 2, 3])
    records = source._opened
    key = records._shards[3].path, records._versions[3]
    used = opened.reader(*key)
    check(source, [4, 5])
    assert opened.reader(*key) is used
    check(source, [6, 7, 8])
    assert opened.reader(*key) is not used


def test_a_data_set_that_is_built_again_at_its_path_is_read_anew(tmp_path: Path) -> None:
    """A notebook builds, reads, removes and builds again; the file that is still open has the first records."""
    folder = write(tmp_path / "set", train=2)
    check(open_source(folder, "train"), [0, 1])
    shutil.rmtree(folder)
    with Writer(folder, description="test", metadata={}) as writer:
        for number in (1, 0):
            writer.add("train", record(number))
    source = open_source(folder, "train")
    assert [source.read(row).id for row in (0, 1)] == ["r1", "r0"]


def test_shards_of_another_build_than_the_index_are_refused(tmp_path: Path) -> None:
    """As a copy that was interrupted leaves them, or a build that replaces what a run is reading."""
    one, other = write(tmp_path / "set"), write(tmp_path / "other" / "set", train=13)
    source = open_source(one, "train")
    with Writer(tmp_path / "third" / "set", description="test", metadata={}) as writer:
        for number in range(12):
            writer.add("train", record(number + 1))
    shard = next(path for path in one.iterdir() if "train" in path.name and path.is_file() and "index" not in path.name)
    shutil.copy(other / shard.name, shard)
    assert open_source(one, "train").read(3).id == "r3"  # the same records
    shutil.copy(tmp_path / "third" / "set" / shard.name, shard)
    for reader in (source, open_source(one, "train")):
        with pytest.raises(CorruptShard, match="record 3 is 'r4' .1 x 1 frames of 16x16., in the index it is 'r3': "):
            reader.read(3)


@pytest.mark.parametrize("left", [0, 1000, 65536, 70000, 131072, -10])
def test_a_truncated_shard_is_named(tmp_path: Path, left: int) -> None:
    """What ArrayRecord says of it differs: nothing for 64 KiB, of which it gives empty records."""
    with Writer(tmp_path / "set", description="test", metadata={}) as writer:
        for number in range(8):
            clip = np.random.default_rng(number).bytes(30000)
            writer.add("train", Record(id=f"r{number}", kind="dynamic", clips=(clip,), frames=1, height=8, width=8))
    [file] = (tmp_path / "set").glob("*array_record*")
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(shards.CorruptShard, match=f"{file.name} is corrupt: "):
        open_source(tmp_path / "set", "train").read(7)


@pytest.mark.parametrize("failures", [2, 100])
def test_a_read_that_fails_is_tried_again(dataset: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """A mounted bucket or a file server that is away for a moment; a reader that has failed stays so."""
    waits, opened, real = [], [], shards._open

    class Failing:
        def read(self, positions):
            raise RuntimeError("read() failed: Input/output error; reading x; at byte 0")

    def open_(path, cache):
        opened.append(path)
        return Failing() if len(opened) <= failures else real(path, cache)

    monkeypatch.setattr(retries, "_sleep", waits.append)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", shards.OpenShards())
    monkeypatch.setattr(shards, "_open", open_)
    source = open_source(dataset, "train")
    if failures == 2:
        check(source, [0])
        assert len(waits) == 2
    else:
        with pytest.raises(StorageUnavailable, match="after 5 attempts.*Input/output error") as caught:
            source.read(0)
        assert exit_codes.of_error(caught.value) == exit_codes.restart_code()


def test_plain_tfds_reads_it_without_tensorflow(dataset: Path) -> None:
    code = f"""
        import sys
        import tensorflow_datasets as tfds
        builder = tfds.builder_from_directory({str(dataset)!r})
        source = builder.as_data_source("train")
        assert len(source) == 12 and source[3]["id"] == b"r3", source[3]
        assert len(source[3]["clips"]) == 1 and source[2]["intrinsics"].shape == (0, 4)
        assert builder.info.splits["validation"].num_examples == 3
        from jvgen.data.store.sources import open_source
        assert open_source({str(dataset)!r}, "train").read(3).id == "r3"
        assert not [name for name in sys.modules if name == "tensorflow" or name.startswith("tensorflow.")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_a_data_set_can_be_moved(dataset: Path, tmp_path: Path) -> None:
    moved = write(tmp_path / "first").rename(tmp_path / "second")
    check(open_source(moved, "train"), range(12))


def test_missing_data_sets_and_splits_are_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no split 'test'. Its splits: train \(12 records\), validation \(3 records\)"
    ):
        open_source(dataset, "test")
    with pytest.raises(ValueError, match="does not exist. Did you mean .*set"):
        open_source(dataset.with_name("sett"), "train")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="contains no data set .*notes.txt"):
        open_source(tmp_path, "train")
    with pytest.raises(ValueError, match="is a file"):
        open_source(tmp_path / "notes.txt", "train")
    write(tmp_path / "one")
    assert find_dataset(tmp_path) == tmp_path / "one"
    write(tmp_path / "two")
    with pytest.raises(ValueError, match="contains 2 data sets.*one.*two"):
        open_source(tmp_path, "train")
    (tmp_path / "one" / "index-train.json").unlink()
    with pytest.raises(ValueError, match="has no index-train.json"):
        open_source(tmp_path / "one", "train")
    (tmp_path / "two" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_info.json"):
        open_source(tmp_path / "two", "train")


def test_an_index_of_another_data_set_is_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", train=5)
    (one / "index-train.json").write_bytes((two / "index-train.json").read_bytes())
    with pytest.raises(ValueError, match=r"index-train/\w+.npy: no such file; the index needs it"):
        open_source(one, "train")
    shutil.copytree(two / "index-train", one / "index-train", dirs_exist_ok=True)
    with pytest.raises(FileNotFoundError, match="two-train.array_record-00000"):
        open_source(one, "train").read(0)


def test_nothing_is_overwritten_unless_requested(tmp_path: Path) -> None:
    out = write(tmp_path / "set")
    before = open_source(out, "train").index.digest
    with pytest.raises(ValueError, match="already contains a data set"):
        write(out, train=3)
    assert open_source(out, "train").index.digest == before
    write(out, train=3, overwrite=True)
    assert len(open_source(out, "train")) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other than a data set"):
        write(tmp_path / "other", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "set"]


def test_a_link_is_followed_to_the_folder_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large disk" / "set").mkdir(parents=True)
    link = tmp_path / "set"
    link.symlink_to(tmp_path / "large disk" / "set")
    write(link)
    write(link, overwrite=True, train=2)
    assert link.is_symlink() and splits(tmp_path / "large disk" / "set")["train"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"set", "large disk"}
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="set' is a mount point, .*use a folder in it, '.*/set/data'"):
        write(link, overwrite=True)


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'r0' occurs twice"):
        with Writer(tmp_path / "set", description="") as writer:
            writer.add("train", record(0))
            writer.add("train", record(0))
    with pytest.raises(ValueError, match="nothing to write"):
        with Writer(tmp_path / "set", description=""):
            pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from array_record.python import array_record_module

    class FullDisk:
        def __init__(self, path: str, options: str):
            Path(path).write_bytes(b"")

        def write(self, record: bytes) -> None:
            """Buffers, as the real one does."""

        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", FullDisk)
    with pytest.raises(OSError, match="cannot write .*No space left on device"):
        write(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_killed_build_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from jvgen.data.store.records import Record
        from jvgen.data.store.writer import Writer
        with Writer({str(tmp_path / "set")!r}, description="") as writer:
            for number in range(50):
                writer.add("train", Record(id=str(number), kind="image", clips=(b"x" * 1000,), height=1, width=1))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    assert [path.name[:12] for path in tmp_path.iterdir()] == [".set.partial"]
    with pytest.raises(ValueError, match="contains no data set"):
        open_source(tmp_path, "train")
    write(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_running_build_is_left_alone(tmp_path: Path) -> None:
    import socket

    other = tmp_path / f".set.partial-{socket.gethostname()}-{os.getppid()}"
    other.mkdir()
    write(tmp_path / "set")
    assert other.is_dir()


def test_metadata(dataset: Path, tmp_path: Path) -> None:
    stored = json.loads((dataset / "jvgen.json").read_text())
    assert stored["origin"] == "test" and set(stored["digests"]) == {"train", "validation"}
    with pytest.raises(ValueError, match="has no jvgen.json"):
        read_metadata(tmp_path)
