"""Shards become data sets, and data sets grow: the same records give the same bytes, and nothing is lost by a kill."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.store import dataset_info, records
from jvgen.data.store.example import NotAnExample, parse, serialize
from jvgen.data.store.index import CorruptIndex
from jvgen.data.store.index_files import load_index, verify_index
from jvgen.data.store.publish import append, publish, upgrade
from jvgen.data.store.records import Record, checksum_of
from jvgen.data.store.shard_writer import ShardWriter, is_complete, read_shard, rows_path
from jvgen.data.store.sources import open_source, read_metadata, splits
from jvgen.data.store.verify import verify
from jvgen.data.store.writer import Writer

SAVED = Path(__file__).parents[1] / "resume" / "saved_by_0_1_0" / "files.tar.xz"


def record(n: int, **changes) -> Record:
    rng = np.random.default_rng(n)
    return Record(
        id=f"r{n}", kind="dynamic", clips=(rng.bytes(300 + n),), captions=("a", "b"), frames_per_second=8, frames=3,
        height=16, width=16, actions=rng.normal(size=(3, 2)).astype(np.float32), columns={"aesthetic": n / 2},
    ).replace(**changes)  # fmt: skip


def shard(path: Path, numbers: range) -> Path:
    path.parent.mkdir(exist_ok=True)
    writer = ShardWriter(path)
    for n in numbers:
        writer.add(record(n))
    writer.close()
    return path


def files_of(folder: Path) -> dict[str, str]:
    """Digest of every file of a data set, but those with times or the folder's name in them."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "dataset_info.json")
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def check(folder: Path, numbers: list[int], split: str = "train") -> None:
    source = open_source(folder, split)
    verify_index(source.index)
    assert source.index.id.tolist() == [f"r{n}" for n in numbers] and splits(folder)[split] == len(numbers)
    for row, n in enumerate(numbers):
        read = source.read(row)
        assert read.clips == record(n).clips and read.columns == record(n).columns
        assert source.index.checksum[row] == checksum_of(read) == checksum_of(record(n))


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Protobuf libraries write maps in an order that depends on the process."""
    code = """
        import sys, numpy as np
        from pathlib import Path
        from jvgen.data.store.records import Record
        from jvgen.data.store.writer import Writer
        with Writer(sys.argv[1], description="test", metadata={"origin": "test"}, shard_bytes=2000) as writer:
            for n in range(9):
                columns = {"license": ("cc0", "cc-by")[n % 2], "x": n, "source": "s"}
                columns = dict(sorted(columns.items(), key=lambda item: hash(item[0])))
                writer.add(("train", "validation")[n > 6], Record(
                    id=f"r{n}", kind="dynamic", clips=(bytes([n]) * 700,), captions=("a",) * n, height=8, width=8,
                    frames=2, frames_per_second=8.5, actions=np.full((2, 3), n / 3, np.float32), columns=columns))
    """
    folders = [tmp_path / name / "set" for name in "ab"]
    for seed, folder in enumerate(folders):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
        subprocess.run(command, check=True, timeout=120, env=environment)
    assert files_of(folders[0]) == files_of(folders[1]) and len(files_of(folders[0])) > 7


def test_an_example_is_one_of_protobuf() -> None:
    from tensorflow_datasets.proto import tf_example_pb2

    whole = record(5, captions=(), frame_times=np.array([0, 1.5, 1e4]), latents=np.ones((1, 1, 2, 2, 4), np.float16))
    theirs = records.features().serialize_example(records.encode(whole))
    assert tf_example_pb2.Example.FromString(records.serialize(whole)) == tf_example_pb2.Example.FromString(theirs)
    assert len(records.serialize(whole)) == len(theirs)
    assert records.serialize(records.parse(theirs)) == records.serialize(whole)
    features = {
        "n": np.array([0, 1, -1, 2**62, -(2**62)]),
        "x": np.array([1.5], np.float32),
        "e": [],
        "b": [b"", b"\0"],
    }
    read = parse(serialize(features))
    assert read["n"].tolist() == features["n"].tolist() and [bytes(b) for b in read["b"]] == [b"", b"\0"]
    # A library may write values one at a time, and fields that are not known here.
    unpacked = b"\x0a\x0e\x0a\x0c\x0a\x01x\x12\x07\x12\x05\x0d\x00\x00\xc0\x3f"
    assert parse(unpacked)["x"].tolist() == [1.5]
    with pytest.raises(NotAnExample):
        parse(unpacked[:-2])
    serialized = records.serialize(whole)
    for position in range(0, len(serialized), 7):
        try:
            records.parse(serialized[:position] + bytes([serialized[position] ^ 0x55]) + serialized[position + 1 :])
            records.parse(serialized[:position])
        except NotAnExample:
            pass


def test_checksums_are_of_the_content() -> None:
    assert checksum_of(record(1)) == checksum_of(record(1, columns={"license": "cc0"}))
    changes = [
        {"clips": (b"a",)}, {"captions": ("ab",)}, {"captions": ("ab", "")}, {"frame_times": np.arange(3.0)},
        {"caption_names": ("short", "long")}, {"actions": np.zeros((3, 2))}, {"actions": np.zeros((2, 3))},
        {"rewards": np.zeros(3)},
    ]  # fmt: skip
    assert len({checksum_of(record(1, **change)) for change in [{}, *changes]}) == 1 + len(changes)


def test_published_shards_are_the_data_set_of_one_writer(tmp_path: Path) -> None:
    """Whoever writes the shards and however many there are, the digest is that of one build."""
    with Writer(tmp_path / "whole", description="d", metadata={}) as writer:
        for n in range(12):
            writer.add("train", record(n))
    parts = [shard(tmp_path / "parts" / f"{a}", range(a, b)) for a, b in ((0, 5), (5, 6), (6, 12))]
    indices = publish(tmp_path / "set", {"train": parts}, description="d", metadata={"origin": "x"})
    assert indices["train"].digest == open_source(tmp_path / "whole", "train").index.digest
    assert [info.records for info in indices["train"].shards] == [5, 1, 6]
    assert read_metadata(tmp_path / "set")["digests"] == {"train": indices["train"].digest}
    check(tmp_path / "set", list(range(12)))
    assert not list((tmp_path / "parts").iterdir())
    with pytest.raises(ValueError, match="already a data set"):
        publish(tmp_path / "set", {}, description="", metadata={})


def test_append(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    publish(folder, {"train": [shard(tmp_path / "a", range(3))]}, description="d", metadata={})
    old = open_source(folder, "train")
    before = {name: digest for name, digest in files_of(folder).items() if "array_record" in name}
    new = {"train": [shard(tmp_path / "b", range(3, 8)), shard(tmp_path / "c", range(8, 9))]}
    append(folder, new | {"validation": [shard(tmp_path / "d", range(20, 22))]}, metadata={"more": 1})
    check(folder, list(range(9)))
    check(folder, [20, 21], "validation")
    assert before.items() <= files_of(folder).items()
    assert dataset_info.read(folder)["train"].records == 9 and read_metadata(folder)["more"] == 1
    # Who had it open goes on with the records that it had.
    assert len(old) == 3 and old.read(2).id == "r2"
    again = shard(tmp_path / "e", range(5, 6))
    with pytest.raises(
        ValueError, match="'r5' occurs twice in split 'train', in set-train.array_record-00001 and in .*3"
    ):
        append(folder, {"train": [again]}, metadata={})
    assert is_complete(again) and again.is_file()
    check(folder, list(range(9)))


@pytest.mark.parametrize("moment", ["_link", "draft_index", "_finish"])
def test_a_killed_append_loses_nothing(tmp_path: Path, moment: str) -> None:
    """Before the commit the data set is what it was, and the shards are still there; after it, it is complete."""
    folder = tmp_path / "set"
    publish(folder, {"train": [shard(tmp_path / "a", range(3))]}, description="d", metadata={})
    added = shard(tmp_path / "b", range(3, 6))
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from jvgen.data.store import publish
        real = publish.{moment}
        def killed(*arguments, **options):
            if {moment!r} != "_finish":
                real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        publish.{moment} = killed
        publish.append(Path({str(folder)!r}), {{"train": [Path({str(added)!r})]}}, metadata={{}})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    check(folder, list(range(6 if moment == "_finish" else 3)))
    added = added if added.is_file() else shard(tmp_path / "b", range(3, 6))
    append(folder, {"train": [added]}, metadata={})
    check(folder, list(range(6)))
    assert dataset_info.read(folder)["train"].records == 6
    if moment != "_finish":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_incomplete_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a", range(3)), shard(tmp_path / "b", range(3, 5))
    rows_path(two).unlink()
    with pytest.raises(CorruptIndex, match="b: not written to its end"):
        publish(tmp_path / "set", {"train": [one, two]}, description="", metadata={})
    assert read_shard(one).index.id.tolist() == ["r0", "r1", "r2"]
    one.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(CorruptIndex, match="a: .* bytes, .* were written"):
        publish(tmp_path / "set", {"train": [one]}, description="", metadata={})
    one.unlink()
    with pytest.raises(CorruptIndex, match="a: missing"):
        read_shard(one)
    # Beginning a shard again takes away what says that it is complete.
    ShardWriter(one).abandon()
    assert not is_complete(one)


def test_data_sets_of_0_1_0(tmp_path: Path) -> None:
    """They are read as they are; with an index in the present format their digests are the same."""
    shutil.unpack_archive(SAVED, tmp_path, filter="data")
    for folder in sorted((tmp_path / "data").iterdir()):
        before = {split: open_source(folder, split) for split in splits(folder)}
        read = {split: [source.read(row) for row in range(len(source))] for split, source in before.items()}
        assert all(verify(folder, split) == [] for split in before)
        with pytest.raises(ValueError, match="of 0.1.0; run `jvgen data upgrade"):
            append(folder, {}, metadata={})
        upgraded = upgrade(folder)
        for split, source in before.items():
            after = open_source(folder, split)
            verify_index(after.index)
            assert after.index.digest == source.index.digest == upgraded[split].digest
            assert load_index(folder, split).shards and after.stored[0] == source.stored[0]
            for row, old in enumerate(read[split]):
                assert records.serialize(after.read(row)) == records.serialize(old)
        added = shard(tmp_path / "added", range(100, 102))
        append(folder, {"train": [added]}, metadata=read_metadata(folder))
        assert open_source(folder, "train").read(len(before["train"]) + 1).id == "r101"
        assert open_source(folder, "train").read(0).id == read["train"][0].id
        # Rows of 0.1.0 have checksums of bytes, those that were appended of fields.
        assert verify(folder, "train") == []
        damaged = folder / open_source(folder, "train").shards[0].file
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        assert len(verify(folder, "train")) >= 1
