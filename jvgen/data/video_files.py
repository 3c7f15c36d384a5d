"""Decodes and encodes video and image files; decoding reads only the requested frames."""

import dataclasses
import io
import platform
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
_IMAGE_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError)
# x264 reads uninitialized memory on its AVX-512 path: the same frames give other bytes about every tenth time.
_DETERMINISTIC = {"x264-params": "asm=SSE4.2"} if platform.machine() in ("x86_64", "AMD64") else {}
_CHECK_EVERY = 16  # packets between checks whether enough have been read


class DecodeError(ValueError):
    """An encoded clip or image whose requested frames cannot be decoded; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Properties of a clip, found without decoding all of it.

    Attributes:
      frames: exact number of frames, counted from the packets.
      height, width: in pixels, as displayed (after rotation).
      frames_per_second: average rate; 0 for images.
      codec: name of the codec ("h264", "vp9", "png", ...).
      keyframes: number of frames at which decoding can start.
    """

    frames: int
    height: int
    width: int
    frames_per_second: float
    codec: str
    keyframes: int


def probe(clip: bytes) -> VideoInfo:
    """Count the frames of an encoded clip or image, and decode its first and last frame to check that it is complete.

    Raises:
      DecodeError: empty, truncated, corrupt, or of an unknown format.
    """
    if is_image(clip):
        pixels = _decode_image(clip)
        return VideoInfo(1, pixels.shape[0], pixels.shape[1], 0.0, _image_codec(clip), 1)
    with _opened(clip) as (container, stream):
        packets = list(_packets(container, stream))
        declared = stream.frames
        rate = stream.average_rate or stream.guessed_rate
        codec = stream.codec_context.name
    frames = sum(not packet.is_discard for packet in packets)
    if frames == 0:
        raise DecodeError("has no frames")
    # A header may count a few packets that an edit list hides, but not a tenth of them.
    if len(packets) < 0.9 * declared:
        raise DecodeError(f"truncated: {len(packets)} of {declared} frames are there")
    first = decode_window(clip, [0])
    decode_window(clip, [frames - 1])
    keyframes = sum(packet.is_keyframe for packet in packets)
    return VideoInfo(frames, first.shape[1], first.shape[2], float(rate or 0), codec, keyframes)


def decode_window(clip: bytes, frames: Sequence[int], *, threads: int = 1) -> np.ndarray:
    """Decode some frames of an encoded clip, or an image (whose only frame is 0).

    Decoding starts at the last keyframe before the first requested frame and stops after the last one. Frames are
    numbered in presentation order.

    Args:
      clip: the bytes of a file in any container that FFmpeg reads, or of a png, jpeg, webp or bmp image.
      frames: frame numbers in any order; repeats are allowed.
      threads: decoding threads; one is best when many clips are decoded in parallel.

    Returns:
      uint8 (len(frames), H, W, 3), RGB, as displayed (after rotation).

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
        return np.repeat(_decode_image(clip)[None], len(frames), axis=0)
    wanted = sorted(set(frames))
    pixels = dict(_decode_sorted(clip, wanted, threads))
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
            return probe(path.read_bytes())
    with _opened(path) as (container, stream):
        declared, codec = stream.frames, stream.codec_context.name
        rate = stream.average_rate or stream.guessed_rate
        frames = keyframes = packets = 0
        for packet in _packets(container, stream):
            packets, frames, keyframes = packets + 1, frames + (not packet.is_discard), keyframes + packet.is_keyframe
    if frames == 0:
        raise DecodeError("has no frames")
    if packets < 0.9 * declared:
        raise DecodeError(f"truncated: {packets} of {declared} frames are there")
    height, width = next(read_frames(path)).shape[:2]
    return VideoInfo(frames, height, width, float(rate or 0), codec, keyframes)


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a file as displayed, one at a time: uint8 (H, W, 3). Transparency is ignored.

    Raises:
      DecodeError: a corrupt file, or one whose frames change size.
    """
    with path.open("rb") as file:
        if is_image(file.read(16)):
            yield _decode_image(path.read_bytes())
            return
    with _opened(path) as (container, stream):
        converter, shape = VideoReformatter(), None
        for frame in _frames(stream, _packets(container, stream)):
            pixels = _to_pixels(frame, converter)
            shape = pixels.shape if shape is None else shape
            if pixels.shape != shape:
                raise DecodeError(f"its frames change size: {sorted({shape, pixels.shape})}")
            yield pixels


def write_frames(path: Path, frames: Iterator[np.ndarray], frames_per_second: float, *, quality: int = 18) -> None:
    """Write a stream of frames, uint8 (H, W, 3), to an mp4 file; see `encode_video`."""
    _encode(frames, frames_per_second, quality, None, False, "veryfast", str(path))


def is_image(clip: bytes) -> bool:
    """Whether these bytes are a still image."""
    return clip.startswith(_IMAGE_MAGIC) or (clip[:4] == b"RIFF" and clip[8:12] == b"WEBP")


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
    return _encode(iter(frames), frames_per_second, quality, keyframe_every, full_color, preset)


def transcode(
    clip: bytes, *, shorter_side: int | None = None, keyframe_every: int | None = None, quality: int = 18
) -> bytes:
    """Re-encode a clip as H.264 in mp4, smaller or with other keyframes, with few frames in memory at once.

    Args:
      clip: encoded clip; a rotated one is stored upright.
      shorter_side: of the new frames, in pixels; the aspect ratio is kept, rounded to even sizes. Smaller clips keep
        their size.
      keyframe_every, quality: as in `encode_video`.

    Raises:
      DecodeError: as `decode_window`.
    """
    info = probe(clip)
    if info.frames_per_second <= 0:
        raise DecodeError("has no frame rate")
    scale = min(1.0, shorter_side / min(info.height, info.width)) if shorter_side else 1.0
    size = tuple(max(2, round(side * scale / 2) * 2) for side in (info.width, info.height))
    with _opened(clip) as (container, stream):
        converter = VideoReformatter()
        pixels = (_to_pixels(frame, converter) for frame in _frames(stream, _packets(container, stream)))
        resized = (cv2.resize(p, size, interpolation=cv2.INTER_AREA) if p.shape[1::-1] != size else p for p in pixels)
        return _encode(resized, info.frames_per_second, quality, keyframe_every, False, "veryfast")


def _encode(
    frames: Iterator[np.ndarray],
    frames_per_second: float,
    quality: int,
    keyframe_every: int | None,
    full_color: bool,
    preset: str,
    target: str | None = None,
) -> bytes:
    """Write a stream of frames to a file, or to the returned bytes."""
    buffer = io.BytesIO()
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
                # No B-frames, so that decoding stops right after the last frame of a window. No scene cuts: x264
                # detects them wrongly in small frames.
                stream.options = {
                    "crf": str(quality),
                    "preset": preset,
                    "bf": "0",
                    "sc_threshold": "0",
                    **_DETERMINISTIC,
                }
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if stream is None:
            raise DecodeError("has no frames")
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_image(image: np.ndarray, *, format: str = "png") -> bytes:
    """Encode one image, uint8 (H, W, 3) RGB, as "png" (exact) or "jpeg"."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=format)
    return buffer.getvalue()


class _opened:
    """Context manager of a container and its first video stream; converts FFmpeg's errors to `DecodeError`.

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
        if not self.container.streams.video:
            self.container.close()
            raise DecodeError("has no video stream")
        return self.container, self.container.streams.video[0]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise DecodeError(f"cannot be decoded ({_reason(error)})") from error


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    for packet in container.demux(stream):
        if packet.size:
            yield packet


def _decode_sorted(clip: bytes, wanted: list[int], threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame number, pixels) of the wanted frames that the clip has."""
    with _opened(clip) as (container, stream):
        packets, complete = _packets_up_to(container, stream, wanted[-1])
        shown = [packet for packet in packets if not packet.is_discard]
        if wanted[-1] >= len(shown) and complete:
            raise DecodeError(f"frame {wanted[-1]} was requested, but it has {len(shown)} frames")
        stream.codec_context.thread_count = threads
        converter = VideoReformatter()
        times = [packet.pts for packet in shown]
        if None in times or len(set(times)) < len(times):
            yield from _decode_counting(stream, packets, set(wanted), converter)
            return
        order = sorted(times)
        number_of = {order[number]: number for number in wanted}
        first, last = order[wanted[0]], order[wanted[-1]]
        start = 0
        for position, packet in enumerate(packets):
            if packet.is_keyframe and packet.pts is not None and packet.pts <= first:
                start = position
        for frame in _frames(stream, packets[start:]):
            if frame.pts in number_of:
                yield number_of[frame.pts], _to_pixels(frame, converter)
            if frame.pts is not None and frame.pts >= last:
                return


def _packets_up_to(
    container: av.container.InputContainer, stream: av.VideoStream, last: int
) -> tuple[list[av.Packet], bool]:
    """The packets needed for frames 0..last (and some more), and whether they are all packets of the clip."""
    packets: list[av.Packet] = []
    for packet in _packets(container, stream):
        packets.append(packet)
        if len(packets) > last and len(packets) % _CHECK_EVERY == 0 and packet.dts is not None:
            shown = [p.pts for p in packets if not p.is_discard and p.pts is not None]
            # Decoding times increase and no frame is shown before it is decoded, so no earlier frame can follow.
            if len(shown) > last and sorted(shown)[last] < packet.dts:
                return packets, False
    return packets, True


def _decode_counting(
    stream: av.VideoStream, packets: list[av.Packet], wanted: set[int], converter: VideoReformatter
) -> Iterator[tuple[int, np.ndarray]]:
    """For clips without (distinct) timestamps: decode from the start and count."""
    for number, frame in enumerate(_frames(stream, packets)):
        if number in wanted:
            yield number, _to_pixels(frame, converter)
        if number >= max(wanted):
            return


def _frames(stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _to_pixels(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    if frame.is_corrupt:
        raise DecodeError(f"the frame at {frame.time} s is corrupt")
    # One converter per clip and one thread: setup takes longer than converting a small frame.
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    # FFmpeg's angle is counterclockwise, like np.rot90's.
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4)) if frame.rotation else pixels


def _decode_image(clip: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(clip)) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except _IMAGE_ERRORS as error:
        raise DecodeError(f"not a readable image ({error})") from error


def _image_codec(clip: bytes) -> str:
    with Image.open(io.BytesIO(clip)) as image:
        return str(image.format).lower()


def _reason(error: Exception) -> str:
    """FFmpeg's message without its number and file name."""
    return str(error).split("] ")[-1].split(": '")[0].rstrip(".")
