"""Images of lenses with distortion as a pinhole would show them."""

import functools

import cv2
import numpy as np

from jvgen.data.image_files import DecodeError


def undistorted(image: np.ndarray, intrinsics: np.ndarray, distortion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image of a pinhole camera at the same place: of the same size, with all that fills it without empty pixels.

    Args:
      image: uint8 (H, W, 3).
      intrinsics: float64 (4,), normalized, of the image.
      distortion: float64 (8,), OpenCV's k1, k2, p1, p2, k3, k4, k5, k6.

    Returns:
      The image, and its normalized intrinsics.

    Raises:
      DecodeError: coefficients under which one place of the image shows two directions, or that cannot be inverted.
    """
    lens = tuple(float(number) for number in (*intrinsics, *distortion))
    maps, new = _maps(image.shape[0], image.shape[1], lens)
    return cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), new


@functools.lru_cache(maxsize=4)
def _maps(height: int, width: int, lens: tuple[float, ...]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    focal_x, focal_y, center_x, center_y = np.array(lens[:4]) * (width, height, width, height)
    # OpenCV counts from the center of the first pixel, jvgen from its edge.
    matrix = np.array([[focal_x, 0, center_x - 0.5], [0, focal_y, center_y - 0.5], [0, 0, 1]])
    distortion = np.array(lens[4:])
    new, _ = cv2.getOptimalNewCameraMatrix(matrix, distortion, (width, height), 0)
    maps = cv2.initUndistortRectifyMap(matrix, distortion, None, new, (width, height), cv2.CV_32FC1)
    if not _is_one_to_one(*maps):
        written = ", ".join(f"{number:g}" for number in lens[4:])
        raise DecodeError(
            f"its lens distortion ({written} for k1, k2, p1, p2, k3 to k6) folds the image over, or leads out of it: "
            "the coefficients do not hold up to its borders"
        )
    sides = np.array([width, height, width, height])
    return maps, np.array([new[0, 0], new[1, 1], new[0, 2] + 0.5, new[1, 2] + 0.5]) / sides


def _is_one_to_one(columns: np.ndarray, rows: np.ndarray) -> bool:
    """Whether a map of pixels keeps their orientation everywhere, and to where there are pixels."""
    height, width = columns.shape
    inside = [(columns, width), (rows, height)]
    if not all(np.isfinite(places).all() and places.min() > -2 and places.max() < size + 1 for places, size in inside):
        return False
    (right_down, right), (down, down_right) = np.gradient(columns), np.gradient(rows)
    return bool((right * down - right_down * down_right).min() > 0)
