"""Labels of scenes: colors, shapes and motions, the captions made of them, and the labels parsed from captions."""

import dataclasses
import re

import numpy as np

from jvgen.data.scenes.solids import SHAPES

# sRGB of a body's mid-tone as rendered; lit sides are lighter, others darker.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "orange": (240, 128, 24),
    "yellow": (232, 206, 40),
    "green": (44, 160, 62),
    "cyan": (40, 190, 200),
    "blue": (44, 84, 212),
    "purple": (134, 56, 188),
    "pink": (240, 92, 164),
}
DIRECTIONS = ("left", "right", "toward", "away", "up", "down")
CAMERA_MOTIONS = ("orbit left", "orbit right", "forward", "backward", "truck left", "truck right")

_DIRECTION_WORDS = {
    "left": "to the left",
    "right": "to the right",
    "toward": "toward the camera",
    "away": "away from the camera",
    "up": "upward",
    "down": "downward",
}
_CAMERA_WORDS = {
    "orbit left": "the camera orbits left",
    "orbit right": "the camera orbits right",
    "forward": "the camera moves forward",
    "backward": "the camera moves backward",
    "truck left": "the camera slides left",
    "truck right": "the camera slides right",
}
_PHRASES = {
    "dynamic": ("{a} {it} moves {way}", "{a} {it} moving {way}", "the {it} slides {way}"),
    "static": ("{a} {it}, {way}", "{way} around {a} {it}", "a still scene with {a} {it}, {way}"),
    "image": ("{a} {it}", "a picture of {a} {it}", "one {it} on the ground"),
    "driven": (
        "{a} {it} is pushed to the white ring",
        "pushing {a} {it} to the white ring",
        "{a} {it} driven to the white ring",
    ),
}


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels of a caption or scene.

    Attributes:
      color, shape: of the (moving) body.
      direction: one of `DIRECTIONS`, or None.
      camera: one of `CAMERA_MOTIONS`, or None.
      driven: whether the body is pushed to a goal by actions.
    """

    color: str
    shape: str
    direction: str | None = None
    camera: str | None = None
    driven: bool = False


def captions_of(kind: str, labels: Labels) -> tuple[str, ...]:
    """All phrasings of a scene's labels."""
    way = _DIRECTION_WORDS[labels.direction] if labels.direction else _CAMERA_WORDS.get(labels.camera or "", "")
    phrases = _PHRASES["driven" if labels.driven else kind]
    article = "an" if labels.color[0] in "aeiou" else "a"
    return tuple(phrase.format(a=article, it=f"{labels.color} {labels.shape}", way=way) for phrase in phrases)


def labels_of(caption: str) -> Labels:
    """The labels of a caption made by `captions_of`.

    Raises:
      ValueError: a caption without a color and shape of this data set.
    """
    match = re.search(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", caption)
    if match is None:
        raise ValueError(f"caption {caption!r} names no color and shape ({', '.join(COLORS)}; {', '.join(SHAPES)}).")
    camera = next((name for name, words in _CAMERA_WORDS.items() if words in caption), None)
    direction = next((name for name, words in _DIRECTION_WORDS.items() if words in caption), None)
    return Labels(match[1], match[2], None if camera else direction, camera, "white ring" in caption)


def nearest_color(rgb: np.ndarray) -> str:
    """The palette color with the chromaticity nearest to an RGB triple (any scale), regardless of brightness."""
    names = list(COLORS)
    palette = np.array([COLORS[name] for name in names], np.float64)
    palette /= palette.sum(axis=1, keepdims=True)
    given = np.asarray(rgb, np.float64)
    return names[int(np.argmin(np.linalg.norm(palette - given / max(given.sum(), 1e-9), axis=1)))]
