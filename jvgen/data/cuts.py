"""Finds the cuts in a video: frames at which another scene begins."""

from collections.abc import Iterable

import cv2
import numpy as np

_SIZE = (64, 36)  # width and height of the pictures that are compared
_WINDOW = 2  # neighbors on each side
_STRONGER = 3.0  # than the change between neighbors
_LEAST = 15.0  # change of hue, saturation and value together, averaged over pixels


def find_cuts(frames: Iterable[np.ndarray]) -> list[int]:
    """Numbers of the frames that begin another scene, increasing; 0 is not among them.

    A cut is a frame that differs from the one before it by a certain least amount, and several times as much as its
    neighbors do, so that fast motion of a camera is none (as PySceneDetect's AdaptiveDetector decides). Fades and
    dissolves are not found.

    Args:
      frames: uint8 (H, W, 3), RGB.
    """
    changes, before = [], None
    for frame in frames:
        small = cv2.cvtColor(cv2.resize(frame, _SIZE, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2HSV).astype(np.int16)
        changes.append(0.0 if before is None else float(np.abs(small - before).mean()))
        before = small
    found = []
    for number in range(1, len(changes)):
        around = changes[max(1, number - _WINDOW) : number] + changes[number + 1 : number + 1 + _WINDOW]
        usual = sum(around) / len(around) if around else 0.0
        if changes[number] >= _LEAST and changes[number] >= _STRONGER * usual:
            found.append(number)
    return found
