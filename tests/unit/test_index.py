"""The index describes records in columns, and its digest changes with each of them."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.store import array_files, index_files
from jvgen.data.store.index import COLUMNS, CorruptIndex, Index, RowLists, ShardInfo
from jvgen.data.store.index_files import draft_index, load_index, path_of, set_columns, verify_index
from jvgen.data.store.records import Record
from jvgen.data.store.strings import Strings, Text


def record(n: int, **changes) -> Record:
    return Record(
        id=f"r{n}", kind=("image", "static", "dynamic")[n % 3], clips=(b"x",), frames=n + 1, height=8, width=9 + n,
        captions=("a",) * n, frames_per_second=float(n), actions=np.zeros((n + 1, n), np.float32),
    ).replace(**changes)  # fmt: skip


def index_of(count: int = 4, checksum: int = 7, **changes) -> Index:
    return Index.of((record(n, **changes), checksum + n) for n in range(count))


def write(folder: Path, *pieces: Index, shards=()) -> Index:
    return draft_index(folder, "train", pieces, shards).commit()


def test_columns() -> None:
    index = index_of()
    assert len(index) == 4
    assert index.id.tolist() == ["r0", "r1", "r2", "r3"]
    assert [index.kind_name(row) for row in range(4)] == ["image", "static", "dynamic", "image"]
    assert index.frames.tolist() == [1, 2, 3, 4] and index.captions.tolist() == [0, 1, 2, 3]
    assert index.has_action.tolist() == [False, True, True, True] and not index.has_camera.any()
    assert index.take(np.array([2, 0])).width.tolist() == [11, 9]
    assert index.take(np.array([2, 0])).id.tolist() == ["r2", "r0"]
    assert index.take(np.array([False, True, False, True])).id == Strings.of(["r1", "r3"])
    assert Strings.of(["a", "é", ""])[[1, -1, 1]].tolist() == ["é", "", "é"] and len(index.id[np.zeros(4, bool)]) == 0


@pytest.mark.parametrize("borders", [(), (1,), (2, 2), (1, 2, 3)])
def test_written_in_pieces_and_mapped(tmp_path: Path, borders: tuple[int, ...]) -> None:
    """However rows are divided over shards, the digest is that of the rows."""
    index = index_of()
    pieces = [index.take(slice(a, b)) for a, b in zip((0, *borders), (*borders, 4), strict=True)]
    write(tmp_path, *pieces, shards=(ShardInfo("one", 3, 10, "a"), ShardInfo("two", 1, 5, "b")))
    loaded = load_index(tmp_path, "train")
    assert loaded.digest == loaded.computed_digest() == index.digest
    assert loaded.shards == (ShardInfo("one", 3, 10, "a"), ShardInfo("two", 1, 5, "b"))
    for name in COLUMNS:
        assert list(getattr(loaded, name)) == list(getattr(index, name)), name
        assert name == "id" or not getattr(loaded, name).flags.owndata, f"{name} is not mapped"
    verify_index(loaded)


def test_a_pickled_index_is_a_path(tmp_path: Path) -> None:
    big = Index.of((record(0, id=f"{n:0100d}"), n) for n in range(500))
    write(tmp_path, big)
    index = load_index(tmp_path, "train")
    sent = pickle.dumps(index)
    assert len(sent) < 2000 and pickle.loads(sent).digest == big.digest
    assert pickle.loads(pickle.dumps(big)).digest == big.digest
    # A worker that starts when the data set has other records says so.
    write(tmp_path, big.take(slice(0, 9)))
    with pytest.raises(ValueError, match="changed while a run was reading it"):
        pickle.loads(sent)


def test_the_digest_depends_on_every_column_and_the_order() -> None:
    index = index_of()
    digests = {index.digest, index_of(3).digest, index.take(np.array([1, 0, 2, 3])).digest}
    for name in COLUMNS:
        columns = {other: np.array(list(getattr(index, other))) for other in COLUMNS}
        columns[name][2] = "z" if name == "id" else ~columns[name][2] if columns[name].dtype == bool else 99
        digests.add(Index(**columns).digest)
    assert len(digests) == 3 + len(COLUMNS)
    assert index_of().digest == index.digest == index_of(columns={"aesthetic": 5}).digest


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no index-train.json"):
        load_index(tmp_path, "train")
    index = write(tmp_path, index_of(columns={"license": "cc0"}))
    document = path_of(tmp_path, "train")
    whole = document.read_bytes()
    for changed in (whole[:300], whole.replace(b'"records":4', b'"records":3'), b"{}", b"\xff" * 50):
        document.write_bytes(changed)
        with pytest.raises(CorruptIndex, match="index-train.json: cannot be read as an index"):
            load_index(tmp_path, "train")
    document.write_bytes(whole.replace(b'"format":2', b'"format":3'))
    with pytest.raises(CorruptIndex, match="format 3, of a later version of jvgen"):
        load_index(tmp_path, "train")
    document.write_bytes(whole)
    [columns] = (tmp_path / "index-train").iterdir()
    content, covered = columns.read_bytes(), np.zeros(columns.stat().st_size, bool)
    for parts in index_files._description(document)["arrays"].values():
        for span in parts.values():
            covered[span["offset"] : span["offset"] + span["bytes"]] = True
    for position in range(0, len(content), 61):
        columns.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        index_files._load.cache_clear()
        index_files._verify.cache_clear()
        if covered[position]:
            with pytest.raises(CorruptIndex, match=columns.name):
                verify_index(load_index(tmp_path, "train"))
        else:
            assert load_index(tmp_path, "train").computed_digest() == index.digest  # padding
    columns.write_bytes(content[:-100])
    index_files._load.cache_clear()
    with pytest.raises(CorruptIndex, match=columns.name):
        load_index(tmp_path, "train")
    columns.unlink()
    with pytest.raises(CorruptIndex, match="no such file; the index needs it"):
        load_index(tmp_path, "train")


def test_free_columns(tmp_path: Path) -> None:
    """Numbers, texts, and values that are missing in some records or whole pieces."""
    values = [
        {"aesthetic": 5, "license": "cc-by", "cut": True},
        {"aesthetic": None, "license": "", "ocr": 0.25},
        {"aesthetic": 2**53, "license": "cc0"},
        {},
    ]
    rows = [(record(n, columns=columns), n) for n, columns in enumerate(values)]
    for pieces in ([rows], [rows[:1], rows[1:]], [rows[3:], rows[:3]], [rows[1:2], rows[:1], rows[2:]]):
        order = [n for piece in pieces for _, n in piece]
        write(tmp_path, *(Index.of(piece) for piece in pieces))
        index = load_index(tmp_path, "train")
        assert index.columns["license"].tolist() == [["cc-by", "", "cc0", ""][n] for n in order]
        assert list(index.columns["license"].values) == ["", "cc-by", "cc0"]
        np.testing.assert_array_equal(index.columns["aesthetic"], [[5, np.nan, 2**53, np.nan][n] for n in order])
        np.testing.assert_array_equal(index.columns["ocr"], [[np.nan, 0.25, np.nan, np.nan][n] for n in order])
        assert index.values(order.index(0)) == {"aesthetic": 5, "license": "cc-by", "cut": 1}
        assert index.values(order.index(1)) == {"ocr": 0.25} and index.values(order.index(3)) == {}


def test_columns_of_two_types_and_names_that_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column score: 'high' in record 'r1' and 5 in 'r0'; .*numbers or texts"):
        Index.of([(record(0, columns={"score": 5}), 0), (record(1, columns={"score": "high"}), 0)])
    with pytest.raises(ValueError, match="column frames: every index has one"):
        Index.of([(record(0, columns={"frames": 5}), 0)])
    one, two = (Index.of([(record(n, columns={"score": value}), 0)]) for n, value in enumerate((5, "high")))
    for pieces in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="column score: has numbers in some shards and texts in others"):
            write(tmp_path, *pieces)
    assert not list((tmp_path / "index-train").iterdir()), "files were left behind"


def test_columns_are_added_to_an_index(tmp_path: Path) -> None:
    before = write(tmp_path, index_of(columns={"aesthetic": 5}))
    scores = np.array([1.0, np.nan, 3.0, 4.0])
    after = set_columns(tmp_path, "train", {"motion": scores, "language": Text.of(["de", "en", "", "en"])})
    assert after.digest == before.digest and sorted(after.columns) == ["aesthetic", "language", "motion"]
    np.testing.assert_array_equal(load_index(tmp_path, "train").columns["motion"], scores)
    again = set_columns(tmp_path, "train", {"motion": scores * 2})
    np.testing.assert_array_equal(again.columns["motion"], scores * 2)
    assert again.columns["language"].tolist() == ["de", "en", "", "en"]
    assert len(list((tmp_path / "index-train").iterdir())) == 3, "replaced columns stay on disk"
    for wrong, message in (({"motion": scores[:2]}, "2 rows, .* has 4"), ({"id": scores}, "column id: every index")):
        with pytest.raises(ValueError, match=message):
            set_columns(tmp_path, "train", wrong)


def test_an_id_that_occurs_twice_is_named_with_both_shards(tmp_path: Path) -> None:
    shards = (ShardInfo("a-00000", 4, 0, ""), ShardInfo("a-00001", 4, 0, ""))
    with pytest.raises(ValueError, match="record id 'r0' occurs twice in split 'train', in a-00000 and in a-00001"):
        write(tmp_path, index_of(), index_of(), shards=shards)


def test_strings() -> None:
    texts = ["", "a", "größer", "a" * 300, "", "球"] * 40_000 + [f"id{n}" for n in range(1000)]
    strings = Strings.of(texts)
    assert strings.tolist() == texts == list(strings)
    assert [strings[n] for n in (2, -1, 100_003)] == [texts[n] for n in (2, -1, 100_003)]
    assert strings[99_999:100_005].tolist() == texts[99_999:100_005] and strings[5:2].tolist() == []
    assert strings[np.array([3, 2])].tolist() == texts[3:1:-1]
    hashes = strings.hashes()
    assert len(set(hashes.tolist())) == len(set(texts)) and hashes[2] == hashes[8] == hashes[239_996]
    earlier, later = strings.first_repeated()
    assert earlier < later and strings[earlier] == strings[later]
    assert Strings.of([f"id{n}" for n in range(1000)]).first_repeated() is None
    assert Strings.of([]).tolist() == [] and Strings.of([]).first_repeated() is None
    with pytest.raises(ValueError, match="zero character"):
        Strings.of(["a\0b"])


def test_texts() -> None:
    text = Text.of(["b", "a", "", "b"])
    assert text.tolist() == ["b", "a", "", "b"] == [text[n] for n in range(4)]
    assert [text.code(value) for value in ("a", "b", "", "c", "A")] == [1, 2, 0, -1, -1]
    assert list(text.counts().items()) == [("b", 2), ("", 1), ("a", 1)]
    assert text[1:3].tolist() == ["a", ""]


def test_two_processes_that_set_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one does not undo what the other did."""
    write(tmp_path, index_of())
    real = index_files.ColumnWriter.append_column

    def meanwhile(*arguments) -> None:
        monkeypatch.undo()
        set_columns(tmp_path, "train", {"b": np.arange(4.0)})
        real(*arguments)

    monkeypatch.setattr(index_files.ColumnWriter, "append_column", meanwhile)
    with pytest.raises(ValueError, match="another process changed it meanwhile; nothing is written"):
        set_columns(tmp_path, "train", {"a": np.arange(4.0)})
    assert list(load_index(tmp_path, "train").columns) == ["b"]


def test_rows_of_a_shard(tmp_path: Path) -> None:
    rows = RowLists()
    for n in range(4):
        rows.add(record(n, captions=("a", "b"), caption_names=("short", "long"), columns={"x": n, "y": "t" * n}), n)
    array_files.save_rows(tmp_path / "rows.npz", rows.index(), bytes=5)
    loaded, document = array_files.load_rows(tmp_path / "rows.npz")
    assert document["bytes"] == 5 and loaded.digest == loaded.computed_digest() == rows.index().digest
    assert loaded.columns["y"].tolist() == ["", "t", "tt", "ttt"] and loaded.columns["x"].tolist() == [0, 1, 2, 3]
    assert loaded.caption_names == {"short": 4, "long": 4}
    whole = (tmp_path / "rows.npz").read_bytes()
    for position in range(0, len(whole), 97):
        (tmp_path / "rows.npz").write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            loaded, _ = array_files.load_rows(tmp_path / "rows.npz")
        except CorruptIndex as error:
            assert "rows.npz" in str(error)
        else:
            assert loaded.computed_digest() == rows.index().digest  # an unused byte, such as padding
