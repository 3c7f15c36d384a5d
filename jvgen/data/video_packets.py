"""Containers and their packets: what they say about frames, and decoding them in order with every damage found."""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
from av.stream import Disposition

from jvgen.data.image_files import DecodeError

# Containers without presentation times: FFmpeg makes some up, which are those of other frames.
WITHOUT_TIMES = ("avi",)
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails


class opened:
    """Context manager of a container and its first video stream that is no cover picture; converts FFmpeg's errors to
    `DecodeError`.

    A file is read while it is decoded.
    """

    def __init__(self, clip: bytes | Path):
        self.clip = clip
        self.container: av.container.InputContainer | None = None

    def __enter__(self) -> tuple[av.container.InputContainer, av.VideoStream]:
        if not (self.clip.stat().st_size if isinstance(self.clip, Path) else self.clip):
            raise DecodeError("the file is empty")
        try:
            self.container = av.open(str(self.clip) if isinstance(self.clip, Path) else io.BytesIO(self.clip), mode="r")
        except (av.FFmpegError, UnicodeDecodeError) as error:
            raise DecodeError(f"not a readable video or image ({_reason(error)})") from error
        found = self.container.streams.video
        videos = [stream for stream in found if not stream.disposition & _COVERS]
        if not videos:
            self.container.close()
            raise DecodeError("has no video stream" + (", only a cover picture" if found else ""))
        return self.container, videos[0]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise DecodeError(f"cannot be decoded ({_reason(error)})") from error


class Packets:
    """What packets say about frames.

    Attributes:
      packets: in decoding order.
      first: position of the first keyframe: nothing before it can be decoded.
      start: its presentation time, None without.
      shown: number of frames that are shown.
      timed: whether these have distinct presentation times, by which frames are found.
      times: their sorted presentation times, if `timed`.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, packets: list[av.Packet]):
        self.packets = packets
        self.first = next((number for number, packet in enumerate(packets) if packet.is_keyframe), 0)
        times = times_shown(packets[self.first :], stream.codec_context.name)
        self.shown = len(times)
        self.timed = container.format.name not in WITHOUT_TIMES and None not in times and len(set(times)) == len(times)
        self.times = sorted(times) if self.timed else []
        self.start = packets[self.first].pts if self.timed and packets else None

    def keyframe_before(self, time: int) -> int:
        """Position of the last keyframe at or before a time."""
        starts = [n for n, p in enumerate(self.packets) if p.is_keyframe and p.pts is not None and p.pts <= time]
        return max(starts, default=self.first)


def times_shown(packets: Sequence[av.Packet], codec: str) -> list[int | None]:
    """Presentation times of the frames to see, in decoding order; the first packet is a keyframe.

    VP8 has frames that are never shown, from which others are predicted. What is shown before the first keyframe is
    predicted from frames that are not there.
    """
    times = [p.pts for p in packets if not p.is_discard and not (codec == "vp8" and not bytes(p)[0] & 0x10)]
    start = packets[0].pts if packets else None
    return [time for time in times if None in (time, start) or time >= start]


def packets_of(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def from_keyframe(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    return itertools.dropwhile(lambda packet: not packet.is_keyframe, packets)


def frames_of(stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def checked(frames: Iterable[av.VideoFrame], start: int | None) -> Iterator[av.VideoFrame]:
    """The frames from a presentation time on; raises for one that is damaged, since others are predicted from it."""
    for frame in frames:
        if start is None or frame.pts is None or frame.pts >= start:
            if frame.is_corrupt:
                raise DecodeError(f"the frame at {frame.time} s is corrupt")
            yield frame


def _reason(error: Exception) -> str:
    """FFmpeg's message without its number and file name."""
    return str(error).split("] ")[-1].split(": '")[0].rstrip(".")
