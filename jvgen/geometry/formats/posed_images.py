"""What a file of cameras says about images, in the convention of `jvgen.geometry.cameras`, and how others become it."""

import collections
import dataclasses
import re

import numpy as np

from jvgen.geometry import camera_file
from jvgen.geometry.cameras import Cameras, inverse

DISTORTION = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")
"""Coefficients of the lens as OpenCV orders them."""


@dataclasses.dataclass(frozen=True, eq=False)
class PosedImages:
    """The cameras of F images.

    Attributes:
      names: paths of the images as the file has them.
      intrinsics: float64 (F, 4), normalized by the size.
      extrinsics: float64 (F, 3, 4), world-to-camera with OpenCV axes.
      distortion: float64 (F, 8), coefficients `DISTORTION`; zeros for a pinhole.
      sizes: int64 (F, 2), height and width in pixels of the images that were calibrated; 0 where the file has none.
      seconds: float64 (F,), when each was taken; empty if the file does not say.
    """

    names: tuple[str, ...]
    intrinsics: np.ndarray
    extrinsics: np.ndarray
    distortion: np.ndarray
    sizes: np.ndarray
    seconds: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.names)

    def sorted(self) -> "PosedImages":
        """The same in the order of the names, numbers in them by value."""
        order = sorted(range(len(self)), key=lambda i: _natural(self.names[i]))
        arrays = {
            field: getattr(self, field)[order]
            for field in ("intrinsics", "extrinsics", "distortion", "sizes", "seconds")
            if len(getattr(self, field))
        }
        return dataclasses.replace(self, names=tuple(self.names[i] for i in order), **arrays)

    def check(self, name: str, matrices: str, focal: str, sizes: str) -> None:
        """Raise `ValueError` for no images, a name that occurs twice, or cameras that are none.

        Args:
          name: of the file.
          matrices, focal, sizes: where its format has them; see `jvgen.geometry.camera_file.check`.
        """
        if not len(self):
            raise ValueError(f"{name}: has no cameras.")
        repeated = [image for image, count in collections.Counter(self.names).items() if count > 1]
        if repeated:
            raise ValueError(f"{name}: {repeated[0]} occurs twice; each image has one camera.")
        if not np.isfinite(self.distortion).all():
            raise ValueError(f"{name}: a coefficient of distortion is not finite.")
        cameras = Cameras(self.intrinsics, self.extrinsics)
        camera_file.check(cameras, name, hints=(matrices, focal, sizes), frames=self.names)


def from_opengl(camera_to_world: np.ndarray) -> np.ndarray:
    """World-to-camera [R|t] with OpenCV axes of camera-to-world matrices `... 3|4 4` with OpenGL axes (x right, y up,
    z backward), as nerfstudio, Blender and DL3DV have them."""
    return inverse(np.asarray(camera_to_world, np.float64)[..., :3, :] * np.array([1.0, -1.0, -1.0, 1.0]))


def from_pytorch3d(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """World-to-camera [R|t] with OpenCV axes of PyTorch3D's R `... 3 3` and T `... 3`.

    PyTorch3D multiplies rows, x R + T, and its axes are x left, y up, z forward.
    """
    rotation, translation = np.asarray(rotation, np.float64), np.asarray(translation, np.float64)
    flip = np.array([-1.0, -1.0, 1.0])
    return np.concatenate([np.swapaxes(rotation, -1, -2), translation[..., None]], axis=-1) * flip[:, None]


def from_quaternions(quaternions: np.ndarray) -> np.ndarray:
    """Rotations `... 3 3` of quaternions `... 4`, w first, of any length but 0."""
    w, x, y, z = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def checked_quaternions(name: str, quaternions: np.ndarray, images: tuple[str, ...]) -> np.ndarray:
    """Rotations `F 3 3`; raises `ValueError` for a quaternion (w first) whose length is not about 1."""
    lengths = np.linalg.norm(quaternions, axis=-1)
    wrong = ~(np.abs(lengths - 1) < 1e-2)
    if wrong.any():
        number = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: the quaternion of {images[number]} has the length {lengths[number]:g}; that of a rotation is 1."
        )
    return from_quaternions(quaternions)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts frame_10 after frame_9."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]
