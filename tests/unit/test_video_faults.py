"""Files as cameras and programs write them, with their right values: geometry, times, hidden frames, covers, damage."""

import io
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition

from jvgen.data.transcoding import SlowerThanAsked, shown_at, transcode
from jvgen.data.video_files import DecodeError, decode_window, encode_image, encode_video, inspect, probe
from jvgen.data.video_pixels import EXACT

FRAMES, HEIGHT, WIDTH = 30, 48, 64
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT = (220, 30, 30), (30, 200, 30), (30, 30, 220)


def quadrants(frames: int = FRAMES) -> np.ndarray:
    """Corners of known colors; the bottom right one has the gray level 8 n in frame n."""
    video = np.zeros((frames, HEIGHT, WIDTH, 3), np.uint8)
    video[:, : HEIGHT // 2, : WIDTH // 2] = TOP_LEFT
    video[:, : HEIGHT // 2, WIDTH // 2 :] = TOP_RIGHT
    video[:, HEIGHT // 2 :, : WIDTH // 2] = BOTTOM_LEFT
    video[:, HEIGHT // 2 :, WIDTH // 2 :] = (8 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    return video


def written(
    video: np.ndarray, format: str, codec: str, *, times=None, cover: bool = False, aspect: str = "1:1", **options: str
) -> bytes:
    """A file by FFmpeg; `times` in milliseconds, `aspect` of a pixel."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=format) as container:
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.height, picture.width, picture.pix_fmt = 64, 64, "rgb24"
            picture.disposition = Disposition.attached_pic
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = options
        stream.codec_context.sample_aspect_ratio = Fraction(aspect.replace(":", "/"))
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if cover:
            art = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
            container.mux(picture.encode(art))
        for number, frame in enumerate(video):
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                shown.pts, shown.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(shown))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def numbers(pixels: np.ndarray) -> list[int]:
    """Frame numbers by the gray level of the corner, upright."""
    height, width = pixels.shape[1:3]
    return np.rint(pixels[:, -height // 4, -width // 4].mean(axis=-1) / 8).astype(int).tolist()


def corners(frame: np.ndarray) -> list[str]:
    """Which color is top left, top right, bottom left, bottom right."""
    height, width = frame.shape[:2]
    named = {"A": TOP_LEFT, "B": TOP_RIGHT, "C": BOTTOM_LEFT}
    found = []
    for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):
        pixel = frame[y * height // 4, x * width // 4].astype(int)
        found.append(next((name for name, color in named.items() if np.abs(pixel - color).max() < 12), "D"))
    return found


def with_matrix(clip: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 whose track header has another display matrix (a, b, c, d)."""
    place = clip.index(b"tkhd") + 44
    a, b, c, d = matrix
    values = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return clip[:place] + values + clip[place + 36 :]


PLAIN = written(quadrants(), "mp4", "libx264", bf="0", crf="4")


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), "ABCD"),
        ((-1, 0, 0, 1), "BADC"),  # mirrored, as front cameras do
        ((1, 0, 0, -1), "CDAB"),
        ((-1, 0, 0, -1), "DCBA"),
        ((0, 1, -1, 0), "CADB"),  # a quarter turn clockwise
        ((0, -1, 1, 0), "BDAC"),
        ((0, 1, 1, 0), "ACBD"),
        ((0, -1, -1, 0), "DBCA"),
    ],
)
def test_the_display_matrix_turns_and_mirrors(matrix: tuple[int, int, int, int], expected: str) -> None:
    clip = with_matrix(PLAIN, matrix)
    frame = decode_window(clip, [3])[0]
    assert "".join(corners(frame)) == expected
    assert frame.shape[:2] == ((HEIGHT, WIDTH) if matrix[0] else (WIDTH, HEIGHT))
    assert (probe(clip).height, probe(clip).width) == frame.shape[:2]
    assert "".join(corners(decode_window(transcode(clip), [3])[0])) == expected


@pytest.mark.parametrize(("sar", "width"), [("2:1", 128), ("1:2", 32), ("4:3", 85), ("150:151", 64)])
def test_pixels_that_are_not_square(sar: str, width: int) -> None:
    clip = written(quadrants(4), "mp4", "libx264", crf="4", aspect=sar)
    frame = decode_window(clip, [0])[0]
    assert frame.shape == (HEIGHT, width, 3) and "".join(corners(frame)) == "ABCD"
    assert (probe(clip).height, probe(clip).width) == (HEIGHT, width)
    assert inspect(clip).width == width
    smaller = probe(transcode(clip, shorter_side=24))
    assert smaller.width / smaller.height == pytest.approx(width / HEIGHT, rel=0.1)


def without_showing(clip: bytes, hidden: int) -> bytes:
    """A VP8 webm one of whose frames is not shown, as alt-ref frames are."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip)) as source, av.open(buffer, mode="w", format="webm") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytes(packet)
            if number == hidden:
                data = bytes([data[0] & ~0x10]) + data[1:]
            made = av.Packet(data)
            made.pts, made.dts, made.time_base = packet.pts, packet.dts, packet.time_base
            made.is_keyframe, made.stream = packet.is_keyframe, stream
            target.mux(made)
    return buffer.getvalue()


VP8 = written(quadrants(), "webm", "libvpx", deadline="realtime", g="100", **{"b:v": "2M"})
STREAMS = {
    "B-frames in avi": (written(quadrants(), "avi", "libx264", bf="3", crf="4"), list(range(FRAMES))),
    "alt-ref": (without_showing(VP8, 7), [n for n in range(FRAMES) if n != 7]),
    "intra refresh, mp4": (
        written(quadrants(), "mp4", "libx264", crf="4", **{"x264-params": "intra-refresh=1:keyint=10:bframes=0"}),
        list(range(FRAMES)),
    ),
    "intra refresh, ts": (
        written(quadrants(), "mpegts", "libx264", crf="4", **{"x264-params": "intra-refresh=1:keyint=10:bframes=0"}),
        list(range(FRAMES)),
    ),
    "cover first": (written(quadrants(), "mp4", "libx264", crf="4", cover=True), list(range(FRAMES))),
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_frame_is_the_one_that_was_asked_for(name: str) -> None:
    clip, expected = STREAMS[name]
    for info in (probe(clip), inspect(clip)):
        assert (info.frames, info.height, info.width) == (len(expected), HEIGHT, WIDTH)
        assert info.frames_per_second == pytest.approx(24, rel=0.05)
    assert inspect(clip).faithful
    assert numbers(decode_window(clip, range(len(expected)))) == expected
    assert [numbers(decode_window(clip, [n]))[0] for n in range(len(expected))] == expected
    with pytest.raises(DecodeError):
        decode_window(clip, [len(expected)])
    assert numbers(decode_window(transcode(clip, keyframe_every=5), range(len(expected)))) == expected


def test_a_cover_is_no_clip() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        picture = container.add_stream("png", rate=1)
        picture.height, picture.width, picture.pix_fmt = 16, 16, "rgb24"
        picture.disposition = Disposition.attached_pic
        container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    with pytest.raises(DecodeError, match="has no video stream, only a cover picture"):
        probe(buffer.getvalue())


def test_damage_reaches_all_frames_predicted_from_it() -> None:
    """Each frame of the damaged group raises or is right; none is smeared. Other groups are served."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (HEIGHT * 3, WIDTH * 3, 3), np.uint8)
    video = np.stack([np.roll(base, (n, 2 * n), (0, 1)) for n in range(24)])
    clip = encode_video(video, 8, keyframe_every=12, full_color=True)
    right = decode_window(clip, range(24))
    with av.open(io.BytesIO(clip)) as container:
        fourth = [p for p in container.demux(video=0) if p.size][4]
        place = fourth.pos + fourth.size // 2
    broken = clip[:place] + bytes(byte ^ 0x5A for byte in clip[place : place + 12]) + clip[place + 12 :]
    refused = []
    for n in range(24):
        try:
            found = decode_window(broken, [n])[0]
        except DecodeError:
            refused.append(n)
        else:
            assert (found == right[n]).all(), f"frame {n} is served damaged"
    assert refused == list(range(4, 12))
    probe(broken)  # the first and the last frame are right
    with pytest.raises(DecodeError, match="corrupt"):
        inspect(broken)
    with pytest.raises(DecodeError, match="corrupt"):
        transcode(broken, shorter_side=24)


TIMES = [*range(0, 7500, 500), *(7500 + np.rint(np.arange(15) * 1000 / 60).astype(int)).tolist()]  # 2 a second, then 60


@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx")])
def test_variable_rates(format: str, codec: str) -> None:
    options = {"bf": "0", "crf": "4"} if codec == "libx264" else {"b:v": "2M", "deadline": "realtime"}
    clip = written(quadrants(), format, codec, times=TIMES, **options)
    for info in (probe(clip), inspect(clip)):
        assert not info.has_constant_rate
        np.testing.assert_allclose(info.times, np.array(TIMES) / 1000, atol=2e-3)
        assert info.frames_per_second == pytest.approx(29 / 7.733, rel=1e-3)
    kept = probe(transcode(clip, shorter_side=24))
    np.testing.assert_allclose(kept.times, np.array(TIMES) / 1000, atol=2e-3)
    even = transcode(written(quadrants(), format, codec, times=[n * 20 for n in range(30)],
                             **options), frames_per_second=10)  # fmt: skip
    assert probe(even).frames_per_second == pytest.approx(10)
    assert numbers(decode_window(even, range(6))) == [0, 5, 10, 15, 20, 25]


def test_frames_at_a_rate_are_those_that_are_shown() -> None:
    thirty = np.arange(30) / 30
    assert shown_at(thirty, 1 / 30, 8).tolist() == [0, 3, 7, 11, 15, 18, 22, 26]
    assert shown_at(np.arange(8) / 8, 1 / 8, 8).tolist() == list(range(8))
    # 23.976 a second in milliseconds, at half the rate.
    assert shown_at(np.rint(np.arange(20) * 1001 / 24) / 1000, 0.0417, 24000 / 2002).tolist() == list(range(0, 20, 2))
    # Held for a second, then eight a second: held in the new clip, too.
    held = np.array([0.0, 1.0, 1.125, 1.25, 1.375])
    assert shown_at(held, 0.125, 4).tolist() == [0, 0, 0, 0, 1, 3]
    with pytest.raises(SlowerThanAsked, match="has 8 frames a second, fewer than 24"):
        transcode(encode_video(quadrants(8), 8), frames_per_second=24)


@pytest.mark.parametrize(("width", "height"), [(WIDTH * 2, HEIGHT * 2), (44, 30), (46, 28)])
def test_colors_are_not_biased(width: int, height: int) -> None:
    """FFmpeg's fast conversion takes 1.1 levels of red and blue and 1.4 of green."""
    picture = np.random.default_rng(0).integers(0, 255, (9, 9, 3)).astype(np.float32)
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    clip = encode_video(np.stack([picture] * 3), 8, quality=1)
    decoded = decode_window(clip, [1])[0].astype(int)
    with av.open(io.BytesIO(clip)) as container:
        exact = list(container.decode(video=0))[1].to_ndarray(format="rgb24", interpolation=EXACT).astype(int)
    assert np.abs((decoded - exact).mean(axis=(0, 1))).max() < 0.2 and np.abs(decoded - exact).max() <= 3
    again = decode_window(transcode(clip, keyframe_every=1, quality=1), [1])[0].astype(int)
    assert np.abs((again - decoded).mean(axis=(0, 1))).max() < 0.7


def test_images_of_other_kinds() -> None:
    from PIL import Image

    def saved(image: Image.Image, format: str = "png", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    gray = decode_window(saved(Image.fromarray(ramp)), [0])[0]
    np.testing.assert_array_equal(gray[0, :, 1], np.arange(256))
    # What hides below full transparency is white, half of it half white.
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[..., 0], hidden[:2, :, 3], hidden[2:, :, 3] = 200, 0, 128
    for format in ("png", "webp"):
        shown = decode_window(saved(Image.fromarray(hidden), format, lossless=True), [0])[0]
        assert (shown[:2] == 255).all() and np.abs(shown[2:].astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert (decode_window(saved(palette, transparency=1), [0]) == 255).all()
    assert (decode_window(saved(palette), [0])[0, 0, 0] == [200, 0, 0]).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4] = 255
    clip = saved(Image.fromarray(picture), "jpeg", exif=exif, quality=95)
    assert decode_window(clip, [0])[0].shape == (8, 4, 3) and decode_window(clip, [0])[0, 0, 0, 0] > 200
    # A tag of a wrong type beside the orientation: once an error of the whole build.
    exif[0x011A] = 72
    block = exif.tobytes()
    broken = block.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x03").replace(b"\x1a\x01\x05\x00", b"\x1a\x01\x03\x00")
    clip = saved(Image.fromarray(picture), "jpeg", exif=broken, quality=95)
    assert decode_window(clip, [0])[0].shape == (8, 4, 3)
    assert encode_image(picture) and probe(clip).frames == 1
