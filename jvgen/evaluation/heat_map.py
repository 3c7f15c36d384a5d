"""Heat maps as pictures: a grid of small ones with titles, on one scale or each on its own."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

# Dark blue, blue green, green, yellow: lightness rises evenly, so that it reads in grey too.
_ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 144, 140), (93, 201, 99), (253, 231, 37)], np.float64)
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_TITLE, _GAP, _MARGIN = 16, 10, 8  # pixels


def colors(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 RGB of numbers, from dark at `low` to bright at `high`; grey where a number is not finite."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    place = np.where(finite, (values - low) / max(high - low, 1e-12), 0.0).clip(0, 1) * (len(_ANCHORS) - 1)
    lower = np.minimum(place.astype(int), len(_ANCHORS) - 2)
    share = (place - lower)[..., None]
    mixed = _ANCHORS[lower] * (1 - share) + _ANCHORS[lower + 1] * share
    return np.where(finite[..., None], mixed, 200.0).round().astype(np.uint8)


def heat_maps(
    maps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    columns: int = 6,
    size: int = 132,
    scale: tuple[float, float] | None = None,
    note: str = "",
) -> np.ndarray:
    """A picture of several matrices, row 0 at the top.

    Args:
      maps: 2-D arrays.
      titles: one above each.
      columns: maps beside each other.
      size: pixels of the longer side of a map; cells are squares where that fits.
      scale: numbers that are darkest and brightest; None takes the least and greatest of all maps.
      note: a line at the top, followed by the scale.

    Returns:
      uint8 `H W 3`.
    """
    if not maps or len(maps) != len(titles):
        raise ValueError(f"{len(maps)} maps and {len(titles)} titles: give one title for each of at least one map.")
    if scale is None:
        finite = np.concatenate([np.asarray(m, np.float64)[np.isfinite(m)] for m in maps])
        scale = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    cells = [_enlarged(colors(matrix, *scale), size) for matrix in maps]
    width, height = max(cell.shape[1] for cell in cells), max(cell.shape[0] for cell in cells)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    header = _TITLE + _GAP
    head = f"{note}  dark {scale[0]:.4g}, bright {scale[1]:.4g}".strip()
    wide = max(columns * (width + _GAP) - _GAP, math.ceil(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(head)))
    sheet = Image.new("RGB", (2 * _MARGIN + wide, 2 * _MARGIN + header + rows * (height + _TITLE + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), head, fill=_INK)
    for index, (cell, title) in enumerate(zip(cells, titles, strict=True)):
        left = _MARGIN + index % columns * (width + _GAP)
        top = _MARGIN + header + index // columns * (height + _TITLE + _GAP)
        draw.text((left, top), title, fill=_INK)
        sheet.paste(Image.fromarray(cell), (left, top + _TITLE))
    return np.asarray(sheet)


def _enlarged(image: np.ndarray, size: int) -> np.ndarray:
    factor = max(1, size // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
