"""What a clip of a coloured shape shows: the shape's colour and which way it moves, to be compared with a caption.

Everything is closed-form on pixels, so that nothing about the measure is learned from the data that it judges. Made for
one saturated shape before a still background of weak colour; shadows and grey textures are ignored.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DIRECTIONS = ("left", "right", "toward", "away", "up", "down")

Palette = Mapping[str, tuple[int, int, int]]

_BORDER = 0.125  # share of the width at either side that the background is read from
_LEAST_COLOR = 14.0  # colour difference to the background below which a pixel says nothing, in 8-bit levels
_LEAST_SHARE = 0.004  # share of a frame's pixels that a shape has at least
_LEAST_AGREEMENT = 0.3  # share of the votes for the first colour below which the clip is taken for noise
_LEAST_TRAVEL = 0.04  # movement over the clip, as a share of the frame, below which a shape stands still


class ClipLabels(NamedTuple):
    """What a clip shows.

    Attributes:
      color: name from the palette; None where no shape was found.
      direction: one of `DIRECTIONS`; None where no shape was found or it stands still.
      color_confidence: share of the coloured pixels that have this colour, 0..1.
      direction_confidence: how far this direction is ahead of the next one, 0..1.
      travel: movement over the clip: to the right and downward as shares of the frame's sides, and the logarithm of
        the growth in apparent size.
    """

    color: str | None
    direction: str | None
    color_confidence: float = 0.0
    direction_confidence: float = 0.0
    travel: tuple[float, float, float] = (0.0, 0.0, 0.0)


def classify_clip(clip: np.ndarray, palette: Palette, directions: Sequence[str] = DIRECTIONS) -> ClipLabels:
    """Find the colour and the direction of the shape in a clip.

    A pixel's colour difference to the background votes for the palette colour of the nearest hue. The pixels of the
    colour with most votes are followed: their centroid and the root of their area, by weighted regression over time.

    Args:
      clip: uint8 `F H W 3`, F at least 2 for a direction.
      palette: 8-bit RGB by name; grey tones cannot be told apart.
      directions: those to choose from.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"clip is {clip.dtype} {clip.shape}: expected uint8 (frames, height, width, 3).")
    if set(directions) - set(DIRECTIONS) or not directions:
        raise ValueError(f"directions = {tuple(directions)}: choose from {', '.join(DIRECTIONS)}.")
    frames, height, width = clip.shape[:3]
    difference = _chroma(clip) - _background(_chroma(clip))
    strength = np.linalg.norm(difference, axis=-1)
    # Noise that fills the frame raises the bar for itself.
    strength = np.maximum(strength - _LEAST_COLOR - 1.5 * np.median(strength), 0.0)
    hues = _chroma(np.array([palette[name] for name in palette], np.float64))
    hues /= np.maximum(np.linalg.norm(hues, axis=-1, keepdims=True), 1e-6)
    votes = np.argmax(difference @ hues.T, axis=-1)
    mass = np.array([strength[votes == index].sum() for index in range(len(palette))])
    if (strength > 0).mean() < _LEAST_SHARE:
        return ClipLabels(None, None)
    winner = int(np.argmax(mass))
    color, color_confidence = list(palette)[winner], float(mass[winner] / mass.sum())
    if color_confidence < _LEAST_AGREEMENT:
        return ClipLabels(None, None)

    mask = np.where(votes == winner, strength, 0.0)
    mask = np.clip(mask / np.percentile(mask[mask > 0], 75), 0.0, 1.0)
    travel = _travel(mask, frames, height, width)
    components = {"right": travel[0], "down": travel[1], "toward": travel[2]}
    components |= {"left": -travel[0], "up": -travel[1], "away": -travel[2]}
    ranked = sorted(directions, key=lambda name: -components[name])
    best = components[ranked[0]]
    if best < _LEAST_TRAVEL:
        return ClipLabels(color, None, color_confidence, 0.0, travel)
    second = max(components[ranked[1]], 0.0) if len(ranked) > 1 else 0.0
    return ClipLabels(color, ranked[0], color_confidence, float((best - second) / best), travel)


def score(
    clips: Sequence[np.ndarray],
    labels: Sequence[tuple[str | None, str | None]],
    palette: Palette,
    directions: Sequence[str] = DIRECTIONS,
) -> dict[str, float]:
    """Share of clips that show what their captions say.

    Args:
      clips: uint8 `F H W 3` each.
      labels: (color, direction) that each caption asks for; None where it says nothing of it.
      palette, directions: see `classify_clip`.

    Returns:
      `color_accuracy`, `direction_accuracy`, `both_accuracy` over the clips whose caption speaks of it (NaN for none),
      the accuracy of guessing (`color_chance`, `direction_chance`), `found` (share of clips with a shape) and `count`.
    """
    if len(clips) != len(labels):
        raise ValueError(f"{len(clips)} clips, {len(labels)} labels: one label a clip.")
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
    """Colour without its grey part, so that shadows and highlights on grey vanish."""
    values = pixels.astype(np.float64)
    return values - values.mean(axis=-1, keepdims=True)


def _background(values: np.ndarray) -> np.ndarray:
    """Median over time and over the pixels near the left and right border, row by row: `1 H 1 C`.

    A shape that hardly moves covers its own pixels in the median over time; it seldom covers both borders.
    """
    columns = max(1, round(_BORDER * values.shape[2]))
    border = np.concatenate([values[:, :, :columns], values[:, :, -columns:]], axis=2)
    return np.median(border, axis=(0, 2), keepdims=True)


def _travel(mask: np.ndarray, frames: int, height: int, width: int) -> tuple[float, float, float]:
    """Movement over the clip (right, down, growth) of a soft mask `F H W`."""
    area = mask.sum(axis=(1, 2))
    seen = np.maximum(area, 1e-9)
    x = (mask.sum(axis=1) @ (np.arange(width) + 0.5)) / seen / width
    y = (mask.sum(axis=2) @ (np.arange(height) + 0.5)) / seen / height
    size = 0.5 * np.log(np.maximum(area, 1e-3))
    # A shape cut by the border looks smaller than it is; such frames hardly count for its size.
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
