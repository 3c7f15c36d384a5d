"""Decodes video and image files, of which only the requested frames are read."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from jvgen.data.image_files import DecodeError, decode_image, encode_image, image_codec, is_image
from jvgen.data.video_encoding import encode_stream, encode_video, write_frames
from jvgen.data.video_packets import (
    WITHOUT_TIMES,
    Packets,
    checked,
    frames_of,
    from_keyframe,
    opened,
    packets_of,
    times_shown,
)
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
    with opened(clip) as (container, stream):
        packets = Packets(container, stream, list(packets_of(container, stream)))
        sizes, times, converter = {}, [], PixelConverter(stream.sample_aspect_ratio)
        for frame in checked(frames_of(stream, packets.packets[packets.first :]), packets.start):
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
    with opened(clip) as (container, stream):
        timed = container.format.name not in WITHOUT_TIMES
        converter, shape = PixelConverter(stream.sample_aspect_ratio), None
        packets = from_keyframe(packets_of(container, stream))
        first = next(packets, None)
        start = first.pts if first is not None and timed else None
        for frame in checked(frames_of(stream, itertools.chain([first] if first is not None else [], packets)), start):
            pixels = converter(frame)
            shape = pixels.shape if shape is None else shape
            if pixels.shape != shape:
                raise DecodeError(f"its frames change size: {sorted({shape, pixels.shape})}")
            yield pixels, frame.time if timed else None


def _probe_image(clip: bytes) -> VideoInfo:
    pixels = decode_image(clip)
    return VideoInfo(1, pixels.shape[0], pixels.shape[1], 0.0, image_codec(clip), 1)


def _probe_packets(clip: bytes | Path) -> VideoInfo:
    """What the packets say; the size is 0."""
    with opened(clip) as (container, stream):
        # AVI counts frames that are repeated without a packet.
        declared = 0 if container.format.name in WITHOUT_TIMES else stream.frames
        base = stream.time_base
        kept = list(packets_of(container, stream))
        packets = Packets(container, stream, kept)
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


def _decode_sorted(clip: bytes, wanted: list[int], threads: int) -> dict[int, np.ndarray]:
    """Pixels of those of the wanted frames that the clip has, by number."""
    with opened(clip) as (container, stream):
        found, complete = _packets_up_to(container, stream, wanted[-1])
        packets = Packets(container, stream, found)
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
    for count, frame in enumerate(checked(frames_of(stream, needed), start)):
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
    for packet in packets_of(container, stream):
        packets.append(packet)
        if len(packets) > last and len(packets) % _CHECK_EVERY == 0 and packet.dts is not None:
            times = [time for time in times_shown(list(from_keyframe(packets)), codec) if time is not None]
            # Decoding times increase and no frame is shown before it is decoded, so no earlier frame can follow.
            if len(times) > last and sorted(times)[last] < packet.dts:
                return packets, False
    return packets, True
