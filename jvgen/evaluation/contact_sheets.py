"""Clips as images: contact sheets, GIF and PNG bytes."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 2  # pixels between the frames of a contact sheet
_PAPER = 255
_LETTERS = 13  # pixels


def contact_sheet(
    clips: Sequence[np.ndarray], *, frames: int | None = None, scale: int = 1, labels: Sequence[str] = ()
) -> np.ndarray:
    """One row per clip, frames from left to right.

    Args:
      clips: uint8 `F H W 3`, all frames of one size.
      frames: number of evenly spaced frames of each clip, including the first and last; default all.
      scale: side of the square that each pixel becomes.
      labels: a text for each row, written to the left of it; lines are separated by line breaks.

    Returns:
      uint8 `H W 3`; white where a clip has fewer frames.

    Raises:
      ValueError: no clips, clips of different sizes, or not as many labels as rows.
    """
    if not clips:
        raise ValueError("a contact sheet needs at least one clip.")
    for clip in clips:
        _check(clip)
    height, width = clips[0].shape[1:3]
    if any(clip.shape[1:3] != (height, width) for clip in clips):
        raise ValueError(f"clips of different sizes: {sorted({clip.shape[1:3] for clip in clips})}; resize them first.")
    if labels and len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels for {len(clips)} rows; give one per row.")
    rows = [clip if frames is None else clip[evenly_spaced(len(clip), frames)] for clip in clips]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _PAPER, np.uint8)
    for r, row in enumerate(rows):
        for c, frame in enumerate(row):
            top, left = r * (height + _GAP), c * (width + _GAP)
            sheet[top : top + height, left : left + width] = frame
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    return labeled_rows(sheet, labels) if labels else sheet


def labeled_rows(sheet: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """A sheet of equally high rows, uint8 `H W 3`, with a text to the left of each.

    Raises:
      ValueError: fewer texts than the height divides into rows of a pixel.
    """
    if not 1 <= len(labels) <= len(sheet):
        raise ValueError(f"{len(labels)} labels for a sheet of {len(sheet)} rows of pixels.")
    font = ImageFont.load_default(size=_LETTERS)
    width = round(max(font.getlength(line) for label in labels for line in label.split("\n"))) + 2 * _LETTERS
    page = Image.new("RGB", (width + sheet.shape[1], sheet.shape[0]), (_PAPER,) * 3)
    page.paste(Image.fromarray(sheet), (width, 0))
    draw, height = ImageDraw.Draw(page), sheet.shape[0] / len(labels)
    for number, label in enumerate(labels):
        place = (_LETTERS // 2, (number + 0.5) * height)
        draw.multiline_text(place, label, fill=(40, 40, 40), font=font, anchor="lm", spacing=3)
    return np.asarray(page)


def evenly_spaced(available: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` of `available` frames, or of all if there are fewer."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).round().astype(int))


def png_bytes(image: np.ndarray) -> bytes:
    """PNG of a uint8 `H W 3` image."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def gif_bytes(clip: np.ndarray, *, frames_per_second: float = 8.0, scale: int = 1) -> bytes:
    """Looping GIF of a uint8 `F H W 3` clip, with one palette, so that a static background does not flicker."""
    _check(clip)
    if frames_per_second <= 0:
        raise ValueError(f"frames_per_second = {frames_per_second}: must be positive.")
    frames = [
        Image.fromarray(np.ascontiguousarray(frame)) for frame in clip.repeat(scale, axis=1).repeat(scale, axis=2)
    ]
    strip = Image.fromarray(np.concatenate(list(clip), axis=0))
    palette = strip.quantize(colors=256, method=Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=max(20, round(1000 / frames_per_second)),
        loop=0,
        optimize=False,
    )
    return buffer.getvalue()


def _check(clip: np.ndarray) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
        raise ValueError(f"clip is {clip.dtype} {clip.shape}: expected uint8 (frames, height, width, 3).")
