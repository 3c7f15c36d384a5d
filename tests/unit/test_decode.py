"""Windows decoded from a clip equal the same frames of the whole clip; corrupt clips raise DecodeError."""

import io
import os
import platform
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jvgen.data.transcoding import transcode
from jvgen.data.video_files import DecodeError, decode_window, encode_image, encode_video, probe
from jvgen.data.video_pixels import EXACT

FRAMES, HEIGHT, WIDTH = 37, 48, 64


def numbered(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frame n shows n as a 6-bit code of bright and dark blocks, over a moving gradient."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for n in range(frames):
        video[n, ..., 1] = (np.arange(width) * 2 + 3 * n) % 64
        for bit in range(6):
            video[n, : height // 2, bit * 10 : bit * 10 + 10] = 220 if n >> bit & 1 else 20
    return video


def number_of(frame: np.ndarray) -> int:
    return sum(int(frame[4:20, bit * 10 + 3 : bit * 10 + 7].mean() > 120) << bit for bit in range(6))


def container_bytes(video: np.ndarray, format: str, codec: str, rotation: int = 0, **options: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=format) as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = options
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


CLIPS = {
    "mp4": encode_video(numbered(), 12, keyframe_every=8),
    "mp4, one keyframe": encode_video(numbered(), 12, keyframe_every=250),
    "mp4, open groups": container_bytes(
        numbered(), "mp4", "libx264", g="9", bf="3", **{"x264-params": "open-gop=1:b-pyramid=2"}
    ),
    "webm": container_bytes(numbered(), "webm", "libvpx-vp9", g="10", deadline="realtime", **{"cpu-used": "8"}),
    "mkv": container_bytes(numbered(), "matroska", "libx264", g="10", bf="2"),
    "avi without times": container_bytes(numbered(), "avi", "mpeg4", g="10", qscale="3"),
    "raw h264": container_bytes(numbered(), "h264", "libx264", g="10", bf="2"),
}
WHOLE = {name: decode_window(clip, range(FRAMES)) for name, clip in CLIPS.items()}


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_numbered_in_order(name: str) -> None:
    assert [number_of(frame) for frame in WHOLE[name]] == list(range(FRAMES))


@pytest.mark.parametrize("name", CLIPS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(start=st.integers(0, FRAMES - 1), stride=st.integers(1, 9), count=st.integers(1, 6))
def test_a_window_equals_the_same_frames_of_the_whole_clip(name: str, start: int, stride: int, count: int) -> None:
    frames = [n for n in range(start, start + stride * count, stride) if n < FRAMES]
    np.testing.assert_array_equal(decode_window(CLIPS[name], frames), WHOLE[name][frames])


def test_frames_come_in_the_requested_order_and_may_repeat() -> None:
    frames = [9, 3, 3, 20, 0]
    np.testing.assert_array_equal(decode_window(CLIPS["mp4"], frames), WHOLE["mp4"][frames])


def test_decoding_starts_at_the_keyframe_and_stops_after_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """29 frames of 37 must never reach the decoder when frames 8..11 of an 8-frame group are requested."""
    from jvgen.data import video_files

    fed = []
    original = video_files.frames_of
    monkeypatch.setattr(
        video_files, "frames_of", lambda stream, packets: original(stream, (fed.append(p) or p for p in packets))
    )
    decode_window(CLIPS["mp4"], [8, 9, 10, 11])
    assert 4 <= len(fed) <= 8
    fed.clear()
    decode_window(CLIPS["mp4, one keyframe"], [5])
    assert len(fed) <= 12


@pytest.mark.parametrize("name", CLIPS)
def test_probe_counts_without_decoding(name: str) -> None:
    info = probe(CLIPS[name])
    assert (info.frames, info.height, info.width) == (FRAMES, HEIGHT, WIDTH)
    if name != "raw h264":
        assert info.frames_per_second == pytest.approx(12, rel=0.01)


def test_encoding_is_deterministic_and_close() -> None:
    video = numbered(height=36, width=64)
    assert encode_video(video, 8) == encode_video(video, 8)
    decoded = decode_window(encode_video(video, 8, quality=8, full_color=True), range(FRAMES))
    assert np.abs(decoded.astype(int) - video).mean() < 2.5


@pytest.mark.parametrize(("height", "width"), [(47, 63), (48, 63), (33, 62), (16, 1)])
def test_odd_sizes(height: int, width: int) -> None:
    clip = encode_video(np.full((3, height, width, 3), 90, np.uint8), 8)
    assert decode_window(clip, [2]).shape == (1, height, width, 3)
    assert (probe(clip).height, probe(clip).width) == (height, width)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotated_clips_are_decoded_upright(angle: int) -> None:
    # Two encodes are compared: only without AVX-512 does x264 give the same bytes each time.
    same_bytes = {"x264-params": "asm=SSE4.2"} if platform.machine() in ("x86_64", "AMD64") else {}
    clip = container_bytes(numbered(5), "mp4", "libx264", rotation=angle, bf="0", **same_bytes)
    plain = decode_window(container_bytes(numbered(5), "mp4", "libx264", bf="0", **same_bytes), [3])[0]
    turned = decode_window(clip, [3])[0]
    np.testing.assert_array_equal(turned, np.rot90(plain, angle // 90 % 4))
    assert probe(clip).height == turned.shape[0]


def test_transcoding_downscales_rotates_and_sets_keyframes() -> None:
    wide = transcode(CLIPS["mp4, open groups"], shorter_side=24, keyframe_every=5)
    info = probe(wide)
    assert (info.frames, info.height, info.width, info.keyframes) == (FRAMES, 24, 32, 8)
    assert info.frames_per_second == pytest.approx(12)
    same = transcode(CLIPS["webm"], shorter_side=480, quality=4)
    assert (probe(same).height, probe(same).width) == (HEIGHT, WIDTH)
    assert [number_of(frame) for frame in decode_window(same, range(FRAMES))] == list(range(FRAMES))
    upright = transcode(container_bytes(numbered(5), "mp4", "libx264", rotation=90), keyframe_every=2)
    assert (probe(upright).height, probe(upright).width) == (WIDTH, HEIGHT)
    with pytest.raises(DecodeError, match="empty"):
        transcode(b"")


def test_images() -> None:
    image = numbered(1)[0]
    np.testing.assert_array_equal(decode_window(encode_image(image), [0, 0]), np.stack([image, image]))
    assert np.abs(decode_window(encode_image(image, format="jpeg"), [0])[0].astype(int) - image).mean() < 6
    assert probe(encode_image(image)).frames == 1
    with pytest.raises(DecodeError, match="frame 1 was requested.*image"):
        decode_window(encode_image(image), [1])
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated a quarter turn clockwise
    Image.fromarray(image).save(buffer, "jpeg", exif=exif)
    assert decode_window(buffer.getvalue(), [0]).shape == (1, WIDTH, HEIGHT, 3)


def truncated(clip: bytes, share: float) -> bytes:
    return clip[: int(len(clip) * share)]


FASTSTART = container_bytes(
    np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), np.uint8), "mp4", "libx264", movflags="faststart"
)
CORRUPT = {
    "empty": b"",
    "text": b"file,caption\na.mp4,a cat\n",
    "zeros": bytes(5000),
    "header lost": truncated(CLIPS["mp4"], 0.5),
    "end lost": truncated(FASTSTART, 0.6),
    "png cut": truncated(encode_image(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)), 0.5),
    "jpeg cut": truncated(
        encode_image(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8), format="jpeg"), 0.5
    ),
    "sound only": b"RIFF"
    + (36 + 2000).to_bytes(4, "little")
    + b"WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data"
    + (2000).to_bytes(4, "little")
    + bytes(2000),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files_are_decode_errors(name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        probe(CORRUPT[name])
    assert len(str(caught.value)) > 10
    with pytest.raises(DecodeError):
        decode_window(CORRUPT[name], [0, 23])


def test_corrupt_bytes_either_decode_or_raise_a_decode_error() -> None:
    """Fuzz: flipped and zeroed stretches never raise anything else, never crash, never hang."""
    rng = np.random.default_rng(0)
    for name in ("mp4", "webm", "raw h264"):
        for _ in range(12):
            clip = bytearray(CLIPS[name])
            start = int(rng.integers(0, len(clip)))
            length = int(rng.integers(1, 400))
            clip[start : start + length] = rng.bytes(len(clip[start : start + length]))
            try:
                assert decode_window(bytes(clip), [0, 30]).shape[0] == 2
            except DecodeError:
                pass


def test_missing_frames() -> None:
    with pytest.raises(DecodeError, match=f"frame {FRAMES} was requested, but it has {FRAMES} frames"):
        decode_window(CLIPS["mp4"], [0, FRAMES])
    with pytest.raises(DecodeError, match="numbered from 0"):
        decode_window(CLIPS["mp4"], [-1])
    with pytest.raises(DecodeError, match="no frames"):
        decode_window(CLIPS["mp4"], [])


def test_threads_are_independent() -> None:
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(8):
            name = list(CLIPS)[int(rng.integers(4))]
            frames = sorted(int(n) for n in rng.choice(FRAMES, 4, replace=False))
            if not np.array_equal(decode_window(CLIPS[name], frames), WHOLE[name][frames]):
                wrong.append((name, frames))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_encode_names_what_it_expects(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_video(bad, 8)


def test_real_clips() -> None:
    folder = os.environ.get("JVGEN_REAL_DATA")
    if not folder:
        pytest.skip("JVGEN_REAL_DATA does not name a folder with video/*.mp4")
    expected = {"19216241-hd_1280_720_30fps.mp4": (349, 720, 1280, 30), "cogvideo_1.mp4": (49, 480, 720, 8)}
    for path in sorted(Path(folder, "video").glob("*.mp4")):
        clip = path.read_bytes()
        info = probe(clip)
        if path.name in expected:
            assert (info.frames, info.height, info.width, info.frames_per_second) == expected[path.name]
        with av.open(str(path)) as container:
            all_frames = {
                n: f.to_ndarray(format="rgb24", interpolation=EXACT).astype(int)
                for n, f in enumerate(container.decode(video=0))
                if n % 24 < 2 or n == info.frames - 1
            }
        for frames in ([0, 1], [24, 25], [0, 24, 48], [info.frames - 1]):
            # FFmpeg's own conversion rounds at other places.
            expected_frames = np.stack([all_frames[n] for n in frames])
            np.testing.assert_allclose(decode_window(clip, frames).astype(int), expected_frames, atol=3)
