"""Files of any wrong kind in place of cameras, tables, shards and other files of data sets: one error names them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jvgen import exit_codes
from jvgen.data.builders.lerobot import build_lerobot
from jvgen.data.builders.tables import build_table
from jvgen.data.builders.webdataset import build_webdataset
from jvgen.data.video_files import encode_image
from jvgen.geometry import paths
from jvgen.geometry.formats.co3d import read_co3d
from jvgen.geometry.formats.colmap import read_colmap
from jvgen.geometry.formats.nerfstudio import read_nerfstudio
from jvgen.geometry.formats.spatialvid import read_spatialvid
from tests.unit import test_camera_formats as cameras
from tests.unit.test_lerobot import dataset
from tests.unit.test_wrong_files import KINDS


def table(name: str) -> Callable[[Path], object]:
    return lambda folder: build_table(folder / name, folder / "files", folder / "out", workers=1)


def samples(folder: Path) -> object:
    return build_webdataset(folder / "shards", folder / "out", workers=1)


# Reader: the file that is replaced, and the call.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nerfstudio": ("n/transforms.json", lambda f: read_nerfstudio(f / "n" / "transforms.json")),
    "cameras.bin": ("b/cameras.bin", lambda f: read_colmap(f / "b")),
    "images.bin": ("b/images.bin", lambda f: read_colmap(f / "b")),
    "cameras.txt": ("t/cameras.txt", lambda f: read_colmap(f / "t")),
    "images.txt": ("t/images.txt", lambda f: read_colmap(f / "t")),
    "CO3D": ("c/frame_annotations.jgz", lambda f: read_co3d(f / "c" / "frame_annotations.jgz")),
    "poses.npy": ("s/poses.npy", lambda f: read_spatialvid(f / "s")),
    "intrinsics.npy": ("s/intrinsics.npy", lambda f: read_spatialvid(f / "s")),
    "indexes.txt": ("s/indexes.txt", lambda f: read_spatialvid(f / "s")),
    "info.json": ("l/meta/info.json", lambda f: build_lerobot(f / "l", f / "out", workers=1)),
    "episodes": ("l/meta/episodes/chunk-000/file-000.parquet", lambda f: build_lerobot(f / "l", f / "out", workers=1)),
    "rows": ("l/data/chunk-000/file-000.parquet", lambda f: build_lerobot(f / "l", f / "out", workers=1)),
    "table.csv": ("table.csv", table("table.csv")),
    "table.jsonl": ("table.jsonl", table("table.jsonl")),
    "table.parquet": ("table.parquet", table("table.parquet")),
    "shard": ("shards/00000.tar", samples),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    world = paths.named_paths("circle", 4, cameras.FRAMES)[1]
    cameras.nerfstudio(root / "n", world)
    cameras.colmap_binary(root / "b", world)
    cameras.colmap_text(root / "t", world)
    cameras.co3d(root / "c", world)
    cameras.spatialvid(root / "s", world)
    dataset(root / "l")
    (root / "files").mkdir()
    (root / "files" / "a.png").write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8)))
    (root / "table.csv").write_text("path,caption\na.png,x\n")
    (root / "table.jsonl").write_text('{"path": "a.png", "caption": "x"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png"], "caption": ["x"]}), root / "table.parquet")
    (root / "shards").mkdir()
    return root


@pytest.mark.parametrize("reader", READERS)
def test_every_kind_of_wrong_file_is_named(reader, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    file, read = READERS[reader]
    for kind, (content, _) in KINDS.items():
        if reader == "shard" and kind == "tar":
            continue  # it is one
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError) as refused:
            read(folder)
        said = str(refused.value)
        assert exit_codes.of_error(refused.value) == exit_codes.USER_ERROR, (kind, repr(refused.value))
        assert Path(file).name in said, (kind, said)
        assert len(said) < 5_000 and "Traceback" not in said, (kind, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"] and not (folder / "out").exists()
