"""Camera paths on the host: named ones for any number of views, blends between two, float64.

All named paths begin at [I|0], so that the first frames of all views coincide, and end with a camera that looks at the
point one unit in front of the start (arXiv 2405.17414, section 5; the released code's patterns).
"""

import math

import numpy as np

from jvgen.geometry import rotations
from jvgen.geometry.cameras import inverse

PATHS = ("circle", "hemisphere", "interpolate", "dolly")
FOCAL = 223.578 / 256.0  # of the released patterns, over the height of the image: a field of view of 59.6 degrees


def named_paths(name: str, views: int, frames: int, distance: float = 0.5) -> np.ndarray:
    """World-to-camera extrinsics (views, frames, 3, 4).

    Args:
      name: "circle", "hemisphere" (the upper half of it, from left to right), "interpolate" (a bowed line from right to
        left), or "dolly" (along the optical axis, from farthest back to farthest ahead, without turning).
      views, frames: how many.
      distance: how far the last camera is from the first one.

    Raises:
      ValueError: an unknown name, fewer than one view or frame.
    """
    if name not in PATHS:
        raise ValueError(f"cameras = {name!r}: no such path; there are {', '.join(PATHS)}, or give camera files.")
    if views < 1 or frames < 1:
        raise ValueError(f"views = {views}, frames = {frames}: at least one of each.")
    return np.stack([_toward(_end(name, view, views, distance), frames) for view in range(views)])


def default_intrinsics(views: int, frames: int, aspect: float) -> np.ndarray:
    """Normalised intrinsics (views, frames, 4) of the named paths' cameras, for images of width / height `aspect`."""
    return np.broadcast_to([FOCAL / aspect, FOCAL, 0.5, 0.5], (views, frames, 4)).copy()


def blended(first: np.ndarray, last: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """World-to-camera extrinsics (n, 3, 4) between two: positions on a line, orientations along the shortest turn."""
    start, end = inverse(np.asarray(first, np.float64)), inverse(np.asarray(last, np.float64))
    fractions = np.asarray(fractions, np.float64)
    orientation = rotations.interpolated(start[:, :3], end[:, :3], fractions)
    position = start[:, 3] + fractions[:, None] * (end[:, 3] - start[:, 3])
    return inverse(np.concatenate([orientation, position[..., None]], axis=-1))


def looking(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Extrinsics (3, 4) of a camera that looks at a point, x axis in the plane of the world's x axis and its gaze."""
    forward = np.asarray(target, np.float64) - position
    down = np.cross(forward, (1.0, 0.0, 0.0))
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
        place = (math.cos(angle), math.sin(angle), 0.0)
    elif name == "hemisphere":
        angle = math.pi * (1 + spread)
        place = (math.cos(angle), math.sin(angle), 0.0)
    else:
        angle = math.pi * spread
        place = (math.cos(angle), 0.3 * math.cos(angle + 0.5), -0.2 * math.sin(angle))
    return looking(distance * np.array(place), np.array([0.0, 0.0, 1.0]))


def _toward(end: np.ndarray, frames: int) -> np.ndarray:
    start = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    return blended(start, end, np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1))
