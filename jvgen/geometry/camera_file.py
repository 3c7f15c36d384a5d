"""Camera files of RealEstate10K: a line with the URL of the video, then one line of 19 columns per frame.

Columns: timestamp in microseconds; fx / width, fy / height, cx / width, cy / height; two zeros; the 3x4 world-to-camera
matrix, row by row (Zhou et al. 2018, arXiv 1805.09817; https://google.github.io/realestate10k).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jvgen.geometry import rotations
from jvgen.geometry.cameras import Cameras
from jvgen.storage import Path, as_path, read_utf8, write_text

COLUMNS = 19
# Largest accepted entry of |R R^T - I|; files with nine digits are within 1e-8.
ROTATION_TOLERANCE = 1e-3
_HINTS = (
    "Columns 8 to 19 are the 3x4 matrix [R|t], world to camera, row by row.",
    "columns 2 and 3 are fx and fy",
    "Normalize them: divide fx and cx by the width of the image, fy and cy by its height (so that cx, cy are near "
    "0.5).",
)


@dataclasses.dataclass(frozen=True, eq=False)
class CameraTrack:
    """The cameras of one clip, F frames.

    Attributes:
      source: URL of the video.
      timestamps: int64 (F,), microseconds from the start of the video.
      intrinsics: float64 (F, 4), normalized by the image size.
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

    def subsample(self, frames: int, name: str = "the camera file") -> "CameraTrack":
        """A track of `frames` evenly spaced cameras, from the first to the last.

        Raises:
          ValueError: the track has fewer cameras.
        """
        if len(self) < frames:
            raise ValueError(
                f"{name} has {len(self)} cameras, fewer than the {frames} requested frames; request at most "
                f"{len(self)}, or give a longer file."
            )
        index = np.linspace(0, len(self) - 1, frames).astype(int)
        return CameraTrack(self.source, self.timestamps[index], self.intrinsics[index], self.extrinsics[index])


def read_cameras(path: str | Path) -> CameraTrack:
    """Read a camera file.

    Raises:
      ValueError: no such file, no cameras, a line without 19 numbers, matrices that are not rotations, intrinsics in
        pixels.
    """
    path = as_path(path)
    if not path.is_file():
        raise ValueError(f"camera file {str(path)!r} does not exist.")
    lines = read_utf8(path).splitlines()
    first = 0 if lines and _is_row(lines[0]) else 1
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if number > first and line.strip()]
    if not rows:
        raise ValueError(
            f"{path}: has no cameras; expected a line with a URL, then one line of {COLUMNS} columns per frame."
        )
    return from_rows(np.array(rows, np.float64), source=lines[0].strip() if first else "", name=str(path))


def from_rows(rows: np.ndarray, *, source: str = "", name: str = "cameras") -> CameraTrack:
    """The track in the rows (F, 19) of a camera file, checked as by `read_cameras`."""
    track = CameraTrack(
        source=source,
        timestamps=rows[:, 0].round().astype(np.int64),
        intrinsics=rows[:, 1:5].copy(),
        extrinsics=rows[:, 7:].reshape(-1, 3, 4).copy(),
    )
    check(track.cameras, name)
    return track


def check(
    cameras: Cameras, name: str, *, hints: tuple[str, str, str] = _HINTS, frames: Sequence[str] | None = None
) -> None:
    """Raise `ValueError` for cameras (F frames, float64) that are not finite, not rotations or not normalized.

    Args:
      cameras: what is checked.
      name: of the file.
      hints: where its format has matrices, focal lengths, and the sizes by which these are divided.
      frames: names of the frames in it; their numbers if None.
    """
    intrinsics, extrinsics = (np.asarray(part, np.float64) for part in cameras)

    def frame(number: int) -> str:
        return f"frame {number}" if frames is None else frames[number]

    finite = np.isfinite(intrinsics).all(axis=-1) & np.isfinite(extrinsics).all(axis=(-2, -1))
    if not finite.all():
        raise ValueError(f"{name}: {frame(int(np.argmin(finite)))} has numbers that are not finite.")
    error = rotations.rotation_error(extrinsics[..., :3])
    if (error > ROTATION_TOLERANCE).any():
        worst = int(np.argmax(error))
        how = f"is not a rotation: R R^T differs from I by {error.flat[worst]:.2g}, more than {ROTATION_TOLERANCE:g}"
        if np.linalg.det(extrinsics.reshape(-1, 3, 4)[worst, :, :3]) <= 0:
            how = "is a mirror image, not a rotation (determinant below 0)"
        raise ValueError(f"{name}: the matrix of {frame(worst)} {how}. {hints[0]}")
    focal = intrinsics[..., :2]
    if (focal <= 0).any():
        raise ValueError(f"{name}: a focal length is not positive ({focal.min():g}); {hints[1]}.")
    if focal.max() > 20 or np.abs(intrinsics[..., 2:]).max() > 20:
        large = np.abs(intrinsics.reshape(-1, 4)).max(axis=-1)
        worst = intrinsics.reshape(-1, 4)[np.argmax(large)]
        raise ValueError(
            f"{name}: fx, fy, cx, cy = {', '.join(f'{value:g}' for value in worst)} look like pixels. {hints[2]}"
        )


def write_cameras(path: str | Path, track: CameraTrack) -> None:
    """Write a camera file for `read_cameras`, with nine decimals."""
    lines = [track.source or "cameras"]
    for time, intrinsics, extrinsics in zip(track.timestamps, track.intrinsics, track.extrinsics, strict=True):
        numbers = [*intrinsics, 0.0, 0.0, *extrinsics.reshape(-1)]
        lines.append(" ".join([str(int(time)), *(f"{number:.9f}" for number in numbers)]))
    write_text(as_path(path), "\n".join(lines) + "\n")


def _is_row(line: str) -> bool:
    try:
        return len([float(word) for word in line.split()]) > 1
    except ValueError:
        return False


def _row(path: Path, number: int, line: str) -> list[float]:
    words = line.split()
    if len(words) != COLUMNS:
        raise ValueError(
            f"{path}, line {number}: {len(words)} columns, not {COLUMNS} (timestamp, fx, fy, cx, cy, 0, 0, and the "
            "3x4 world-to-camera matrix row by row)."
        )
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}.") from error
