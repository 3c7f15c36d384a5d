"""Camera files: what is in them comes back, and what is wrong with them is said."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.geometry import paths, plucker, rotations
from jvgen.geometry.camera_file import CameraTrack, check, read_cameras, write_cameras
from jvgen.geometry.cameras import Cameras, calibration, inverse, relative, resized_and_cropped


@pytest.fixture
def track() -> CameraTrack:
    extrinsics = paths.named_paths("circle", 3, 6)[1]
    intrinsics = np.tile([0.47, 0.84, 0.5, 0.5], (6, 1))
    return CameraTrack("https://example.com/v", np.arange(6) * 266_933, intrinsics, extrinsics)


@pytest.fixture
def file(track, tmp_path) -> Path:
    write_cameras(tmp_path / "cameras.txt", track)
    return tmp_path / "cameras.txt"


def test_files_round_trip(track, file):
    found = read_cameras(file)
    assert found.source == track.source and len(found) == 6
    assert all(len(line.split()) == 19 for line in file.read_text().splitlines()[1:])
    np.testing.assert_array_equal(found.timestamps, track.timestamps)
    np.testing.assert_allclose(found.intrinsics, track.intrinsics, atol=1e-9)
    np.testing.assert_allclose(found.extrinsics, track.extrinsics, atol=1e-9)
    file.write_text("\n".join(file.read_text().splitlines()[1:]))
    assert len(read_cameras(file)) == 6, "the line with the address may be missing"


def test_cameras_are_subsampled_evenly(file):
    chosen = read_cameras(file).subsample(3)
    np.testing.assert_array_equal(chosen.timestamps, np.array([0, 2, 5]) * 266_933)
    with pytest.raises(ValueError, match="a.txt has 6 cameras, fewer than the 49 requested frames; request at most 6"):
        read_cameras(file).subsample(49, "a.txt")


def _changed(file: Path, change) -> None:
    lines = file.read_text().splitlines()
    lines[3] = change(lines[3].split())
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda row: " ".join(row[:18]),
            r"line 4: 18 columns, not 19 \(timestamp, fx, fy, cx, cy, 0, 0, and the 3x4 world-to-camera",
        ),
        (lambda row: " ".join([*row[:7], "east", *row[8:]]), "line 4: could not convert string to float: 'east'"),
        (
            lambda row: " ".join([*row[:7], *(str(1.5 * float(v)) for v in row[7:])]),
            r"matrix of frame 2 is not a rotation: R R\^T differs from I by 1.2, more than 0.001",
        ),
        (
            lambda row: " ".join([*row[:7], *(str(-float(v)) for v in row[7:11]), *row[11:]]),
            "frame 2 is a mirror image, not a rotation",
        ),
        (
            lambda row: " ".join([*row[:1], "602.9", "602.9", "640", "360", *row[5:]]),
            "look like pixels. .*divide fx and cx by",
        ),
        (lambda row: " ".join([*row[:1], "-0.5", *row[2:]]), "a focal length is not positive"),
        (lambda row: " ".join([*row[:8], "nan", *row[9:]]), "not finite"),
    ],
)
def test_invalid_files_are_rejected(file, change, message):
    _changed(file, change)
    with pytest.raises(ValueError, match=message):
        read_cameras(file)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_cameras(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("https://example.com\n\n")
    with pytest.raises(ValueError, match="has no cameras"):
        read_cameras(tmp_path / "empty.txt")


def test_arrays_are_checked_like_files(track):
    with pytest.raises(ValueError, match="--cameras: .*look like pixels"):
        check(track.cameras._replace(intrinsics=track.intrinsics * 100), "--cameras")


def test_a_published_file():
    """Numbers computed independently from RealEstate10K's 2f25826f0d0ef09a: frame 10 of 16, seen from the first."""
    folder = Path(os.environ.get("JVGEN_REAL_DATA", "")) / "realestate10k"
    if not (folder / "2f25826f0d0ef09a.txt").is_file():
        pytest.skip("JVGEN_REAL_DATA names no folder with realestate10k/2f25826f0d0ef09a.txt")
    for path in sorted(folder.glob("*.txt")):
        assert rotations.rotation_error(read_cameras(path).extrinsics[..., :3]).max() < 1e-6
    found = read_cameras(folder / "2f25826f0d0ef09a.txt")
    assert len(found) == 16 and found.timestamps[0] == 167_200_000
    np.testing.assert_allclose(found.intrinsics[0], [0.470983989, 0.837304886, 0.5, 0.5])
    poses = relative(found.extrinsics, found.extrinsics[0])
    np.testing.assert_allclose(inverse(poses)[10, :, 3], [-0.629955, -0.178980, 0.884046], atol=1e-6)
    fitted = resized_and_cropped(found.intrinsics[:1], (720, 1280), (256, 256))
    matrix = calibration(fitted, (256, 256))[0]
    np.testing.assert_allclose(matrix[[0, 1, 0, 1], [0, 1, 2, 2]], [214.35005, 214.35005, 128, 128], atol=1e-4)
    rays = plucker.rays(Cameras(jnp.float32(fitted), jnp.float32(poses[10:11])), (256, 256))[0]
    corner = [0.264038, 0.140251, 0.216543, -0.404939, -0.458794, 0.790906]
    inside = [0.131098, 0.868849, 0.269321, 0.359632, -0.325348, 0.874536]
    np.testing.assert_allclose(rays[[0, 50], [0, 200]], [corner, inside], atol=2e-6)
