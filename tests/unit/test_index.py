"""The index describes records in columns, and its digest changes with each of them."""

from pathlib import Path

import numpy as np
import pytest

from jvgen.data.store.index import COLUMNS, Index, path_of
from jvgen.data.store.records import Record


def index_of(count: int = 4, checksum: int = 7) -> Index:
    records = [
        Record(
            id=f"r{n}", kind=("image", "static", "dynamic")[n % 3], clips=(b"x",), frames=n + 1, height=8, width=9 + n,
            captions=("a",) * n, frames_per_second=float(n), actions=np.zeros((n + 1, n), np.float32),
        )
        for n in range(count)
    ]  # fmt: skip
    return Index.of((record, checksum + n) for n, record in enumerate(records))


def test_columns() -> None:
    index = index_of()
    assert len(index) == 4
    assert index.id.tolist() == ["r0", "r1", "r2", "r3"]
    assert [index.kind_name(row) for row in range(4)] == ["image", "static", "dynamic", "image"]
    assert index.frames.tolist() == [1, 2, 3, 4] and index.captions.tolist() == [0, 1, 2, 3]
    assert index.has_action.tolist() == [False, True, True, True] and not index.has_camera.any()
    assert index.take(np.array([2, 0])).width.tolist() == [11, 9]


def test_save_and_load(tmp_path: Path) -> None:
    index = index_of()
    index.save(tmp_path, "train")
    loaded = Index.load(tmp_path, "train")
    assert loaded.digest == index.digest
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(index, name))


def test_the_digest_depends_on_every_column_and_the_order() -> None:
    index = index_of()
    digests = {index.digest, index_of(3).digest, index.take(np.array([1, 0, 2, 3])).digest}
    for name in COLUMNS:
        columns = {other: getattr(index, other).copy() for other in COLUMNS}
        columns[name][2] = "z" if name == "id" else ~columns[name][2] if columns[name].dtype == bool else 99
        digests.add(Index(**columns).digest)
    assert len(digests) == 3 + len(COLUMNS)
    assert index_of().digest == index.digest


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no index-train.npz"):
        Index.load(tmp_path, "train")
    path = index_of().save(tmp_path, "train")
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(ValueError, match="cannot be read as an index"):
        Index.load(tmp_path, "train")
    for position in range(60, len(whole), 97):
        corrupt = bytearray(whole)
        corrupt[position] ^= 1
        path.write_bytes(bytes(corrupt))
        try:
            loaded = Index.load(tmp_path, "train")
        except ValueError as error:
            assert str(path_of(tmp_path, "train")) in str(error)
        else:
            assert loaded.digest == index_of().digest  # an unused byte, such as padding
