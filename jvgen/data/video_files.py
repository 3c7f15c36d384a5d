"""Decodes video and image files, of which only the requested frames are read."""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from jvgen.data.image_files import DecodeError, decode_image, encode_image, image_codec, is_image
from jvgen.data.video_encoding import encode_stream, encode_video, write_frames
from jvgen.data.video_pixels import PixelConverter

__all__ = [
    "DecodeError",
    "VideoInfo",
    "decode_window",
    "encode_image",
    "encode_stream",
    "encode_video",
    "inspect",
    "is_image",
    "probe",
    "probe_file",
    "read_frames",
    "timed_frames",
    "write_frames",
]

_CHECK_EVERY = 16  # packets between checks whether enough have been read
# Containers without presentation times: FFmpeg makes some up, which are those of other frames.
_WITHOUT_TIMES = ("avi",)
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
_FASTEST = 1000.0  # frames per second; more is a time base and no rate


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Properties of a clip.

    Attributes:
      frames: exact number of frames.
      height, width: in pixels, as displayed (upright, with square pixels).
      frames_per_second: average rate; 0 for images.
      codec: name of the codec ("h264", "vp9", "png", ...).
      keyframes: number of frames at which decoding can start.
      times: float64 (frames,), seconds from the first frame; empty for images and where the file does not say.
      faithful: whether frames can be found by the times of packets. Where they cannot, windows may hold other frames
        than those with these numbers: such a clip is to be encoded again. Only `inspect` knows.
    """

    frames: int
    height: int
    width: int
    frames_per_second: float
    codec: str
    keyframes: int
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0), compare=False, repr=False)
    faithful: bool = True

    @property
    def has_constant_rate(self) -> bool:
        """Whether every frame is shown within half a frame of its time at a constant rate."""
        if len(self.times) < 2 or self.frames_per_second <= 0:
            return True
        even = np.arange(len(self.times)) / self.frames_per_second
        return bool(np.abs(self.times - even).max() * self.frames_per_second <= 0.5 + 1e-6)


def probe(clip: bytes) -> VideoInfo:
    """Count the frames of an encoded clip or image, and decode its first and last frame to check that it is complete.

    Raises:
      DecodeError: empty, truncated, corrupt, or of an unknown format.
    """
    if is_image(clip):
        return _probe_image(clip)
    info = _probe_packets(clip)
    first = decode_window(clip, [0])
    decode_window(clip, [info.frames - 1])
    return dataclasses.replace(info, height=first.shape[1], width=first.shape[2])


def inspect(clip: bytes) -> VideoInfo:
    """As `probe`, from decoding every frame: finds damage in the middle, and frames that packets do not tell.

    Raises:
      DecodeError: as `probe`, or a frame that is damaged.
    """
    if is_image(clip):
        return _probe_image(clip)
    info = _probe_packets(clip)
    with _opened(clip) as (container, stream):
        packets = _Packets(container, stream, list(_packets(container, stream)))
        sizes, times, converter = {}, [], PixelConverter(stream.sample_aspect_ratio)
        for frame in _checked(_frames(stream, packets.packets[packets.first :]), packets.start):
            if (frame.height, frame.width) not in sizes:
                sizes[frame.height, frame.width] = converter(frame).shape
            times.append(frame.pts)
    if not times:
        raise DecodeError("has no frames")
    if len(sizes) > 1:
        raise DecodeError(f"its frames change size: {sorted(sizes)}")
    [(height, width, _)] = sizes.values()
    return dataclasses.replace(
        info,
        frames=len(times),
        height=height,
        width=width,
        times=info.times if len(times) == info.frames else np.zeros(0),
        faithful=not packets.timed or times == packets.times,
    )


def decode_window(clip: bytes, frames: Sequence[int], *, threads: int = 1) -> np.ndarray:
    """Decode some frames of an encoded clip, or an image (whose only frame is 0).

    Decoding starts at the last keyframe before the first requested frame and stops after the last one. Frames are
    numbered in presentation order. A frame that is predicted from a damaged one is as damaged as that.

    Args:
      clip: the bytes of a file in any container that FFmpeg reads, or of a png, jpeg, webp or bmp image.
      frames: frame numbers in any order; repeats are allowed.
      threads: decoding threads; one is best when many clips are decoded in parallel.

    Returns:
      uint8 (len(frames), H, W, 3), RGB, as displayed (upright, with square pixels).

    Raises:
      DecodeError: a corrupt clip, or one without the requested frames.
    """
    if len(frames) == 0:
        raise DecodeError("no frames were requested")
    if min(frames) < 0:
        raise DecodeError(f"frame {min(frames)} was requested; frames are numbered from 0")
    if is_image(clip):
        if max(frames) > 0:
            raise DecodeError(f"frame {max(frames)} was requested, but this is an image (frame 0 only)")
        return np.repeat(decode_image(clip)[None], len(frames), axis=0)
    wanted = sorted(set(frames))
    pixels = _decode_sorted(clip, wanted, threads)
    missing = [frame for frame in wanted if frame not in pixels]
    if missing:
        raise DecodeError(f"frame {missing[0]} cannot be decoded (corrupt, or the file ends early)")
    shapes = {image.shape for image in pixels.values()}
    if len(shapes) > 1:
        raise DecodeError(f"its frames change size: {sorted(shapes)}")
    return np.stack([pixels[frame] for frame in frames])


def probe_file(path: Path) -> VideoInfo:
    """As `probe`, for files that may be too large for memory; decodes only the first frame.

    Raises:
      DecodeError: as `probe`.
    """
    with path.open("rb") as file:
        if is_image(file.read(16)):
            return _probe_image(path.read_bytes())
    info = _probe_packets(path)
    height, width = next(read_frames(path)).shape[:2]
    return dataclasses.replace(info, height=height, width=width)


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a file as displayed, one at a time: uint8 (H, W, 3). Transparency of videos is ignored.

    Raises:
      DecodeError: a corrupt file, or one whose frames change size.
    """
    with path.open("rb") as file:
        if is_image(file.read(16)):
            yield decode_image(path.read_bytes())
            return
    for pixels, _ in timed_frames(path):
        yield pixels


def timed_frames(clip: bytes | Path) -> Iterator[tuple[np.ndarray, float | None]]:
    """The frames of a video as displayed, uint8 (H, W, 3), each with its time in seconds (None if it has none).

    Raises:
      DecodeError: a corrupt clip, or one whose frames change size.
    """
    with _opened(clip) as (container, stream):
        timed = container.format.name not in _WITHOUT_TIMES
        converter, shape = PixelConverter(stream.sample_aspect_ratio), None
        packets = _from_keyframe(_packets(container, stream))
        first = next(packets, None)
        start = first.pts if first is not None and timed else None
        for frame in _checked(_frames(stream, itertools.chain([first] if first is not None else [], packets)), start):
            pixels = converter(frame)
            shape = pixels.shape if shape is None else shape
            if pixels.shape != shape:
                raise DecodeError(f"its frames change size: {sorted({shape, pixels.shape})}")
            yield pixels, frame.time if timed else None


class _opened:
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


class _Packets:
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
        times = _times_shown(packets[self.first :], stream.codec_context.name)
        self.shown = len(times)
        self.timed = container.format.name not in _WITHOUT_TIMES and None not in times and len(set(times)) == len(times)
        self.times = sorted(times) if self.timed else []
        self.start = packets[self.first].pts if self.timed and packets else None

    def keyframe_before(self, time: int) -> int:
        """Position of the last keyframe at or before a time."""
        starts = [n for n, p in enumerate(self.packets) if p.is_keyframe and p.pts is not None and p.pts <= time]
        return max(starts, default=self.first)


def _times_shown(packets: Sequence[av.Packet], codec: str) -> list[int | None]:
    """Presentation times of the frames to see, in decoding order; the first packet is a keyframe.

    VP8 has frames that are never shown, from which others are predicted. What is shown before the first keyframe is
    predicted from frames that are not there.
    """
    times = [p.pts for p in packets if not p.is_discard and not (codec == "vp8" and not bytes(p)[0] & 0x10)]
    start = packets[0].pts if packets else None
    return [time for time in times if None in (time, start) or time >= start]


def _probe_image(clip: bytes) -> VideoInfo:
    pixels = decode_image(clip)
    return VideoInfo(1, pixels.shape[0], pixels.shape[1], 0.0, image_codec(clip), 1)


def _probe_packets(clip: bytes | Path) -> VideoInfo:
    """What the packets say; the size is 0."""
    with _opened(clip) as (container, stream):
        # AVI counts frames that are repeated without a packet.
        declared = 0 if container.format.name in _WITHOUT_TIMES else stream.frames
        base = stream.time_base
        kept = list(_packets(container, stream))
        packets = _Packets(container, stream, kept)
        codec, stated = stream.codec_context.name, float(stream.average_rate or stream.guessed_rate or 0)
    if packets.shown == 0:
        raise DecodeError("has no frames")
    # A header may count a few packets that an edit list hides, but not a tenth of them.
    if len(kept) < 0.9 * declared:
        raise DecodeError(f"truncated: {len(kept)} of {declared} frames are there")
    ticks = packets.times if packets.timed else sorted(p.dts for p in kept if p.dts is not None)
    seconds = (np.asarray(ticks, np.float64) - ticks[0]) * float(base) if len(ticks) == packets.shown else np.zeros(0)
    measured = float((len(seconds) - 1) / seconds[-1]) if len(seconds) > 1 and seconds[-1] > 0 else 0.0
    # The stated rate is exact, if it is one.
    rate = measured if measured and abs(stated / measured - 1) > 0.005 else stated
    if rate > _FASTEST:
        raise DecodeError(f"its {packets.shown} frames are {rate:g} a second: their times are wrong")
    keyframes = sum(packet.is_keyframe for packet in kept)
    return VideoInfo(packets.shown, 0, 0, rate, codec, keyframes, seconds)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def _from_keyframe(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    return itertools.dropwhile(lambda packet: not packet.is_keyframe, packets)


def _decode_sorted(clip: bytes, wanted: list[int], threads: int) -> dict[int, np.ndarray]:
    """Pixels of those of the wanted frames that the clip has, by number."""
    with _opened(clip) as (container, stream):
        found, complete = _packets_up_to(container, stream, wanted[-1])
        packets = _Packets(container, stream, found)
        stream.codec_context.thread_count = threads
        converter = PixelConverter(stream.sample_aspect_ratio)
        if not packets.timed:
            return _decode_from(stream, found[packets.first :], None, {n: n for n in wanted}, converter, counting=True)
        if wanted[-1] >= packets.shown and complete:
            raise DecodeError(f"frame {wanted[-1]} was requested, but it has {packets.shown} frames")
        number_of = {packets.times[number]: number for number in wanted}
        position = packets.keyframe_before(packets.times[wanted[0]])
        if position > packets.first:
            # Some streams mark frames as keyframes from which decoding only recovers slowly (periodic intra refresh).
            with contextlib.suppress(DecodeError, av.FFmpegError):
                pixels = _decode_from(stream, found[position:], found[position].pts, number_of, converter)
                if len(pixels) == len(wanted):
                    return pixels
            stream.codec_context.flush_buffers()
        return _decode_from(stream, found[packets.first :], packets.start, number_of, converter)


def _decode_from(
    stream: av.VideoStream,
    packets: list[av.Packet],
    start: int | None,
    number_of: dict[int, int],
    converter: PixelConverter,
    *,
    counting: bool = False,
) -> dict[int, np.ndarray]:
    """Pixels by frame number, of the frames whose places (times, or counts if `counting`) are in `number_of`."""
    pixels: dict[int, np.ndarray] = {}
    last, reached = max(number_of), False
    # What was decoded when the last frame comes, it may be predicted from.
    needed = itertools.takewhile(lambda _: not reached, packets)
    for count, frame in enumerate(_checked(_frames(stream, needed), start)):
        place = count if counting else frame.pts
        if place in number_of:
            pixels[number_of[place]] = converter(frame)
        reached = reached or (place is not None and place >= last)
    return pixels


def _packets_up_to(
    container: av.container.InputContainer, stream: av.VideoStream, last: int
) -> tuple[list[av.Packet], bool]:
    """The packets needed for frames 0..last (and some more), and whether they are all packets of the clip."""
    packets: list[av.Packet] = []
    codec = stream.codec_context.name
    for packet in _packets(container, stream):
        packets.append(packet)
        if len(packets) > last and len(packets) % _CHECK_EVERY == 0 and packet.dts is not None:
            times = [time for time in _times_shown(list(_from_keyframe(packets)), codec) if time is not None]
            # Decoding times increase and no frame is shown before it is decoded, so no earlier frame can follow.
            if len(times) > last and sorted(times)[last] < packet.dts:
                return packets, False
    return packets, True


def _frames(stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _checked(frames: Iterable[av.VideoFrame], start: int | None) -> Iterator[av.VideoFrame]:
    """The frames from a presentation time on; raises for one that is damaged, since others are predicted from it."""
    for frame in frames:
        if start is None or frame.pts is None or frame.pts >= start:
            if frame.is_corrupt:
                raise DecodeError(f"the frame at {frame.time} s is corrupt")
            yield frame


def _reason(error: Exception) -> str:
    """FFmpeg's message without its number and file name."""
    return str(error).split("] ")[-1].split(": '")[0].rstrip(".")
