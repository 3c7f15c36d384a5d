"""Color and direction of motion of a shape in a clip, to compare with its caption.

A closed-form classifier of pixels: nothing is learned from the data that it evaluates. It assumes one saturated shape
in front of a static background of weak color, and ignores shadows and gray textures.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DIRECTIONS = ("left", "right", "toward", "away", "up", "down")

Palette = Mapping[str, tuple[int, int, int]]

_BORDER = 0.125  # share of the width on both sides from which the background is estimated
_MIN_COLOR = 14.0  # color difference from the background below which a pixel is ignored, in 8-bit levels
_MIN_AREA = 0.004  # smallest shape, as a share of a frame's pixels
_MIN_AGREEMENT = 0.3  # share of the votes for the winning color below which a clip counts as noise
_MIN_TRAVEL = 0.04  # motion over the clip, as a share of the frame, below which a shape is static


class ClipLabels(NamedTuple):
    """Predicted labels of a clip.

    Attributes:
      color: name from the palette; None if no shape was found.
      direction: one of `DIRECTIONS`; None if no shape was found or it is static.
      color_confidence: share of the colored pixels that have this color, 0..1.
      direction_confidence: margin over the second direction, relative to the first, 0..1.
      travel: motion over the clip: to the right and down as shares of the frame's sides, and the logarithm of the
        growth in apparent size.
    """

    color: str | None
    direction: str | None
    color_confidence: float = 0.0
    direction_confidence: float = 0.0
    travel: tuple[float, float, float] = (0.0, 0.0, 0.0)


def classify_clip(clip: np.ndarray, palette: Palette, directions: Sequence[str] = DIRECTIONS) -> ClipLabels:
    """Classify the color and the direction of motion of the shape in a clip.

    The color difference of each pixel from the background votes for the palette color of the nearest hue. The direction
    is that of the pixels of the winning color: a weighted regression over time of their centroid and the root of their
    area.

    Args:
      clip: uint8 `F H W 3`, F at least 2 for a direction.
      palette: 8-bit RGB by name; gray tones cannot be distinguished.
      directions: candidates.

    Raises:
      ValueError: a clip of another dtype or shape, or unknown directions.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"clip is {clip.dtype} {clip.shape}: expected uint8 (frames, height, width, 3).")
    if set(directions) - set(DIRECTIONS) or not directions:
        raise ValueError(f"directions = {tuple(directions)}: choose from {', '.join(DIRECTIONS)}.")
    frames, height, width = clip.shape[:3]
    difference = _chroma(clip) - _background(_chroma(clip))
    strength = np.linalg.norm(difference, axis=-1)
    # The threshold rises with noise that fills the frame.
    strength = np.maximum(strength - _MIN_COLOR - 1.5 * np.median(strength), 0.0)
    hues = _chroma(np.array([palette[name] for name in palette], np.float64))
    hues /= np.maximum(np.linalg.norm(hues, axis=-1, keepdims=True), 1e-6)
    votes = np.argmax(difference @ hues.T, axis=-1)
    mass = np.array([strength[votes == index].sum() for index in range(len(palette))])
    if (strength > 0).mean() < _MIN_AREA:
        return ClipLabels(None, None)
    winner = int(np.argmax(mass))
    color, color_confidence = list(palette)[winner], float(mass[winner] / mass.sum())
    if color_confidence < _MIN_AGREEMENT:
        return ClipLabels(None, None)

    mask = np.where(votes == winner, strength, 0.0)
    mask = np.clip(mask / np.percentile(mask[mask > 0], 75), 0.0, 1.0)
    travel = _travel(mask, frames, height, width)
    components = {"right": travel[0], "down": travel[1], "toward": travel[2]}
    components |= {"left": -travel[0], "up": -travel[1], "away": -travel[2]}
    ranked = sorted(directions, key=lambda name: -components[name])
    best = components[ranked[0]]
    if best < _MIN_TRAVEL:
        return ClipLabels(color, None, color_confidence, 0.0, travel)
    second = max(components[ranked[1]], 0.0) if len(ranked) > 1 else 0.0
    return ClipLabels(color, ranked[0], color_confidence, float((best - second) / best), travel)


def motion_score(
    clips: Sequence[np.ndarray],
    labels: Sequence[tuple[str | None, str | None]],
    palette: Palette,
    directions: Sequence[str] = DIRECTIONS,
) -> dict[str, float]:
    """Share of clips that show what their captions say.

    Args:
      clips: uint8 `F H W 3` each.
      labels: (color, direction) of each caption; None for what it does not name.
      palette, directions: see `classify_clip`.

    Returns:
      `color_accuracy`, `direction_accuracy`, `both_accuracy` over the clips whose caption names them (NaN for none),
      the accuracy of guessing (`color_chance`, `direction_chance`), `found` (share of clips with a shape) and `count`.

    Raises:
      ValueError: another number of labels than clips.
    """
    if len(clips) != len(labels):
        raise ValueError(f"{len(clips)} clips, {len(labels)} labels: give one label per clip.")
    found = [classify_clip(clip, palette, directions) for clip in clips]
    color = [seen.color == color for seen, (color, _) in zip(found, labels, strict=True) if color is not None]
    direction = [seen.direction == way for seen, (_, way) in zip(found, labels, strict=True) if way is not None]
    both = [
        seen.color == color and seen.direction == way
        for seen, (color, way) in zip(found, labels, strict=True)
        if color is not None and way is not None
    ]
    return {
        "color_accuracy": _mean(color),
        "direction_accuracy": _mean(direction),
        "both_accuracy": _mean(both),
        "color_chance": 1.0 / len(palette),
        "direction_chance": 1.0 / len(directions),
        "found": _mean([seen.color is not None for seen in found]),
        "count": float(len(clips)),
    }


def _chroma(pixels: np.ndarray) -> np.ndarray:
    """Color without its gray component, which removes shadows and highlights on gray."""
    values = pixels.astype(np.float64)
    return values - values.mean(axis=-1, keepdims=True)


def _background(values: np.ndarray) -> np.ndarray:
    """Median over time and over the pixels near the left and right border, per row: `1 H 1 C`.

    The median over time alone would include a shape that hardly moves; a shape seldom covers both borders.
    """
    columns = max(1, round(_BORDER * values.shape[2]))
    border = np.concatenate([values[:, :, :columns], values[:, :, -columns:]], axis=2)
    return np.median(border, axis=(0, 2), keepdims=True)


def _travel(mask: np.ndarray, frames: int, height: int, width: int) -> tuple[float, float, float]:
    """Motion over the clip (right, down, growth) of a soft mask `F H W`."""
    area = mask.sum(axis=(1, 2))
    seen = np.maximum(area, 1e-9)
    x = (mask.sum(axis=1) @ (np.arange(width) + 0.5)) / seen / width
    y = (mask.sum(axis=2) @ (np.arange(height) + 0.5)) / seen / height
    size = 0.5 * np.log(np.maximum(area, 1e-3))
    # A shape cut by the border looks smaller than it is, so such frames have little weight in its growth.
    edge = mask[:, [0, -1]].sum(axis=(1, 2)) + mask[:, :, [0, -1]].sum(axis=(1, 2))
    cut = np.clip(edge / np.sqrt(seen), 0.0, 1.0)
    present = np.minimum(area / max(np.median(area), 1e-9), 1.0)
    whole = present * np.maximum(1.0 - cut, 0.05) ** 2
    return (
        _slope(x, present) * (frames - 1),
        _slope(y, present) * (frames - 1),
        _slope(size, whole) * (frames - 1),
    )


def _slope(values: np.ndarray, weights: np.ndarray) -> float:
    time = np.arange(len(values), dtype=np.float64)
    total = weights.sum()
    if total <= 0 or len(values) < 2:
        return 0.0
    time = time - (weights @ time) / total
    spread = weights @ time**2
    return float((weights * time) @ (values - (weights @ values) / total) / spread) if spread > 0 else 0.0


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")
