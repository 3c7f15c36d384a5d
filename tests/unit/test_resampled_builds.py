"""Videos stored at another rate, as scenes, with the times of their frames and the columns of their table."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from jvgen.data.builders.folders import build_videos
from jvgen.data.builders.media import VideoOptions
from jvgen.data.cuts import find_cuts
from jvgen.data.video_files import decode_window, encode_video
from tests.unit.test_recorded_files import folder_of, records_of
from tests.unit.test_video_faults import TIMES, numbers, quadrants, written

SCENES = (7, 12, 5)


def film(seed: int = 0) -> np.ndarray:
    """Scenes of moving noise, whose lengths are `SCENES`; in each the colors are others."""
    rng = np.random.default_rng(seed)
    scenes = []
    for number, length in enumerate(SCENES):
        base = cv2.resize(rng.integers(0, 60, (5, 6, 3)).astype(np.float32), (64, 48)) + np.roll([190, 90, 0], number)
        scenes += [np.roll(base, shift, axis=1) for shift in range(length)]
    return np.stack(scenes).clip(0, 255).astype(np.uint8)


def test_cuts_are_found_and_motion_is_none() -> None:
    assert find_cuts(film()) == [7, 19]
    moving = np.stack([np.roll(film()[0], 3 * n, axis=1) for n in range(20)])
    assert find_cuts(moving) == [] and find_cuts(moving[:1]) == [] and find_cuts([]) == []
    rng = np.random.default_rng(0)
    assert find_cuts(rng.integers(0, 255, (12, 36, 64, 3), np.uint8)) == []  # every frame is another: no cut
    fade = (film()[:1] * np.linspace(1, 0.3, 30)[:, None, None, None]).astype(np.uint8)
    assert find_cuts(fade) == []


def test_a_record_per_scene(tmp_path: Path) -> None:
    files = {
        "film.mp4": encode_video(film(), 8, quality=4),
        "film.txt": "a film",
        "one.mp4": encode_video(film()[:7], 8),
    }
    folder = folder_of(tmp_path / "in", files)
    summary = build_videos(
        folder, tmp_path / "out", VideoOptions(scenes="cut", captions_optional=True, validation=0), workers=1
    )
    found = records_of(tmp_path / "out")
    assert {id: record.frames for id, record in found.items()} == {
        "film.mp4/0000": 7, "film.mp4/0001": 12, "film.mp4/0002": 5, "one.mp4": 7,
    }  # fmt: skip
    assert found["film.mp4/0001"].captions == ("a film",) and summary.jobs == 2
    shown = decode_window(found["film.mp4/0001"].clips[0], range(12)).astype(int)
    assert np.abs(shown - film()[7:19]).mean() < 6
    slower = build_videos(
        folder,
        tmp_path / "slow",
        VideoOptions(scenes="cut", frames_per_second=4, captions_optional=True, validation=0),
        workers=1,
    )
    assert slower.records == 4
    found = records_of(tmp_path / "slow")
    assert [record.frames for _, record in sorted(found.items())] == [3, 6, 2, 3]
    last = decode_window(found["film.mp4/0002"].clips[0], [1])[0].astype(int)
    assert np.abs(last - film()[21]).mean() < 8


def test_one_rate_for_a_folder_of_many(tmp_path: Path) -> None:
    steady = written(quadrants(), "mp4", "libx264", bf="0", crf="4", times=[n * 1000 // 24 for n in range(30)])
    varied = written(quadrants(), "mp4", "libx264", bf="0", crf="4", times=TIMES)
    slow = written(quadrants(5), "mp4", "libx264", bf="0", crf="4", times=[0, 500, 1000, 1500, 2000])
    folder = folder_of(tmp_path / "in", {"steady.mp4": steady, "varied.mp4": varied, "slow.mp4": slow})
    options = VideoOptions(captions_optional=True, validation=0)
    kept = build_videos(folder, tmp_path / "kept", options, workers=1)
    assert kept.notes == {"with a variable frame rate": 1} and "with a variable frame rate: 1" in str(kept)
    found = records_of(tmp_path / "kept")
    np.testing.assert_allclose(found["varied.mp4"].frame_times, np.array(TIMES) / 1000, atol=2e-3)
    assert not found["steady.mp4"].frame_times.size and found["varied.mp4"].clips == (varied,)
    even = build_videos(folder, tmp_path / "even", dataclasses.replace(options, frames_per_second=8), workers=1)
    [refused] = even.rejected
    assert (refused.name, refused.corrupt) == ("slow.mp4", False)
    assert "has 2 frames a second, fewer than 8" in refused.reason
    found = records_of(tmp_path / "even")
    assert {record.frames_per_second for record in found.values()} == {8.0}
    assert numbers(decode_window(found["steady.mp4"].clips[0], range(10))) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    # At 8 a second: half a second each of the first frames, then every 7th or 8th.
    varied_at_8 = numbers(decode_window(found["varied.mp4"].clips[0], range(found["varied.mp4"].frames)))
    assert varied_at_8[:8] == [0, 0, 0, 0, 1, 1, 1, 1] and varied_at_8[56:62] == [14, 14, 14, 14, 15, 22]


def test_columns_of_the_table_are_columns_of_the_data_set(tmp_path: Path) -> None:
    clip = encode_video(quadrants(3), 8)
    table = 'file,caption,Aesthetic Score,license,height\na.mp4,x,5.5,cc0,1080\nb.mp4,y,,"cc-by, 4.0",720\n'
    folder = folder_of(tmp_path / "in", {"a.mp4": clip, "b.mp4": clip, "captions.csv": table})
    build_videos(folder, tmp_path / "out", VideoOptions(validation=0), workers=1)
    found = records_of(tmp_path / "out")
    expected = {"aesthetic_score": 5.5, "license": "cc0", "table_height": 1080.0}
    assert dict(found["a.mp4"].columns) == expected
    assert found["b.mp4"].columns["license"] == "cc-by, 4.0"


def test_bad_options(tmp_path: Path, jvgen) -> None:
    folder = folder_of(tmp_path / "in", {"a.mp4": encode_video(quadrants(3), 8)})
    for options, words in (({"scenes": "cuts"}, "scenes = 'cuts'"), ({"frames_per_second": 0}, "must be positive")):
        with pytest.raises(ValueError, match=words):
            build_videos(folder, tmp_path / "out", VideoOptions(captions_optional=True, **options))
    done = jvgen("data", "build", "videos", folder, "--out", tmp_path / "out", "--fps", "0")
    assert done.status == 2 and "--fps" in done.err
