"""Previews a data set: a summary, a contact sheet and an animation of some records."""

import collections
import dataclasses
import io

import cv2
import numpy as np
from PIL import Image, ImageDraw

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS, Record
from jvgen.data.store.sources import open_source, splits
from jvgen.data.video_files import DecodeError, decode_window
from jvgen.storage import Path

_COLUMNS = 8  # frames of a record on the contact sheet
_THUMBNAIL = 96  # height of a frame, in pixels
_GAP = 4
_TEXT = 14  # height of a line of text


@dataclasses.dataclass(frozen=True)
class Preview:
    """Preview of a split.

    Attributes:
      text: a summary, and a line per record.
      sheet: PNG bytes; a row of frames and the caption per record (and view).
      animation: GIF bytes; the same records side by side.
    """

    text: str
    sheet: bytes
    animation: bytes


def show(path: str | Path, split: str = "train", count: int = 8) -> Preview:
    """Preview `count` records, evenly spaced over a split.

    Raises:
      ValueError: as `jvgen.data.store.sources.open_source`; `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1.")
    source = open_source(path, split)
    others = ", ".join(f"{name} ({number})" for name, number in splits(source.folder).items())
    lines = [f"{source.folder}: splits {others}", *_summary(split, source.index), ""]
    rows = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    strips = []
    for row in rows:
        record = source.read(int(row))
        lines.append(_line(int(row), record))
        try:
            strips += [(_label(record, view), _frames(record, view)) for view in range(record.views)]
        except DecodeError as error:
            lines.append(f"       cannot be decoded: {error}")
    return Preview("\n".join(lines) + "\n", _sheet(strips), _animation([frames for _, frames in strips]))


def _summary(split: str, index: Index) -> list[str]:
    kinds = collections.Counter(KINDS[code] for code in index.kind.tolist())
    clips = index.frames_per_second > 0

    def span(values: np.ndarray) -> str:
        if not len(values):
            return "-"
        low, high = values.min(), values.max()
        return f"{low:g}" if low == high else f"{low:g}..{high:g} (median {np.median(values):g})"

    facts = {
        "records": f"{len(index)} ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})",
        "size": f"height {span(index.height)}, width {span(index.width)}",
        "frames": f"{span(index.frames[clips])} at {span(index.frames_per_second[clips])} frames/s"
        if clips.any()
        else "1",
        "views": span(index.views),
        "captions": f"{int((index.captions > 0).sum())} records have one or more",
        "cameras": f"{int(index.has_camera.sum())} records",
        "actions": f"{int(index.has_action.sum())} records",
        "latents": f"{int((index.latent_frames > 0).sum())} records",
        "digest": index.digest,
    }
    return [f"{split}:"] + [f"  {name:9} {text}" for name, text in facts.items()]


def _line(row: int, record: Record) -> str:
    size = f"{record.views}x{record.frames}x{record.height}x{record.width}"
    parts = {"camera": record.has_camera, "action": record.has_action, "latents": record.latents.size}
    marks = " ".join(name for name, has in parts.items() if has)
    rate = f"{record.frames_per_second:g}/s" if record.frames_per_second else ""
    bytes_ = sum(len(clip) for clip in record.clips) + record.latents.nbytes
    caption = record.captions[0] if record.captions else "(no caption)"
    return f"{row:7d} {record.id}  {record.kind} {size} {rate} {bytes_ / 1e3:.0f} kB {marks}\n        {caption}"


def _label(record: Record, view: int) -> str:
    caption = record.captions[0] if record.captions else record.id
    return caption if record.views == 1 else f"{caption} [camera {view + 1} of {record.views}]"


def _frames(record: Record, view: int) -> np.ndarray:
    """Up to `_COLUMNS` frames of one view as thumbnails, uint8 (F, h, w, 3)."""
    numbers = np.unique(np.linspace(0, record.frames - 1, min(_COLUMNS, record.frames)).astype(int))
    if record.clips:
        video = decode_window(record.clips[view], numbers.tolist())
    else:
        video = _false_color(record.latents[view])
    height = _THUMBNAIL
    width = max(1, round(video.shape[2] * height / video.shape[1]))
    interpolation = cv2.INTER_AREA if height < video.shape[1] else cv2.INTER_NEAREST
    return np.stack([cv2.resize(frame, (width, height), interpolation=interpolation) for frame in video])


def _false_color(latents: np.ndarray) -> np.ndarray:
    """The first three channels of the mean of cached moments (f, h, w, 2z), stretched to uint8."""
    mean = latents[..., : max(1, latents.shape[-1] // 2)].astype(np.float32)
    mean = np.concatenate([mean] * 3, axis=-1)[..., :3]
    low, high = np.percentile(mean, (1, 99))
    numbers = np.linspace(0, len(mean) - 1, min(_COLUMNS, len(mean))).astype(int)
    return (np.clip((mean[numbers] - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _sheet(strips: list[tuple[str, np.ndarray]]) -> bytes:
    width = max([320, *(len(f) * (f.shape[2] + _GAP) + _GAP for _, f in strips)])
    height = _GAP + len(strips) * (_THUMBNAIL + _TEXT + 2 * _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (label, frames) in enumerate(strips):
        top = _GAP + number * (_THUMBNAIL + _TEXT + 2 * _GAP)
        pen.text((_GAP, top), label, fill="black")
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (_GAP + column * (frame.shape[1] + _GAP), top + _TEXT))
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()


def _animation(clips: list[np.ndarray]) -> bytes:
    columns = min(4, max(1, len(clips)))
    wide = max([1, *(clip.shape[2] for clip in clips)])
    rows = -(-len(clips) // columns)
    size = (columns * (wide + _GAP) + _GAP, max(1, rows) * (_THUMBNAIL + _GAP) + _GAP)
    images = []
    for time in range(_COLUMNS):
        image = Image.new("RGB", size, "white")
        for number, clip in enumerate(clips):
            row, column = divmod(number, columns)
            frame = clip[min(time * len(clip) // _COLUMNS, len(clip) - 1)]
            image.paste(Image.fromarray(frame), (_GAP + column * (wide + _GAP), _GAP + row * (_THUMBNAIL + _GAP)))
        images.append(image)
    buffer = io.BytesIO()
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=200, loop=0)
    return buffer.getvalue()
