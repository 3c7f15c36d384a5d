"""An image to check the consistency of views: points in one view, and their epipolar lines in the others."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from jvgen.evaluation.contact_sheets import contact_sheet, evenly_spaced
from jvgen.geometry.cameras import Cameras
from jvgen.geometry.epipolar import fundamental_matrices

MIN_HEIGHT = 192  # smaller frames are enlarged to this height, so that lines can be distinguished


def epipolar_sheet(
    videos: np.ndarray, cameras: Cameras, *, frames: int = 3, points: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """Rows of frames, views from left to right: the first view with marked points, the others with their lines.

    If cameras are correct and views consistent, the content of a marked point lies on the line of its color. Cameras
    with a common center have no lines.

    Args:
      videos: uint8 `V F H W 3`.
      cameras: intrinsics `V F 4`, extrinsics `V F 3 4`.
      frames: number of evenly spaced frames.
      points: positions in the first view, from 0 to 1 to the right and down; default nine.

    Returns:
      uint8 `H W 3`.
    """
    views, count, height, width = videos.shape[:4]
    if points is None:
        points = [(x, y) for y in (0.25, 0.5, 0.75) for x in (0.25, 0.5, 0.75)]
    colors = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / len(points), 1.0, 1.0)) for i in range(len(points))]
    scale = max(1, -(-MIN_HEIGHT // height))
    size = (height * scale, width * scale)
    rows = []
    for frame in evenly_spaced(count, frames):
        shown = [np.ascontiguousarray(videos[v, frame].repeat(scale, 0).repeat(scale, 1)) for v in range(views)]
        at = [Cameras(*(np.asarray(part[v, frame], np.float64) for part in cameras)) for v in range(views)]
        for (x, y), color in zip(points, colors, strict=True):
            place = np.array([x * size[1], y * size[0], 1.0])
            cv2.circle(shown[0], (round(place[0]), round(place[1])), 4, color, -1, cv2.LINE_AA)
            for view in range(1, views):
                _draw_line(shown[view], fundamental_matrices(at[0], at[view], size) @ place, color)
        rows.append(np.stack(shown))
    return contact_sheet(rows)


def _draw_line(image: np.ndarray, line: np.ndarray, color: tuple[int, int, int]) -> None:
    """Draw the segment of a line a x + b y + c = 0 within an image, if there is one."""
    height, width = image.shape[:2]
    a, b, c = line
    ends = []
    if abs(b) > 1e-12:
        ends += [(x, -(a * x + c) / b) for x in (0.0, float(width))]
    if abs(a) > 1e-12:
        ends += [(-(b * y + c) / a, y) for y in (0.0, float(height))]
    inside = [(x, y) for x, y in ends if -1e-6 <= x <= width + 1e-6 and -1e-6 <= y <= height + 1e-6]
    if len(inside) > 1:
        first, last = min(inside), max(inside)
        cv2.line(image, *(tuple(int(round(value)) for value in end) for end in (first, last)), color, 1, cv2.LINE_AA)
