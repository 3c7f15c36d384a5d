"""Images of lenses with distortion as a pinhole would show them."""

import functools

import cv2
import numpy as np


def undistorted(image: np.ndarray, intrinsics: np.ndarray, distortion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image of a pinhole camera at the same place: of the same size, with all that fills it without empty pixels.

    Args:
      image: uint8 (H, W, 3).
      intrinsics: float64 (4,), normalized, of the image.
      distortion: float64 (8,), OpenCV's k1, k2, p1, p2, k3, k4, k5, k6.

    Returns:
      The image, and its normalized intrinsics.
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
    sides = np.array([width, height, width, height])
    return maps, np.array([new[0, 0], new[1, 1], new[0, 2] + 0.5, new[1, 2] + 0.5]) / sides
