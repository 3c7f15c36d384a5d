"""Camera files of RealEstate10K: a line with the video's address, then 19 columns a frame.

Columns: a time in microseconds; fx, fy over the width and the height; cx, cy the same; two zeros; a world-to-camera 3x4
matrix, row by row (Zhou et al. 2018, arXiv 1805.09817; https://google.github.io/realestate10k).
"""

import dataclasses
from pathlib import Path

import numpy as np

from jvgen.geometry import rotations
from jvgen.geometry.cameras import Cameras

COLUMNS = 19
# How far a rotation matrix may be from orthonormal; files of nine digits are within 1e-8.
ROTATION_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class CameraTrack:
    """The cameras of one clip, F frames.

    Attributes:
      source: address of the video that the frames are of.
      timestamps: int64 (F,), microseconds from the beginning of the video.
      intrinsics: float64 (F, 4), normalised.
      extrinsics: float64 (F, 3, 4), world-to-camera.
    """

    source: str
    timestamps: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def cameras(self) -> Cameras:
        """Intrinsics and extrinsics."""
        return Cameras(self.intrinsics, self.extrinsics)

    def evenly(self, frames: int, name: str = "the camera file") -> "CameraTrack":
        """`frames` of the cameras, from the first to the last, evenly spaced.

        Raises:
          ValueError: there are fewer.
        """
        if len(self) < frames:
            raise ValueError(
                f"{name} has {len(self)} cameras, fewer than the {frames} frames asked for; ask for {len(self)} or "
                "fewer, or give a longer file."
            )
        index = np.linspace(0, len(self) - 1, frames).astype(int)
        return CameraTrack(self.source, self.timestamps[index], self.intrinsics[index], self.extrinsics[index])


def read_cameras(path: str | Path) -> CameraTrack:
    """Read a camera file.

    Raises:
      ValueError: no such file, a line without 19 numbers, matrices that are no rotations (with how far off they are),
        intrinsics in pixels, no cameras at all.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"camera file {str(path)!r} does not exist.")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    first = 0 if lines and _is_row(lines[0]) else 1
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if number > first and line.strip()]
    if not rows:
        raise ValueError(
            f"{path}: has no cameras; a line with an address and then one line of {COLUMNS} columns a frame."
        )
    return from_rows(np.array(rows, np.float64), source=lines[0].strip() if first else "", name=str(path))


def from_rows(rows: np.ndarray, *, source: str = "", name: str = "cameras") -> CameraTrack:
    """The track in the numbers (F, 19) of a camera file, checked as `read_cameras` says."""
    track = CameraTrack(
        source=source,
        timestamps=rows[:, 0].round().astype(np.int64),
        intrinsics=rows[:, 1:5].copy(),
        extrinsics=rows[:, 7:].reshape(-1, 3, 4).copy(),
    )
    check(track.cameras, name)
    return track


def check(cameras: Cameras, name: str) -> None:
    """Raise `ValueError` for cameras (F frames, float64) that cannot be: not finite, no rotation, not normalised."""
    intrinsics, extrinsics = (np.asarray(part, np.float64) for part in cameras)
    if not (np.isfinite(intrinsics).all() and np.isfinite(extrinsics).all()):
        raise ValueError(f"{name}: holds numbers that are not finite.")
    off = rotations.deviation(extrinsics[..., :3])
    if (off > ROTATION_TOLERANCE).any():
        worst = int(np.argmax(off))
        how = f"is no rotation: R R^T is off the identity by {off.flat[worst]:.2g}, more than {ROTATION_TOLERANCE:g}"
        if np.linalg.det(extrinsics.reshape(-1, 3, 4)[worst, :, :3]) <= 0:
            how = "is a mirror image, not a rotation (determinant below 0)"
        raise ValueError(
            f"{name}: the matrix of frame {worst} {how}. Columns 8 to 19 are a 3x4 matrix [R|t], world to camera, "
            "row by row."
        )
    focal = intrinsics[..., :2]
    if (focal <= 0).any():
        raise ValueError(f"{name}: a focal length is not positive ({focal.min():g}); columns 2 and 3 are fx and fy.")
    if focal.max() > 20 or np.abs(intrinsics[..., 2:]).max() > 20:
        worst = intrinsics.reshape(-1, 4)[0]
        raise ValueError(
            f"{name}: fx, fy, cx, cy = {', '.join(f'{value:g}' for value in worst)} look like pixels. They are to be "
            "normalised: divide fx and cx by the width of the image, fy and cy by its height (so cx, cy are near 0.5)."
        )


def write_cameras(path: str | Path, track: CameraTrack) -> None:
    """Write a camera file that `read_cameras` reads, nine digits after the point."""
    lines = [track.source or "cameras"]
    for time, intrinsics, extrinsics in zip(track.timestamps, track.intrinsics, track.extrinsics, strict=True):
        numbers = [*intrinsics, 0.0, 0.0, *extrinsics.reshape(-1)]
        lines.append(" ".join([str(int(time)), *(f"{number:.9f}" for number in numbers)]))
    Path(path).write_text("\n".join(lines) + "\n")


def _is_row(line: str) -> bool:
    try:
        return len([float(word) for word in line.split()]) > 1
    except ValueError:
        return False


def _row(path: Path, number: int, line: str) -> list[float]:
    words = line.split()
    if len(words) != COLUMNS:
        raise ValueError(
            f"{path}, line {number}: {len(words)} columns, not {COLUMNS} (time, fx, fy, cx, cy, 0, 0, and a "
            "world-to-camera 3x4 matrix row by row)."
        )
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}.") from error
