"""Augmentation of clips: one crop and one color jitter for all frames, from uniform numbers that the plan draws.

Random resized crops and color jitter as in iVideoGPT (arXiv 2405.15223, appendix A.3, and its released code).
"""

import dataclasses
import math
from typing import Annotated

import cv2
import numpy as np

from jvgen.config import Config
from jvgen.value_rules import BelowOne, Bounds, Positive

MAX_CROP_TRIES = 10
# Uniform numbers per clip: four per try of a crop, four jitter factors, four for their order.
UNIFORMS = 4 * MAX_CROP_TRIES + 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Config):
    """Ranges of the augmentation. Clips with cameras or cached latents are not augmented.

    Attributes:
      crop_area: smallest and largest area of the crop, as a fraction of the largest square that fits the frame.
      crop_ratio: smallest and largest aspect ratio (width / height) of the crop, drawn log-uniformly.
      brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
      hue: shifts are drawn from -x to x, in revolutions of the color wheel.
    """

    crop_area: tuple[Positive, Positive] = (0.8, 1.0)
    crop_ratio: tuple[Positive, Positive] = (0.9, 1.1)
    brightness: BelowOne = 0.1
    contrast: BelowOne = 0.1
    saturation: BelowOne = 0.1
    hue: Annotated[float, Bounds(at_least=0, at_most=0.5)] = 0.05

    def validate(self) -> None:
        for name in ("crop_area", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = {(low, high)}: the smallest and the largest; exchange them.")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The augmentation of one clip: the configuration and `UNIFORMS` numbers in [0, 1)."""

    config: AugmentationConfig
    uniforms: tuple[float, ...]

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop: the first try that fits, else the largest center square."""
        side = min(height, width)
        low, high = self.config.crop_area
        ratios = [math.log(ratio) for ratio in self.config.crop_ratio]
        for number in range(MAX_CROP_TRIES):
            area, ratio, top, left = self.uniforms[4 * number : 4 * number + 4]
            area = (low + area * (high - low)) * side * side
            ratio = math.exp(ratios[0] + ratio * (ratios[1] - ratios[0]))
            rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                return int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns
        return (height - side) // 2, (width - side) // 2, side, side

    def apply(self, video: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Crop uint8 frames `F h w 3`, resize them to `size` (height, width) and jitter their colors; uint8."""
        top, left, rows, columns = self.crop(*video.shape[1:3])
        height, width = size
        shrinks = height <= rows and width <= columns
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        cropped = video[:, top : top + rows, left : left + columns]
        resized = np.stack([cv2.resize(frame, (width, height), interpolation=interpolation) for frame in cropped])
        return self.jitter(resized)

    def jitter(self, video: np.ndarray) -> np.ndarray:
        """Change brightness, contrast, saturation and hue, equally in all frames and in random order; uint8."""
        drawn = np.asarray(self.uniforms[4 * MAX_CROP_TRIES :], np.float32)
        order = np.argsort(drawn[4:])
        spans = (self.config.brightness, self.config.contrast, self.config.saturation)
        factors = [np.float32(1 + span * (2 * number - 1)) for span, number in zip(spans, drawn[:3], strict=True)]
        shift = np.float32(self.config.hue * (2 * drawn[3] - 1))
        frames = video.astype(np.float32)
        for change in order:
            if change == 0:
                frames = frames * factors[0]
            elif change == 1:
                # Toward the mean gray of each frame.
                gray = _gray(frames).mean(axis=(1, 2, 3), keepdims=True)
                frames = gray + factors[1] * (frames - gray)
            elif change == 2:
                gray = _gray(frames)
                frames = gray + factors[2] * (frames - gray)
            else:
                frames = _shift_hue(frames, shift)
            frames = np.clip(frames, 0.0, 255.0)
        return np.rint(frames).astype(np.uint8)


def _gray(frames: np.ndarray) -> np.ndarray:
    return frames @ np.array([[0.299], [0.587], [0.114]], np.float32)


def _shift_hue(frames: np.ndarray, shift: float) -> np.ndarray:
    """Hues shifted by a fraction of a revolution; `F H W 3` float32 in 0..255."""
    shifted = np.empty_like(frames)
    for number, frame in enumerate(frames):
        hsv = cv2.cvtColor(frame / np.float32(255), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + np.float32(360) * shift) % np.float32(360)
        shifted[number] = 255.0 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return shifted
