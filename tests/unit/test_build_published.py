"""Building data sets in the layouts of RealEstate10K and WebVid."""

import numpy as np
import pytest

from jvgen.data.builders.realestate10k import build_realestate10k
from jvgen.data.builders.webvid import build_webvid
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window, encode_image, encode_video
from jvgen.geometry import paths
from jvgen.geometry.camera_file import CameraTrack, write_cameras

FRAMES = 6


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Frames of distinct gray levels."""
    return np.broadcast_to((20 + 12 * np.arange(18, dtype=np.uint8))[:, None, None, None], (18, 16, 24, 3)).copy()


@pytest.fixture
def cameras(tmp_path):
    """Camera files of three clips, of videos k0, k1 and k2, and of a missing one."""
    folder = tmp_path / "cameras"
    folder.mkdir()
    for number, name in enumerate(("aa", "bb", "cc", "dd")):
        track = CameraTrack(
            source=f"https://www.youtube.com/watch?v=k{number}",
            timestamps=1_000_000 + 200_000 * np.arange(FRAMES),
            intrinsics=np.tile([0.5, 0.75, 0.5, 0.5], (FRAMES, 1)),
            extrinsics=paths.named_paths("circle", 4, FRAMES)[number],
        )
        write_cameras(folder / f"{name}.txt", track)
    return folder


@pytest.fixture
def media(tmp_path, frames):
    folder = tmp_path / "media"
    (folder / "cc").mkdir(parents=True)
    (folder / "aa.mp4").write_bytes(encode_video(frames[:FRAMES], 5, quality=1))
    (folder / "k1.mp4").write_bytes(encode_video(frames, 5, quality=1))  # 3.6 s; the clip starts at 1 s
    for number in range(FRAMES):
        (folder / "cc" / f"{1_000_000 + 200_000 * number}.png").write_bytes(encode_image(frames[2 * number]))
    return folder


def test_all_three_layouts_of_realestate10k(cameras, media, tmp_path, frames):
    captions = tmp_path / "captions.csv"
    captions.write_text("file,caption\naa,a kitchen\nbb.txt,a hall\n")
    summary = build_realestate10k(cameras, media, tmp_path / "out", captions=captions, validation=0.0, workers=1)
    assert summary.counts == {"train": {"static": 3}}
    assert [(item.name, item.corrupt) for item in summary.rejected] == [("dd", True)]
    assert "has neither a video nor frames; accepted, for a camera file ID.txt" in summary.rejected[0].reason
    source = open_source(tmp_path / "out", "train")
    records = {record.id: record for record in (source.read(row) for row in range(3))}
    for name, shown in (("aa", frames[:6]), ("bb", frames[5:11]), ("cc", frames[0:12:2])):
        record = records[name]
        assert (record.kind, record.frames, record.has_camera) == ("static", FRAMES, True)
        assert record.frames_per_second == pytest.approx(5.0)
        gray = decode_window(record.clips[0], range(FRAMES))[:, 4, 4, 0].astype(int)
        np.testing.assert_allclose(gray, shown[:, 0, 0, 0], atol=3)
    expected = paths.named_paths("circle", 4, FRAMES)[1]
    np.testing.assert_allclose(records["bb"].extrinsics, expected, atol=1e-6)
    assert (records["aa"].captions, records["cc"].captions) == (("a kitchen",), ())


def test_no_video_has_clips_in_both_splits(tmp_path, frames):
    (tmp_path / "cameras").mkdir()
    (tmp_path / "media").mkdir()
    for number in range(12):
        track = CameraTrack(
            source=f"https://www.youtube.com/watch?v=k{number % 4}",
            timestamps=100_000 * number + 200_000 * np.arange(FRAMES),
            intrinsics=np.tile([0.5, 0.75, 0.5, 0.5], (FRAMES, 1)),
            extrinsics=paths.named_paths("circle", 4, FRAMES)[0],
        )
        write_cameras(tmp_path / "cameras" / f"clip{number}.txt", track)
        (tmp_path / "media" / f"k{number % 4}.mp4").write_bytes(encode_video(frames, 5))
    build_realestate10k(tmp_path / "cameras", tmp_path / "media", tmp_path / "out", validation=0.3, workers=1)
    ids = {split: open_source(tmp_path / "out", split).index.id.tolist() for split in ("train", "validation")}
    train, validation = ({int(id.removeprefix("clip")) % 4 for id in ids[split]} for split in ids)
    assert len(train) == 3 and len(validation) == 1 and not train & validation


def test_the_reasons_of_rejected_clips_are_listed(cameras, media, tmp_path, frames):
    (media / "aa.mp4").write_bytes(encode_video(frames[:4], 5))
    (media / "k1.mp4").write_bytes(encode_video(frames[:8], 5))
    (media / "cc" / "1200000.png").unlink()
    with pytest.raises(ValueError) as caught:
        build_realestate10k(cameras, media, tmp_path / "out", workers=1)
    for message in (
        "aa.mp4 has 4 frames for 6 cameras",
        "k1.mp4 ends at 1.60 s, before the last camera at 2.00 s",
        "has no image for timestamp 1200000",
    ):
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="contains no camera files"):
        build_realestate10k(media, media, tmp_path / "out")


def test_a_clip_that_is_damaged_in_its_middle_is_refused(cameras, media, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (FRAMES, 32, 48, 3), np.uint8)
    clip = bytearray(encode_video(noise, 5, keyframe_every=2))
    place = clip.index(b"mdat") + int(0.4 * (len(clip) - clip.index(b"mdat")))
    clip[place : place + 400] = bytes(400)
    (media / "aa.mp4").write_bytes(clip)
    summary = build_realestate10k(cameras, media, tmp_path / "out", validation=0.0, workers=1)
    assert {item.name: item.corrupt for item in summary.rejected} == {"aa": True, "dd": True}
    assert summary.records == 2


def test_webvid(tmp_path, frames, jvgen):
    videos = tmp_path / "videos" / "page_1"
    videos.mkdir(parents=True)
    (videos / "17.mp4").write_bytes(encode_video(frames[:5], 5))
    table = tmp_path / "results.csv"
    table.write_text(
        "videoid,contentUrl,duration,page_dir,name\n17,http://x,PT1S,page_1,a dog runs\n18,http://y,,p,none\n"
    )
    done = jvgen("data", "build", "webvid", table, "--videos", tmp_path / "videos", "--out", tmp_path / "out",
                 "--validation-fraction", 0)  # fmt: skip
    assert done.status == 0, done.err
    record = open_source(tmp_path / "out", "train").read(0)
    assert (record.id, record.kind, record.captions, record.frames) == ("17", "dynamic", ("a dog runs",), 5)
    table.write_text("videoid,name\n99,gone\n")
    with pytest.raises(ValueError, match="contains none of the 1 videos of .*: expected VIDEOID.mp4, such as 99.mp4"):
        build_webvid(table, videos, tmp_path / "out")
    table.write_text("id,name\n99,gone\n")
    with pytest.raises(ValueError, match=r"its columns are \['id', 'name'\]; it needs videoid and name"):
        build_webvid(table, videos, tmp_path / "out")


def test_realestate10k_from_the_command_line(cameras, media, tmp_path, jvgen):
    done = jvgen("data", "build", "realestate10k", cameras, "--media", media, "--out", tmp_path / "out",
                 "--validation-fraction", 0, "--min-frames", 6, "--shorter-side", 8)  # fmt: skip
    assert done.status == 0, done.err
    assert "3 static" in done.out and "rejected: 1" in done.out
    record = open_source(tmp_path / "out", "train").read(0)
    assert (record.height, record.width) == (8, 12)
