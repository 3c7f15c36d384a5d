"""Building from LeRobot v3 data sets: episodes of several files, frames beside their rows, what is wrong by name."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jvgen.data.builders.build_loop import BuildError
from jvgen.data.builders.lerobot import build_lerobot
from jvgen.data.builders.robot_episodes import EpisodeOptions
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window, encode_image, encode_video

RATE, LENGTHS = 10, (7, 5, 9)
VIDEO = "observation.images.top"


def parquet(path: Path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def gray(episode: int, frame: int) -> int:
    return 20 + 60 * episode + 6 * frame


def dataset(folder: Path, *, cameras=(VIDEO,), images: bool = False, info: dict | None = None) -> Path:
    """Three episodes: two in the first files, one in the second."""
    features = {name: {"dtype": "image" if images else "video", "shape": [16, 24, 3]} for name in cameras}
    features |= {name: {"dtype": "float32", "shape": [2]} for name in ("action", "observation.state")}
    document = {
        "codebase_version": "v3.0", "fps": RATE,
        "features": features | {"next.reward": {"dtype": "float32", "shape": [1]}},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4", **(info or {}),
    }  # fmt: skip
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(document))
    episodes = []
    for file, numbers in enumerate(((0, 1), (2,))):
        rows, frames, start = [], [], 0
        for number in numbers:
            for frame in range(LENGTHS[number]):
                picture = np.full((16, 24, 3), gray(number, frame), np.uint8)
                frames.append(picture)
                row = {"episode_index": number, "frame_index": frame, "timestamp": frame / RATE,
                       "action": [float(number), float(frame)], "observation.state": [0.0, 1.0],
                       "next.reward": float(frame == LENGTHS[number] - 1)}  # fmt: skip
                if images:
                    row[cameras[0]] = {"bytes": encode_image(picture), "path": None}
                rows.append(row)
            episode = {"episode_index": number, "tasks": [f"task {number}"], "length": LENGTHS[number],
                       "data/chunk_index": 0, "data/file_index": file}  # fmt: skip
            for camera in cameras if not images else ():
                episode |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file,
                            f"videos/{camera}/from_timestamp": start / RATE,
                            f"videos/{camera}/to_timestamp": (start + LENGTHS[number]) / RATE}  # fmt: skip
            episodes.append(episode)
            start += LENGTHS[number]
        parquet(
            folder / f"data/chunk-000/file-{file:03d}.parquet", {key: [row[key] for row in rows] for key in rows[0]}
        )
        for camera in cameras if not images else ():
            path = folder / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_video(np.stack(frames), RATE, keyframe_every=4, quality=1))
    parquet(
        folder / "meta/episodes/chunk-000/file-000.parquet", {key: [e[key] for e in episodes] for key in episodes[0]}
    )
    return folder


def records_of(out: Path) -> list[Record]:
    source = open_source(out, "train")
    return [source.read(row) for row in range(len(source))]


@pytest.mark.parametrize("images", [False, True])
def test_episodes_have_their_frames_actions_rewards_and_tasks(tmp_path, jvgen, images):
    dataset(tmp_path / "in", images=images)
    done = jvgen("data", "build", "lerobot", tmp_path / "in", "--out", tmp_path / "out", "--validation-fraction", 0)
    assert done.status == 0, done.err
    records = records_of(tmp_path / "out")
    assert [(r.id, r.frames, r.captions, r.frames_per_second) for r in records] == [
        (f"episode_{n:06d}", LENGTHS[n], (f"task {n}",), RATE) for n in range(3)
    ]
    for number, record in enumerate(records):
        levels = decode_window(record.clips[0], range(record.frames))[:, 4, 4, 0].astype(int)
        np.testing.assert_allclose(levels, [gray(number, f) for f in range(LENGTHS[number])], atol=2)
        np.testing.assert_array_equal(record.actions, [[number, frame] for frame in range(LENGTHS[number])])
        np.testing.assert_array_equal(record.rewards, [0] * (LENGTHS[number] - 1) + [1])


def test_a_camera_is_chosen(tmp_path):
    dataset(tmp_path / "in", cameras=(VIDEO, "observation.images.wrist"))
    with pytest.raises(
        ValueError, match=r"has 2 cameras \(observation.images.top, observation.images.wrist\): select one"
    ):
        build_lerobot(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=r"camera = 'wirst': .* Did you mean wrist\?"):
        build_lerobot(tmp_path / "in", tmp_path / "out", EpisodeOptions(camera="wirst"))
    build_lerobot(tmp_path / "in", tmp_path / "out", EpisodeOptions(camera="wrist", actions=False), validation=0)
    assert [record.has_action for record in records_of(tmp_path / "out")] == [False] * 3


@pytest.mark.parametrize(("info", "message"), [
    ({"codebase_version": "v2.1"}, "codebase_version is v2.1; v3 is read. Convert it"),
    ({"fps": "10"}, "info.json: fps is '10'; expected a rate"),
    ({"features": ["action"]}, "info.json: features is "),
    ({"data_path": "data/{chunk}/x.parquet"}, "data_path = .* is no path with {chunk_index}"),
    ({"video_path": "../{video_key}/{chunk_index}-{file_index}.mp4"}, "video_path = .* leads out of the folder"),
])  # fmt: skip
def test_wrong_descriptions_are_named(tmp_path, info, message):
    with pytest.raises(ValueError, match=message):
        build_lerobot(dataset(tmp_path / "in", info=info), tmp_path / "out")


def test_wrong_episodes_are_named_and_the_others_kept(tmp_path):
    folder = dataset(tmp_path / "in")
    data, episodes = folder / "data/chunk-000/file-000.parquet", folder / "meta/episodes/chunk-000/file-000.parquet"
    table, listed = pyarrow.parquet.read_table(data), pyarrow.parquet.read_table(episodes)

    def reason(path: Path, original: pyarrow.Table, edit) -> str:
        rows = original.to_pydict()
        edit(rows)
        parquet(path, rows)
        out = tmp_path / "out"
        try:
            summary = build_lerobot(folder, out, validation=0, error_budget=0.7, workers=1, overwrite=True)
        except BuildError as error:
            return str(error)
        finally:
            parquet(path, original.to_pydict())
        [*kept] = [record.id for record in records_of(out)]
        assert len(kept) + len(summary.rejected) == 3
        return "\n".join(item.reason for item in summary.rejected)

    def drop_last(rows: dict) -> None:
        for values in rows.values():
            values.pop()

    def ragged(rows: dict) -> None:
        rows["action"][3] = [1.0]

    def not_finite(rows: dict) -> None:
        rows["action"][3] = [float("nan"), 0.0]

    def renamed(rows: dict) -> None:
        rows["actions"] = rows.pop("action")

    def texts(rows: dict) -> None:
        rows["action"] = ["up"] * len(rows["action"])

    def late(rows: dict) -> None:
        rows[f"videos/{VIDEO}/from_timestamp"][1] = 9.0

    def longer(rows: dict) -> None:
        rows["length"][2] = 11

    for path, original, edit, message in (
        (data, table, drop_last, "has 4 rows of the episode, which has 5 frames"),
        (data, table, ragged, "action changes its length within the episode"),
        (data, table, not_finite, "action are not all finite"),
        (data, table, renamed, "has no column 'action'. Did you mean actions?"),
        (data, table, texts, "action is not made of numbers but of str"),
        (episodes, listed, late, "file-000.mp4: ends at 1.20 s, before"),
        (episodes, listed, longer, "has 9 rows of the episode, which has 11 frames"),
    ):
        found = reason(path, original, edit)
        assert message in found, (message, found)
    (folder / f"videos/{VIDEO}/chunk-000/file-001.mp4").unlink()
    assert "file-001.mp4: no such file" in reason(data, table, lambda rows: None)
    data.write_bytes(b"PAR1")
    with pytest.raises(BuildError, match="cannot be read as Parquet"):
        build_lerobot(folder, tmp_path / "other", workers=1)
    parquet(episodes, {"episode": [0]})
    with pytest.raises(ValueError, match=r"has no column 'episode_index'. Did you mean episode\?"):
        build_lerobot(folder, tmp_path / "other")
