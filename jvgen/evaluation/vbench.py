"""Dimensions of VBench (Huang et al. 2024, arXiv 2311.17982) of clips, and measures of single frames.

`temporal_flickering` is computed as published (`jvgen.evaluation.temporal.smoothness`). The other measures here have
the published definition with something else in place of its network, so compare their values with each other and with
those of recorded clips, not with VBench's table:

* `dynamic_degree`: optical flow of DIS (Kroeger et al. 2016), a method without weights, in place of RAFT's.
* `motion_smoothness`: frames between two others by that flow, in place of AMT's.
* `consistency`: any features of frames: of DINOv2 for `subject_consistency` (DINO there), of CLIP for
  `background_consistency` (CLIP ViT-B/32 there).

`sharpness`, `colorfulness` and `noise` stand for `imaging_quality`, which is a network's opinion (MUSIQ). Dimensions
that ask a detector, a captioner or a classifier (objects, colors, actions, scenes, styles, aesthetics) are not here.
"""

import math

import cv2
import numpy as np
from jaxtyping import Float, UInt8

MIN_SIDE = 12  # pixels, which DIS needs
# Flow, in pixels of frames with a shorter side of 256 at 8 frames per second, above which a pair of frames moves, and
# how many pairs of a dynamic clip do so, as a share of its frames: 4 of 16.
MOVING_PIXELS, MOVING_SHARE, RATE = 6.0, 0.25, 8.0
# Share of the pixels of a pair, those with the largest flow, whose mean is the flow of the pair.
LARGEST = 0.05


def flow(first: UInt8[np.ndarray, "H W 3"], second: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 2"]:
    """Where each pixel of a frame goes to in the other, in pixels to the right and down, by DIS."""
    grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grays, None)


def moving_stride(frames_per_second: float) -> int:
    """Of how many frames `is_dynamic` looks at one."""
    return max(1, round(frames_per_second / RATE))


def is_dynamic(clip: UInt8[np.ndarray, "F H W 3"], frames_per_second: float = RATE) -> bool:
    """Whether a clip moves: in a quarter of its frames the largest flow is above a threshold.

    As published: of clips with more than 8 frames per second every n-th frame, n = round(rate / 8); the threshold
    grows with the shorter side. Not published: for slower clips it grows with the time between frames too.

    Raises:
      ValueError: fewer than two frames are left.
    """
    clip = clip[:: moving_stride(frames_per_second)]
    if len(clip) < 2:
        raise ValueError(f"{len(clip)} frame of a clip of {frames_per_second:g} frames per second: needs at least 2.")
    side = min(clip.shape[1:3])
    threshold = max(1.0, RATE / frames_per_second) * MOVING_PIXELS * side / 256.0
    moving = 0
    for first, second in zip(clip[:-1], clip[1:], strict=True):
        lengths = np.sort(np.linalg.norm(flow(first, second), axis=-1).reshape(-1))
        moving += float(lengths[-max(1, int(LARGEST * len(lengths))) :].mean()) > threshold
    return moving >= max(1, round(MOVING_SHARE * len(clip)))


def motion_smoothness(clip: UInt8[np.ndarray, "F H W 3"]) -> float:
    """1 minus the mean absolute difference, as a share of the range, of every second frame from one that is made of its
    neighbors: 1 for still clips and for steady motion.

    Raises:
      ValueError: a clip of fewer than three frames.
    """
    if len(clip) < 3:
        raise ValueError(f"a clip of {len(clip)} frames has none between two others; at least 3 are needed.")
    errors = [
        np.mean(np.abs(clip[middle].astype(np.float64) - between(clip[middle - 1], clip[middle + 1])))
        for middle in range(1, len(clip) - 1, 2)
    ]
    return 1.0 - float(np.mean(errors)) / 255.0


def between(first: UInt8[np.ndarray, "H W 3"], second: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """The frame half way between two: the mean of both, each moved by half of the flow to the other."""
    rows, columns = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)
    moved = []
    for source, other in ((first, second), (second, first)):
        # The flow at the place half way is about that of the pixel that arrives there.
        half = flow(source, other) / 2
        half = cv2.remap(
            half, columns - half[..., 0], rows - half[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE
        )
        places = columns - half[..., 0], rows - half[..., 1]
        moved.append(cv2.remap(source.astype(np.float32), *places, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE))
    return (moved[0] + moved[1]).astype(np.float64) / 2


def consistency(features: Float[np.ndarray, "N F D"]) -> float:
    """The mean cosine of each frame's features with those of the first frame and of the one before, none below 0.

    As published for subject and background: (max(cos(f_0, f_i), 0) + max(cos(f_i-1, f_i), 0)) / 2 over frames i > 0.

    Raises:
      ValueError: a single frame.
    """
    if features.shape[1] < 2:
        raise ValueError("features of 1 frame: consistency needs at least 2.")
    unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    later = unit[:, 1:]
    pairs = (np.sum(later * earlier, axis=-1) for earlier in (unit[:, :1], unit[:, :-1]))
    return float(np.mean([np.maximum(cosines, 0.0) for cosines in pairs]))


def frame_measures(frames: UInt8[np.ndarray, "N H W 3"]) -> dict[str, float]:
    """Means over frames: "sharpness", the variance of the Laplacian of gray values (Pech-Pacheco et al. 2000);
    "colorfulness" (Hasler and Süsstrunk 2003, 0 for gray pictures); "noise", the standard deviation of noise that is
    the same everywhere (Immerkaer 1996), which texture adds to. All of values from 0 to 255.
    """
    found = {"sharpness": [], "colorfulness": [], "noise": []}
    for frame in frames:
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64)
        found["sharpness"].append(cv2.Laplacian(gray, cv2.CV_64F).var())
        red, green, blue = np.moveaxis(frame.astype(np.float64), -1, 0)
        opponents = red - green, (red + green) / 2 - blue
        spread, offset = (math.hypot(*(getattr(one, kind)() for one in opponents)) for kind in ("std", "mean"))
        found["colorfulness"].append(spread + 0.3 * offset)
        inner = cv2.filter2D(gray, cv2.CV_64F, np.outer([1, -2, 1], [1, -2, 1]).astype(np.float64))[1:-1, 1:-1]
        found["noise"].append(math.sqrt(math.pi / 2) * np.abs(inner).mean() / 6)
    return {name: float(np.mean(values)) for name, values in found.items()}
