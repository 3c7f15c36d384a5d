"""Building data sets of images and videos with cameras of other programs: frames beside their cameras, or a reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jvgen.data.builders.assembly import merge_parts
from jvgen.data.builders.build_loop import BuildError, Execution
from jvgen.data.builders.posed import PosedOptions, build_posed
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window, encode_image, encode_video
from tests.unit.test_camera_formats import (
    CX,
    CY,
    FRAMES,
    FX,
    FY,
    HEIGHT,
    NAMES,
    WIDTH,
    co3d,
    colmap_binary,
    colmap_text,
    nerfstudio,
    spatialvid,
    world,
)  # fmt: skip

__all__ = ["world"]
GRAY = 30 * np.arange(1, FRAMES + 1)


def images(folder: Path, names=NAMES, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Images whose gray level says which of the names they have."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, gray in zip(names, GRAY, strict=True):
        (folder / name).write_bytes(encode_image(np.full((height, width, 3), gray, np.uint8)))


def records_of(out: Path) -> dict[str, Record]:
    source = open_source(out, "train")
    return {record.id: record for record in (source.read(row) for row in range(len(source)))}


def gray_of(record: Record) -> list[int]:
    return decode_window(record.clips[0], range(record.frames))[:, 4, 4, 0].astype(int).tolist()


def check(record: Record, world: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> None:
    assert (record.kind, record.frames, record.height, record.width) == ("static", FRAMES, height, width)
    np.testing.assert_allclose(gray_of(record), GRAY, atol=3)
    np.testing.assert_allclose(record.extrinsics, world, atol=1e-6)
    np.testing.assert_allclose(record.intrinsics, np.tile([FX / WIDTH, FY / HEIGHT, CX / WIDTH, CY / HEIGHT], (4, 1)))


def test_scenes_of_nerfstudio(tmp_path, world, jvgen):
    """DL3DV: images of the size of the file, and downscaled ones in images_4; cameras follow the names' numbers."""
    data = tmp_path / "data"
    for scene, folder, scale in (("1K/aa", "images", 1), ("1K/bb", "images_4", 0.5)):
        nerfstudio(data / scene, world)
        images(data / scene / folder, height=int(HEIGHT * scale), width=int(WIDTH * scale))
    (tmp_path / "captions.csv").write_text("file,caption\n1K/aa,a hall\n")
    done = jvgen("data", "build", "posed", data, "--format", "nerfstudio", "--out", tmp_path / "out", "--fps", 5,
                 "--validation-fraction", 0, "--captions", tmp_path / "captions.csv")  # fmt: skip
    assert done.status == 0, done.err
    found = records_of(tmp_path / "out")
    check(found["1K/aa"], world)
    assert found["1K/aa"].captions == ("a hall",) and found["1K/aa"].frames_per_second == 5
    assert (found["1K/bb"].height, found["1K/bb"].width) == (30, 44), "even sides"
    np.testing.assert_allclose(found["1K/bb"].intrinsics, found["1K/aa"].intrinsics)


def test_scenes_of_colmap_and_co3d(tmp_path, world):
    colmap_binary(tmp_path / "m" / "chair" / "0a" / "sparse" / "0", world)
    colmap_text(tmp_path / "m" / "chair" / "0b" / "colmap" / "sparse" / "0", world)
    for scene in ("0a", "0b"):
        images(tmp_path / "m" / "chair" / scene / "images")
    build_posed(tmp_path / "m", tmp_path / "a", "colmap", validation=0)
    found = records_of(tmp_path / "a")
    assert list(found) == ["chair/0a", "chair/0b"]
    for record in found.values():
        check(record, world)
    co3d(tmp_path / "c" / "car", world)
    images(tmp_path / "c" / "car" / "12_34_56" / "images")
    build_posed(tmp_path / "c", tmp_path / "b", "co3d", PosedOptions(shorter_side=30), validation=0)
    [(name, record)] = records_of(tmp_path / "b").items()
    assert name == "car/12_34_56" and record.frames_per_second == 4.0
    check(record, world, 30, 44)
    co3d(tmp_path / "c" / "car", world, seconds=None)
    build_posed(tmp_path / "c", tmp_path / "d", "co3d", PosedOptions(frames_per_second=5.0), validation=0)
    [record] = records_of(tmp_path / "d").values()
    assert record.frames_per_second == 5.0 and not len(record.frame_times)


def test_clips_of_spatialvid_have_the_frames_that_have_cameras(tmp_path, world):
    video = np.zeros((20, 32, 48, 3), np.uint8) + (10 * np.arange(20, dtype=np.uint8))[:, None, None, None]
    (tmp_path / "d" / "videos" / "group_0001").mkdir(parents=True)
    (tmp_path / "d" / "videos" / "group_0001" / "aa.mp4").write_bytes(encode_video(video, 10, quality=1))
    folder = spatialvid(tmp_path / "d" / "annotations" / "group_0001" / "aa", world, (0, 5, 10, 15))
    (folder / "caption.json").write_text(json.dumps({"SceneSummary": "a street", "Tags": ["x"], "Motion": "left"}))
    build_posed(tmp_path / "d", tmp_path / "out", "spatialvid", validation=0)
    [(name, record)] = records_of(tmp_path / "out").items()
    assert (name, record.kind) == ("annotations/group_0001/aa", "dynamic")
    np.testing.assert_allclose(gray_of(record), [0, 50, 100, 150], atol=3)
    np.testing.assert_allclose(record.extrinsics, world, atol=1e-6)
    assert record.frames_per_second == pytest.approx(2.0) and not len(record.frame_times)
    assert record.captions == ("a street", "left") and record.caption_names == ("SceneSummary", "Motion")
    shutil.copytree(folder, tmp_path / "flat" / "group_0001" / "aa")
    shutil.copytree(tmp_path / "d" / "videos", tmp_path / "flat" / "videos")
    build_posed(tmp_path / "flat", tmp_path / "third", "spatialvid", validation=0)
    assert list(records_of(tmp_path / "third")) == ["group_0001/aa"]
    spatialvid(folder, world, (0, 5, 10, 20))
    with pytest.raises(BuildError, match="has a camera of frame 20; aa.mp4 has 20 frames"):
        build_posed(tmp_path / "d", tmp_path / "other", "spatialvid")
    (folder / "indexes.txt").unlink()
    with pytest.raises(BuildError, match="has 4 cameras for the 20 frames of aa.mp4"):
        build_posed(tmp_path / "d", tmp_path / "other", "spatialvid")
    spatialvid(folder, world, (0, 1, 2, 15))
    build_posed(tmp_path / "d", tmp_path / "other", "spatialvid", validation=0)
    np.testing.assert_allclose(records_of(tmp_path / "other")[name].frame_times, [0, 0.1, 0.2, 1.5], atol=1e-6)


def test_lenses_are_undistorted(tmp_path, world):
    nerfstudio(tmp_path / "d" / "s", world, k1=-0.2)
    images(tmp_path / "d" / "s" / "images")
    summary = build_posed(tmp_path / "d", tmp_path / "out", "nerfstudio", validation=0)
    assert summary.notes == {"undistorted": 1}
    intrinsics = records_of(tmp_path / "out")["s"].intrinsics
    assert (intrinsics[:, :2] < [FX / WIDTH, FY / HEIGHT]).all(), "a barrel shows more at its border than a pinhole"


def test_bad_scenes_are_named_and_the_others_kept(tmp_path, world):
    data = tmp_path / "d"
    wanted = {
        "missing": "s.json: 1 of 4 images are missing, such as",
        "outside": "the image '../../../secret.png' is outside of",
        "turned": "images/frame_2.png is 60x90, its camera is of 90x60: the image is cropped or turned",
        "sizes": "its images change size: images/frame_11.png is 180x120",
        "damaged": "not a readable image",
        "elsewhere": "other/frame_2.png' is outside of",
        "upside": "frame_2.png is stored turned, as its EXIF says",
        "cameras": "camera_model = 'EQUIRECTANGULAR'",
    }
    for scene in ("fine", *wanted):
        nerfstudio(data / scene, world)
        images(data / scene / "images")
    (data / "missing" / "images" / NAMES[0]).unlink()
    document = (data / "outside" / "transforms.json").read_text()
    (data / "outside" / "transforms.json").write_text(document.replace("images/frame_9.png", "../../../secret.png"))
    document = (data / "elsewhere" / "transforms.json").read_text()
    images(tmp_path / "other")
    (data / "elsewhere" / "transforms.json").write_text(document.replace("images/", f"images/{tmp_path}/other/"))
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (WIDTH, HEIGHT)).save(data / "upside" / "images" / NAMES[0], exif=exif)
    images(data / "turned" / "images", height=WIDTH, width=HEIGHT)
    (data / "sizes" / "images" / NAMES[3]).write_bytes(encode_image(np.zeros((120, 180, 3), np.uint8)))
    (data / "damaged" / "images" / NAMES[2]).write_bytes(b"\x89PNG\r\n\x1a\n no")
    nerfstudio(data / "cameras", world, camera_model="EQUIRECTANGULAR")
    summary = build_posed(data, tmp_path / "out", "nerfstudio", validation=0, error_budget=0.9)
    assert list(records_of(tmp_path / "out")) == ["fine"]
    reasons = {item.name: item.reason for item in summary.rejected}
    assert set(reasons) == set(wanted) and all(wanted[name] in reason for name, reason in reasons.items()), reasons
    with pytest.raises(ValueError, match="has no images.bin or images.txt at any depth; expected SCENE/sparse/0/"):
        build_posed(data, tmp_path / "out", "colmap")
    with pytest.raises(ValueError, match="format = 'obj': nerfstudio, colmap"):
        build_posed(data, tmp_path / "out", "obj")


def test_parts_make_the_same_data_set(tmp_path, world):
    for scene in "abc":
        nerfstudio(tmp_path / "d" / scene, world)
        images(tmp_path / "d" / scene / "images")
    one = build_posed(tmp_path / "d", tmp_path / "one", "nerfstudio", validation=0,
                      execution=Execution(jobs_per_unit=1))  # fmt: skip
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    parts = [
        build_posed(tmp_path / folder, tmp_path / "two", "nerfstudio", validation=0,
                    execution=Execution(part, 2, jobs_per_unit=1)).out
        for part, folder in ((1, "d"), (2, "e"))
    ]  # fmt: skip
    assert merge_parts(parts, tmp_path / "two").digests == one.digests
