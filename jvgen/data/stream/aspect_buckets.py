"""Buckets for records of many sizes, from one line: each resolution, aspect ratio and number of frames is a bucket."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig


def aspect_buckets(
    *,
    resolutions: Sequence[int],
    aspects: Sequence[str] = ("16:9", "4:3", "1:1", "3:4", "9:16"),
    frames: Sequence[int] = (1, 49),
    batch_size: int = 1,
    multiple: int = 16,
    **fields: Any,
) -> tuple[BucketConfig, ...]:
    """A bucket for every resolution, aspect ratio and number of frames; each record goes to those of its own aspect.

    `DataConfig.tokens_per_step` chooses batch sizes for them.

    Args:
      resolutions: sides of squares with as many pixels as a frame, such as 256 or 480.
      aspects: width to height, such as "16:9". A record belongs to the one that is nearest by ratio.
      frames: of clips; 1 for images, and single frames of clips.
      batch_size: of every bucket.
      multiple: heights and widths are multiples of this: the VAE's factor in space times the patch.
      **fields: other fields of every `BucketConfig`, such as frames_per_second or start_step; `weight` is that of all
        together.

    Raises:
      ConfigError: an aspect that is not "W:H", or two that give the same size.
    """
    ratios = sorted({_ratio(aspect) for aspect in aspects})
    if not (ratios and resolutions and frames):
        raise ConfigError("aspect_buckets: give at least one of resolutions, aspects and frames.")
    borders = [0.0, *(math.sqrt(low * high) for low, high in zip(ratios, ratios[1:], strict=False)), 1e6]
    weight = fields.pop("weight", 1.0) / (len(ratios) * len(resolutions) * len(frames))
    buckets = []
    for resolution in resolutions:
        sizes = [_size(resolution, float(ratio), multiple) for ratio in ratios]
        if len(set(sizes)) < len(sizes):
            same = next(size for size in sizes if sizes.count(size) > 1)
            raise ConfigError(
                f"aspect_buckets: at resolution {resolution}, in multiples of {multiple}, two of the aspects "
                f"{', '.join(aspects)} have the size {same[0]}x{same[1]}; leave one of them out."
            )
        for (height, width), low, high in zip(sizes, borders, borders[1:], strict=False):
            buckets += [
                BucketConfig(
                    frames=count, height=height, width=width, batch_size=batch_size, weight=weight, aspects=(low, high),
                    **fields,
                )
                for count in frames
            ]  # fmt: skip
    return tuple(buckets)


def _ratio(aspect: str) -> Fraction:
    width, separator, height = aspect.partition(":")
    if not (separator and width.strip().isdecimal() and height.strip().isdecimal() and int(width) and int(height)):
        raise ConfigError(f"aspect_buckets: aspect {aspect!r}: width to height, such as '16:9'.")
    return Fraction(int(width), int(height))


def _size(resolution: int, ratio: float, multiple: int) -> tuple[int, int]:
    """Height and width, multiples of `multiple`, of about resolution^2 pixels: the nearest to the aspect ratio."""
    height = resolution / math.sqrt(ratio)
    heights = {max(1, math.floor(height / multiple)), max(1, math.ceil(height / multiple))}
    sizes = [(h * multiple, max(1, round(resolution**2 / (h * multiple) / multiple)) * multiple) for h in heights]
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0] / ratio)), size))
