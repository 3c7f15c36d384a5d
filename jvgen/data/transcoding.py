"""Clips encoded again: smaller, with other keyframes, at another frame rate, cut into parts."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from jvgen.data.video_files import DecodeError, VideoInfo, encode_stream, probe, timed_frames
from jvgen.data.video_spans import ROUNDING, opened_span


class SlowerThanAsked(DecodeError):
    """A clip has fewer frames per second than are asked for: frames would repeat."""


def transcode(
    clip: bytes,
    *,
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    quality: int = 18,
    frames_per_second: float | None = None,
) -> bytes:
    """Re-encode a clip as H.264 in mp4, with few frames in memory at once.

    Args:
      clip: encoded clip; it is stored upright and with square pixels.
      shorter_side: of the new frames, in pixels; the aspect ratio is kept, rounded to even sizes. Smaller clips keep
        their size.
      keyframe_every, quality: as in `encode_video`.
      frames_per_second: of the new clip. At each of its times it has the frame that is shown then, by the times of the
        frames. None keeps all frames, with their own times where the rate varies.

    Raises:
      SlowerThanAsked: fewer frames per second than `frames_per_second`.
      DecodeError: as `decode_window`, or no frame rate.
    """
    [whole] = transcode_parts(
        clip, [], shorter_side=shorter_side, keyframe_every=keyframe_every, quality=quality,
        frames_per_second=frames_per_second,
    )  # fmt: skip
    return whole


def transcode_parts(
    clip: bytes,
    cuts: Sequence[int],
    *,
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    quality: int = 18,
    frames_per_second: float | None = None,
) -> list[bytes]:
    """As `transcode`, in several clips that begin at frame 0 and at each of `cuts`, which increase."""
    info = probe(clip)
    if info.frames_per_second <= 0:
        raise DecodeError("has no frame rate")
    frames = (pixels for pixels, _ in timed_frames(clip))
    resized = (at_shorter_side(pixels, shorter_side) for pixels in frames)
    seconds = _seconds(info)
    # A frame is also shown for a while; the last one for as long as most.
    step = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 1 / info.frames_per_second
    _check_rate(seconds, step, info.has_constant_rate, frames_per_second)
    parts = []
    for start, stop in itertools.pairwise([0, *cuts, info.frames]):
        mine = itertools.islice(resized, stop - start)
        until = step if stop == info.frames else seconds[stop] - seconds[stop - 1]
        parts.append(
            _encoded(
                mine, seconds[start:stop] - seconds[start], until, info.frames_per_second, info.has_constant_rate,
                frames_per_second, quality=quality, keyframe_every=keyframe_every,
            )
        )  # fmt: skip
        for _ in mine:
            pass  # frames at the end that the new rate leaves out
    return parts


def cut_out(
    clip: bytes | Path,
    start: float,
    stop: float,
    *,
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    quality: int = 18,
    frames_per_second: float | None = None,
    full_color: bool = False,
) -> bytes:
    """The part of a clip in [start, stop), in seconds from its first frame, encoded again.

    Decoding begins at the last keyframe before, so that a short part of a long video costs little.

    Args:
      clip: its bytes, or its file.
      start, stop: in seconds.
      shorter_side, keyframe_every, quality, frames_per_second: as in `transcode`.
      full_color: as in `encode_video`.

    Raises:
      SlowerThanAsked: as `transcode`.
      DecodeError: no frames there, a clip that ends half a second before `stop`, or one that is damaged there.
    """
    for seek in (True, False):
        try:
            with opened_span(clip, start, stop, seek=seek) as span:
                seconds, constant = span.seconds - span.seconds[0], span.has_constant_rate
                _check_rate(seconds, span.step, constant, frames_per_second)
                return _encoded(
                    (at_shorter_side(pixels, shorter_side) for pixels in span.frames), seconds, span.step,
                    span.frames_per_second, constant, frames_per_second, quality=quality,
                    keyframe_every=keyframe_every, full_color=full_color,
                )  # fmt: skip
        except SlowerThanAsked:
            raise
        except DecodeError:
            # Some streams mark frames as keyframes from which decoding only recovers slowly.
            if not seek:
                raise
    raise AssertionError("unreachable")


def _check_rate(seconds: np.ndarray, step: float, constant: bool, frames_per_second: float | None) -> None:
    # A frame that a variable rate holds for long is held in the new clip, too.
    fastest = step if constant else float(np.quantile(np.diff(seconds), 0.1))
    if frames_per_second is not None and fastest > 1.01 / frames_per_second:
        raise SlowerThanAsked(f"has {1 / fastest:.4g} frames a second, fewer than {frames_per_second:g}")


def _encoded(
    frames: Iterator[np.ndarray],
    seconds: np.ndarray,
    until: float,
    rate: float,
    constant: bool,
    frames_per_second: float | None,
    **encoding: object,
) -> bytes:
    """Frames that are shown at `seconds`, the last one for `until`: at their rate, their times, or another rate."""
    if frames_per_second is not None:
        chosen = repeated(frames, shown_at(seconds, until, frames_per_second))
        return encode_stream(chosen, frames_per_second, **encoding)
    return encode_stream(frames, rate, times=None if constant else seconds, **encoding)


def shown_at(seconds: np.ndarray, step: float, frames_per_second: float) -> np.ndarray:
    """Numbers of the frames that are shown at times 0, 1 / rate, 2 / rate, ... until the end of a clip.

    Args:
      seconds: float64 (frames,), when each frame begins to be shown, from 0 and increasing.
      step: seconds for which the last one is shown.
      frames_per_second: the new rate.

    Returns:
      int64 (new frames,), not decreasing.
    """
    count = max(1, int((seconds[-1] + step + ROUNDING) * frames_per_second))
    wanted = np.arange(count) / frames_per_second + ROUNDING
    return np.searchsorted(seconds, wanted, side="right") - 1


def _seconds(info: VideoInfo) -> np.ndarray:
    if len(info.times) == info.frames:
        return info.times
    return np.arange(info.frames) / info.frames_per_second


def at_shorter_side(pixels: np.ndarray, shorter_side: int | None) -> np.ndarray:
    """A frame, uint8 (H, W, 3), downscaled to this many pixels, if it is larger, with even sides in any case."""
    height, width = pixels.shape[:2]
    scale = min(1.0, shorter_side / min(height, width)) if shorter_side else 1.0
    size = tuple(max(2, round(side * scale / 2) * 2) for side in (width, height))
    return pixels if size == (width, height) else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def repeated(frames: Iterator[np.ndarray], numbers: np.ndarray) -> Iterator[np.ndarray]:
    """The frames with these numbers, which do not decrease."""
    wanted = iter(numbers.tolist())
    number = next(wanted, None)
    for position, frame in enumerate(frames):
        while number == position:
            yield frame
            number = next(wanted, None)
        if number is None:
            return
