"""Encodes frames as H.264 in mp4; the same frames give the same bytes."""

import io
import platform
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from jvgen.data.image_files import DecodeError

# x264 reads uninitialized memory on its AVX-512 path: the same frames give other bytes about every tenth time.
_DETERMINISTIC = {"x264-params": "asm=SSE4.2"} if platform.machine() in ("x86_64", "AMD64") else {}
_TICKS = 90_000  # per second, for clips whose frames have times of their own


def write_frames(path: Path, frames: Iterator[np.ndarray], frames_per_second: float, *, quality: int = 18) -> None:
    """Write a stream of frames, uint8 (H, W, 3), to an mp4 file; see `encode_video`."""
    encode_stream(frames, frames_per_second, quality=quality, target=str(path))


def encode_video(
    frames: np.ndarray,
    frames_per_second: float,
    *,
    quality: int = 18,
    keyframe_every: int | None = None,
    full_color: bool = False,
    preset: str = "veryfast",
) -> bytes:
    """Encode a clip as H.264 in mp4.

    Args:
      frames: uint8 (F, H, W, 3), RGB.
      frames_per_second: positive.
      quality: x264's constant rate factor (CRF), 0 (lossless except for the color space) to 51.
      keyframe_every: keyframe interval in frames; one second by default. Short intervals make windows cheap to decode.
      full_color: keep color at full resolution (4:4:4); always on for odd sizes, which 4:2:0 does not support.
      preset: x264's speed preset.

    Returns:
      The bytes of the mp4 file; the same input gives the same bytes.

    Raises:
      ValueError: frames of another shape or dtype, or a rate that is not positive.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ValueError(f"frames: expected uint8 (F, H, W, 3), got {frames.dtype} {frames.shape}.")
    if not frames_per_second > 0:
        raise ValueError(f"frames_per_second = {frames_per_second}: must be positive.")
    return encode_stream(
        iter(frames), frames_per_second, quality=quality, keyframe_every=keyframe_every, full_color=full_color,
        preset=preset,
    )  # fmt: skip


def encode_stream(
    frames: Iterable[np.ndarray],
    frames_per_second: float,
    *,
    times: Iterable[float] | None = None,
    quality: int = 18,
    keyframe_every: int | None = None,
    full_color: bool = False,
    preset: str = "veryfast",
    target: str | None = None,
) -> bytes:
    """As `encode_video`, of frames that come one by one, to the file `target` or to the returned bytes.

    Args:
      times: seconds of each frame, increasing from 0; a constant rate if None.

    Raises:
      DecodeError: no frames.
    """
    buffer = io.BytesIO()
    ticks = iter(times) if times is not None else None
    with av.open(target or buffer, mode="w", format="mp4") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1001))
                stream.height, stream.width = frame.shape[:2]
                odd = frame.shape[0] % 2 or frame.shape[1] % 2
                stream.pix_fmt = "yuv444p" if full_color or odd else "yuv420p"
                every = max(1, round(frames_per_second)) if keyframe_every is None else keyframe_every
                stream.codec_context.gop_size = every
                stream.codec_context.thread_count = 1  # more would make the bytes depend on the machine
                if ticks is not None:
                    stream.codec_context.time_base = Fraction(1, _TICKS)
                # No B-frames, so that decoding stops right after the last frame of a window. No scene cuts: x264
                # detects them wrongly in small frames.
                stream.options = {
                    "crf": str(quality),
                    "preset": preset,
                    "bf": "0",
                    "sc_threshold": "0",
                    **_DETERMINISTIC,
                }
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if ticks is not None:
                picture.pts, picture.time_base = round(next(ticks) * _TICKS), Fraction(1, _TICKS)
            container.mux(stream.encode(picture))
        if stream is None:
            raise DecodeError("has no frames")
        container.mux(stream.encode(None))
    return buffer.getvalue()
