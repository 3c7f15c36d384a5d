"""Camera paths in numpy float64: named paths for any number of views, and interpolation between two poses.

All named paths start at [I|0], so that the first frames of all views coincide, and end with a camera that looks at the
point one unit in front of the start (arXiv 2405.17414, section 5; the released code's patterns).
"""

import math

import numpy as np

from jvgen.geometry import rotations
from jvgen.geometry.cameras import inverse

PATHS = ("circle", "hemisphere", "interpolate", "dolly")
FOCAL = 223.578 / 256.0  # focal length of the released patterns over the image height: a field of view of 59.6 degrees


def named_paths(name: str, views: int, frames: int, distance: float = 0.5) -> np.ndarray:
    """World-to-camera extrinsics (views, frames, 3, 4).

    Args:
      name: "circle", "hemisphere" (its upper half, from left to right), "interpolate" (a bowed line from right to
        left), or "dolly" (along the optical axis, from farthest back to farthest ahead, without rotation).
      views, frames: number of views, and of frames per view.
      distance: from the center of the first camera to that of the last.

    Raises:
      ValueError: an unknown name, or fewer than one view or frame.
    """
    if name not in PATHS:
        raise ValueError(f"cameras = {name!r}: must be one of {', '.join(PATHS)}, or camera files.")
    if views < 1 or frames < 1:
        raise ValueError(f"views = {views}, frames = {frames}: both must be at least 1.")
    return np.stack([_toward(_end(name, view, views, distance), frames) for view in range(views)])


def default_intrinsics(views: int, frames: int, aspect: float) -> np.ndarray:
    """Normalized intrinsics (views, frames, 4) of the named paths' cameras, for images of width / height `aspect`."""
    return np.broadcast_to([FOCAL / aspect, FOCAL, 0.5, 0.5], (views, frames, 4)).copy()


def interpolate(first: np.ndarray, last: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """World-to-camera extrinsics (n, 3, 4) between two: linear positions, orientations along the shortest rotation."""
    start, end = inverse(np.asarray(first, np.float64)), inverse(np.asarray(last, np.float64))
    fractions = np.asarray(fractions, np.float64)
    orientation = rotations.interpolate(start[:, :3], end[:, :3], fractions)
    position = start[:, 3] + fractions[:, None] * (end[:, 3] - start[:, 3])
    return inverse(np.concatenate([orientation, position[..., None]], axis=-1))


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Extrinsics (3, 4) of a camera that looks at a point, with its x axis in the plane of world x and optical axis.

    Its x axis points to world x: where it looks to negative z, its y axis points to negative world y.

    Raises:
      ValueError: a target at the position, or in the direction of world x from it.
    """
    forward = np.asarray(target, np.float64) - position
    down = np.cross(forward, (1.0, 0.0, 0.0))
    if np.linalg.norm(down) <= 1e-9 * np.linalg.norm(forward):
        where = f"position = {np.asarray(position).tolist()}, target = {np.asarray(target).tolist()}"
        raise ValueError(f"{where}: must differ in y or z, or the camera's x axis is not defined; move one of them.")
    right = np.cross(down, forward)
    columns = [axis / np.linalg.norm(axis) for axis in (right, down, forward)]
    return inverse(np.concatenate([np.stack(columns, axis=1), np.asarray(position, np.float64)[:, None]], axis=1))


def _end(name: str, view: int, views: int, distance: float) -> np.ndarray:
    """World-to-camera extrinsics (3, 4) of the last frame of a view."""
    spread = view / max(views - 1, 1)
    if name == "dolly":
        ahead = distance * (2 * spread - 1 if views > 1 else 1.0)
        return np.concatenate([np.eye(3), [[0.0], [0.0], [-ahead]]], axis=1)
    if name == "circle":
        angle = 2 * math.pi * view / views
        direction = (math.cos(angle), math.sin(angle), 0.0)
    elif name == "hemisphere":
        angle = math.pi * (1 + spread)
        direction = (math.cos(angle), math.sin(angle), 0.0)
    else:
        angle = math.pi * spread
        direction = (math.cos(angle), 0.3 * math.cos(angle + 0.5), -0.2 * math.sin(angle))
    return look_at(distance * np.array(direction), np.array([0.0, 0.0, 1.0]))


def _toward(end: np.ndarray, frames: int) -> np.ndarray:
    start = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    return interpolate(start, end, np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1))
