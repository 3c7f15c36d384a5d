"""A part of a video between two times, which is found by its packets: what is before it is not decoded."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from jvgen.data.image_files import DecodeError
from jvgen.data.video_packets import WITHOUT_TIMES, checked, frames_of, from_keyframe, opened, packets_of, times_shown
from jvgen.data.video_pixels import PixelConverter

# A frame may come this many seconds after the time for which it is taken: WebM's times are whole milliseconds.
ROUNDING = 1.5e-3
# Tables give ends of videos with other roundings.
_HEAD = 32  # packets in which the first frame is
_MISSING = 0.5  # seconds that a video may be shorter than its table says


class CannotSeek(DecodeError):
    """A part cannot be found without decoding from the beginning."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Frames of a video in [start, stop).

    Attributes:
      seconds: float64 (F,), when each is shown, from the first frame of the video.
      step: seconds for which the last one is shown.
      stated_rate: frames per second as the file says; 0 if it does not.
      frames: uint8 (H, W, 3) each, decoded as they are taken.
    """

    seconds: np.ndarray
    step: float
    stated_rate: float
    frames: Iterator[np.ndarray]

    @property
    def frames_per_second(self) -> float:
        """The mean rate, or the stated one where it is that but for rounding."""
        if len(self.seconds) < 2:
            return self.stated_rate or 1 / self.step
        measured = (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])
        return self.stated_rate if abs(self.stated_rate / measured - 1) <= 0.005 else float(measured)

    @property
    def has_constant_rate(self) -> bool:
        """Whether every frame is shown within half a frame of its time at the rate."""
        even = self.seconds[0] + np.arange(len(self.seconds)) / self.frames_per_second
        return bool(np.abs(self.seconds - even).max() * self.frames_per_second <= 0.5 + 1e-6)


@contextlib.contextmanager
def opened_span(clip: bytes | Path, start: float, stop: float, *, seek: bool = True) -> Iterator[Span]:
    """The frames of a clip that begin to be shown in [start, stop), in seconds from its first frame.

    Args:
      clip: its bytes, or its file.
      start, stop: in seconds.
      seek: begin at the last keyframe before; otherwise everything is decoded, which is slow but always right.

    Raises:
      CannotSeek: with `seek`, a file in which keyframes cannot be found by their times.
      DecodeError: no frames there, a clip that ends before, or one that is damaged there.
    """
    if not 0 <= start < stop:
        raise DecodeError(f"its times are {start:g} to {stop:g} s: the end must be after the start, and both positive")
    with opened(clip) as (container, stream):
        if container.format.name in WITHOUT_TIMES:
            if seek:
                raise CannotSeek("its packets have no times")
            yield _counted(container, stream, start, stop)
            return
        second = 1 / float(stream.time_base)
        head = list(itertools.islice(from_keyframe(packets_of(container, stream)), _HEAD))
        shown = times_shown(head, stream.codec_context.name)
        if not shown or None in shown or head[0].dts is None:
            raise CannotSeek("its packets have no times") if seek else DecodeError("its packets have no times")
        # What an edit list hides comes before.
        first = min(shown)
        low, high = (first + (time - ROUNDING) * second for time in (max(start, ROUNDING), stop))
        low = first if start == 0 else low
        try:
            container.seek(int(low) if seek else min(head[0].pts, head[0].dts), stream=stream)
        except av.FFmpegError as error:
            raise CannotSeek(f"cannot be read from {start:g} s on ({error})") from error
        packets, complete = _until(container, stream, high)
        if not packets or not packets[0].is_keyframe or packets[0].pts is None or packets[0].pts > low:
            if seek:
                raise CannotSeek(f"has no keyframe before {start:g} s")
            raise DecodeError("has no keyframe")
        times = times_shown(packets, stream.codec_context.name)
        if None in times or len(set(times)) < len(times):
            raise CannotSeek("its packets have no times") if seek else DecodeError("its packets have no distinct times")
        times.sort()
        step = float(np.median(np.diff(times))) if len(times) > 1 else second / float(stream.average_rate or 1)
        end = (times[-1] + step - first) / second
        if complete and end < stop - _MISSING:
            raise DecodeError(f"ends at {end:.2f} s, before {stop:.2f} s")
        wanted = [time for time in times if low <= time < high]
        if not wanted:
            raise DecodeError(f"has no frames from {start:.2f} to {stop:.2f} s")
        yield Span(
            (np.array(wanted, np.float64) - first) / second,
            step / second,
            float(stream.average_rate or stream.guessed_rate or 0),
            _decoded(stream, packets, wanted),
        )


def _until(container: av.container.InputContainer, stream: av.VideoStream, high: float) -> tuple[list[av.Packet], bool]:
    """The packets from the next keyframe on until no frame before a time can follow; and whether it is the end."""
    packets: list[av.Packet] = []
    for packet in from_keyframe(packets_of(container, stream)):
        # No frame is shown before it is decoded.
        if packet.dts is not None and packet.dts >= high:
            return packets, False
        packets.append(packet)
    return packets, True


def _decoded(stream: av.VideoStream, packets: list[av.Packet], wanted: list[int]) -> Iterator[np.ndarray]:
    converter, left, shape = PixelConverter(stream.sample_aspect_ratio), set(wanted), None
    for frame in checked(frames_of(stream, packets), packets[0].pts):
        if frame.pts in left:
            left.remove(frame.pts)
            pixels = converter(frame)
            shape = pixels.shape if shape is None else shape
            if pixels.shape != shape:
                raise DecodeError(f"its frames change size: {sorted({shape, pixels.shape})}")
            yield pixels
        if not left:
            return
    raise DecodeError(f"{len(left)} of {len(wanted)} frames cannot be decoded (corrupt, or the file ends early)")


def _counted(container: av.container.InputContainer, stream: av.VideoStream, start: float, stop: float) -> Span:
    """By the numbers of frames at the stated rate."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if rate <= 0:
        raise DecodeError("has no frame rate")
    first, last = (int(np.ceil((time - ROUNDING) * rate)) for time in (start, stop))
    packets = list(from_keyframe(packets_of(container, stream)))
    count = len(times_shown(packets, stream.codec_context.name))
    if count / rate < stop - _MISSING:
        raise DecodeError(f"ends at {count / rate:.2f} s, before {stop:.2f} s")
    numbers = np.arange(max(0, first), min(last, count))
    if not len(numbers):
        raise DecodeError(f"has no frames from {start:.2f} to {stop:.2f} s")
    converter = PixelConverter(stream.sample_aspect_ratio)
    frames = (
        converter(frame)
        for number, frame in enumerate(checked(frames_of(stream, packets), None))
        if numbers[0] <= number <= numbers[-1]
    )
    return Span(numbers / rate, 1 / rate, rate, frames)
