"""SpatialVID's annotations of a clip: cameras of some of its frames.

poses.npy       (N, 7): translation, then quaternion x, y, z, w; world-to-camera with OpenCV axes
intrinsics.npy  (N, 4): fx, fy, cx, cy divided by the width and the height
indexes.txt     N lines of two numbers: the row, and the number of its frame in the clip
"""

from typing import NamedTuple

import numpy as np

from jvgen.geometry.formats.posed_images import DISTORTION, PosedImages, checked_quaternions
from jvgen.storage import Path, as_path, read_utf8, reading

POSES, INTRINSICS, INDEXES = "poses.npy", "intrinsics.npy", "indexes.txt"


class PosedFrames(NamedTuple):
    """Cameras of frames of a video: `numbers`, int64 (N,), increasing; None if there is one for each frame."""

    numbers: np.ndarray | None
    cameras: PosedImages


def read_spatialvid(folder: str | Path) -> PosedFrames:
    """The cameras in an annotation folder.

    Raises:
      ValueError: a file that is missing, of another shape or dtype, or with another number of rows than the others; a
        quaternion that is none; numbers of frames that do not increase. Names the file.
    """
    folder = as_path(folder)
    poses, intrinsics = _array(folder / POSES, 7), _array(folder / INTRINSICS, 4)
    if len(poses) != len(intrinsics):
        raise ValueError(f"{folder / POSES} has {len(poses)} rows, {INTRINSICS} {len(intrinsics)}.")
    numbers = _numbers(folder / INDEXES) if (folder / INDEXES).is_file() else None
    if numbers is not None and len(numbers) != len(poses):
        raise ValueError(f"{folder / POSES} has {len(poses)} rows, {INDEXES} {len(numbers)}.")
    names = tuple(f"row {row}" for row in range(len(poses)))
    # As xyzw; the function wants w first.
    rotations = checked_quaternions(str(folder / POSES), np.roll(poses[:, 3:], 1, axis=1), names)
    found = PosedImages(
        names, intrinsics, np.concatenate([rotations, poses[:, :3, None]], axis=-1),
        np.zeros((len(poses), len(DISTORTION))), np.zeros((len(poses), 2), np.int64),
    )  # fmt: skip
    found.check(
        str(folder / POSES), "Rows are a translation and a quaternion (x, y, z, w).", f"they are in {INTRINSICS}",
        f"{INTRINSICS} has fx and cx divided by the width, fy and cy by the height.",
    )  # fmt: skip
    return PosedFrames(numbers, found)


def _array(path: Path, width: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    with reading(path, "is not a NumPy array"), path.open("rb") as file:
        # Not np.load, which takes archives too.
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim != 2 or array.shape[1] != width or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: {array.dtype} {array.shape}; expected floating-point numbers (N, {width}).")
    return array.astype(np.float64)


def _numbers(path: Path) -> np.ndarray:
    rows = [line.split() for line in read_utf8(path).split("\n") if line.strip()]
    if not all(len(row) == 2 and row[1].isdecimal() for row in rows):
        raise ValueError(f"{path}: expected two numbers in each line, a row and a frame.")
    numbers = np.array([int(row[1]) for row in rows], np.int64)
    if (np.diff(numbers) <= 0).any():
        raise ValueError(f"{path}: the numbers of the frames do not increase.")
    return numbers
