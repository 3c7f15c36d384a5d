"""Robot episodes from files: which frames, actions and rewards they become; what cannot be read; the OXE mix."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.builders.build_loop import BuildError
from jvgen.data.builders.episode_files import find_episodes
from jvgen.data.builders.robot_episodes import EpisodeOptions, build_robot_episodes, frames_and_actions, read_episode
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.stream.oxe_mix import MIX, sources, weights
from jvgen.data.video_files import DecodeError, decode_window, encode_image, encode_video

REAL = os.environ.get("JVGEN_REAL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="JVGEN_REAL_DATA names no folder of real data")
PLAIN = EpisodeOptions()


def pixels(frames: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """Slow gradients, which survive compression."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 90, side)[:, None, None] + np.linspace(0, 60, side)[:, None] + rng.uniform(0, 40, 3)
    return np.stack([ramp + 3 * t for t in range(frames)]).astype(np.uint8)


def stacked(frames: np.ndarray) -> np.ndarray:
    """Three frames on top of each other, the first repeated at the start, channels first."""
    padded = np.concatenate([frames[:1], frames[:1], frames])
    parts = [padded[i : i + len(frames)] for i in range(3)]
    return np.concatenate([part.transpose(0, 3, 1, 2) for part in parts], axis=1)


@pytest.fixture
def metaworld(tmp_path) -> Path:
    """Two tasks of two episodes: index 0 is the reset, index t is what led to frame t."""
    folder = tmp_path / "metaworld"
    for task in ("door-lock", "plate_slide"):
        (folder / task).mkdir(parents=True)
        for number in range(2):
            steps = np.arange(9, dtype=np.float32)
            np.savez(
                folder / task / f"e{number}.npz", observation=stacked(pixels(9, seed=number)),
                action=np.stack([steps, -steps], 1), reward=10 * steps[:, None], discount=np.ones((9, 1)),
            )  # fmt: skip
    return folder


def test_stacked_frames_are_unstacked_and_actions_move_to_the_frame_they_are_taken_at(metaworld):
    frames, actions, rewards = read_episode(metaworld / "door-lock" / "e1.npz", PLAIN)
    np.testing.assert_array_equal(frames, pixels(9, seed=1))
    assert actions[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0] and rewards.tolist() == [10 * a for a in actions[:, 0]]
    _, clipped, _ = read_episode(metaworld / "door-lock" / "e1.npz", EpisodeOptions(clip_actions=(-3.0, 2.0)))
    assert clipped[:, 0].tolist() == [1] + [2] * 7 + [0] and clipped[:, 1].min() == -3
    _, none, nothing = read_episode(metaworld / "door-lock" / "e1.npz", EpisodeOptions(actions=False))
    assert none.shape == (0, 0) and nothing.shape == (0,)


def test_other_layouts_record_actions_with_their_frame(tmp_path):
    frames = pixels(7)
    two = tmp_path / "bair.npz"
    np.savez(two, image=frames.astype(np.int64), aux1_image=frames[::-1].astype(np.int64), action=np.ones((7, 4)))
    found, actions, rewards = read_episode(two, PLAIN)
    np.testing.assert_array_equal(found, frames)
    assert actions.shape == (7, 4) and actions.dtype == np.float32 and rewards.shape == (0,)
    other, *_ = read_episode(two, EpisodeOptions(camera="aux1_image"))
    np.testing.assert_array_equal(other, frames[::-1])
    one = tmp_path / "robonet.npz"
    np.savez(one, front=frames, actions=np.ones((6, 5), np.float32))
    found, actions, _ = read_episode(one, PLAIN)
    np.testing.assert_array_equal(found, frames)
    assert actions.shape == (7, 5) and not actions[-1].any() and actions[:-1].all()
    three = tmp_path / "channels_last.npz"
    frames = np.random.default_rng(0).integers(0, 255, (7, 24, 16, 3), np.uint8)
    np.savez(three, observation=frames, action=np.arange(14, dtype=np.float32).reshape(7, 2))
    found, actions, _ = read_episode(three, PLAIN)
    np.testing.assert_array_equal(found, frames)
    assert actions[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": pixels(3), "b": pixels(3)}, "has 2 arrays of frames .* select one with camera, of a \\(3, 16"),
        ({"image": pixels(3) / 255}, "frames are float64: expected integers"),
        ({"image": pixels(3).astype(int) * 4}, "frames range from .* expected 0 to 255"),
        ({"image": pixels(3)[:0]}, "has no frames"),
        ({"image": pixels(3), "action": np.ones((5, 2))}, "has 5 actions for 3 frames"),
        ({"image": pixels(3), "action": np.full((3, 2), np.nan)}, "actions are not all finite"),
        ({"image": pixels(3), "reward": np.full(3, np.inf)}, "rewards are not all finite"),
        ({"action": np.ones((3, 2))}, "has 0 arrays of frames"),
    ],
)
def test_files_without_an_episode(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DecodeError, match=words):
        read_episode(tmp_path / "x.npz", PLAIN)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK not a zip file")
    with pytest.raises(DecodeError, match="cannot be read as npz"):
        read_episode(tmp_path / "x.npz", PLAIN)
    np.savez(tmp_path / "y.npz", image=pixels(2))
    with pytest.raises(DecodeError, match="has no frames 'side' .*: image"):
        read_episode(tmp_path / "y.npz", EpisodeOptions(camera="side"))
    np.savez(tmp_path / "z.npz", image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DecodeError, match="cannot be read as npz"):
        read_episode(tmp_path / "z.npz", PLAIN)


def test_a_data_set_holds_out_episodes_of_every_folder(metaworld, tmp_path, jvgen):
    done = jvgen("data", "build", "robot-episodes", metaworld, "--out", tmp_path / "data", "--validation-fraction",
                 "0.5", "--clip-actions=-4,4", "--workers", "1")  # fmt: skip
    assert done.status == 0, done.err
    held, kept = (open_source(tmp_path / "data", split) for split in ("validation", "train"))
    assert len(held) == len(kept) == 2
    assert {record.id.split("/")[0] for record in map(held.read, range(2))} == {"door-lock", "plate_slide"}
    record = held.read(0)
    assert record.captions[0] in ("door lock", "plate slide")
    assert (record.frames, record.height, record.width) == (9, 16, 16)
    assert record.actions.shape == (9, 2) and record.actions.max() == 4 and record.rewards.shape == (9,)
    seen = decode_window(record.clips[0], [0, 8])
    expected = pixels(9, seed=int(record.id[-5]))[[0, 8]]
    assert np.abs(seen.astype(int) - expected).mean() < 2


def test_mistakes_of_a_build(metaworld, tmp_path, jvgen):
    (metaworld / "door-lock" / "broken.npz").write_bytes(b"no")
    with pytest.raises(BuildError, match="1 of 5 files cannot be used(.|\n)*broken.npz"):
        build_robot_episodes(metaworld, tmp_path / "a", workers=1)
    summary = build_robot_episodes(metaworld, tmp_path / "b", error_budget=0.3, validation=0.0, workers=1)
    assert summary.records == 4 and len(summary.rejected) == 1
    with pytest.raises(ValueError, match="is not a folder"):
        build_robot_episodes(tmp_path / "nowhere", tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no .npz or .hdf5 files"):
        build_robot_episodes(tmp_path / "empty", tmp_path / "c")
    with pytest.raises(ValueError, match="the lower bound, then"):
        build_robot_episodes(metaworld, tmp_path / "c", EpisodeOptions(clip_actions=(1.0, -1.0)))
    done = jvgen("data", "build", "robot-episodes", metaworld, "--out", tmp_path / "c", "--clip-actions", "1")
    assert done.status == 2 and "expected LOW,HIGH" in done.err


# RLDS.


def as_serialized(frames: np.ndarray, start: float) -> bytes:
    """An episode in the bytes that TFDS's own serializer makes of it (its picture encoder needs TensorFlow)."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features, count = tfds.features, len(frames)
    picture, numbers = features.Image(encoding_format="png"), features.Tensor
    step = {
        "observation": {"image": picture, "natural_language_instruction": features.Text()},
        "action": {"gripper": numbers(shape=(1,), dtype=np.int32), "world": numbers(shape=(3,), dtype=np.float32)},
        "reward": features.Scalar(dtype=np.float32),
        "is_last": np.bool_,
    }  # fmt: skip
    described = features.FeaturesDict(
        {"steps": features.Dataset(step), "episode_metadata": {"file_path": features.Text()}}
    )
    steps = {
        "observation": {
            "image": [encode_image(frame) for frame in frames], "natural_language_instruction": [b"close it"] * count
        },
        "action": {
            "gripper": np.full((count, 1), 7, np.int32),
            "world": start + np.arange(3 * count, dtype=np.float32).reshape(count, 3),
        },
        "reward": np.arange(count, dtype=np.float32),
        "is_last": np.arange(count) == count - 1,
    }  # fmt: skip
    serializer = ExampleSerializer(described.get_serialized_info())
    return serializer.serialize_example(
        {"steps": steps, "episode_metadata": {"file_path": f"/a/sawyer_traj{start:.0f}.hdf5"}}
    )


def as_tfrecord(records: list[bytes]) -> bytes:
    return b"".join(with_checksum(struct.pack("<Q", len(one))) + with_checksum(one) for one in records)


def with_checksum(data: bytes) -> bytes:
    """As TFRecord does: masked CRC-32C, bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    register ^= 0xFFFFFFFF
    return data + struct.pack("<I", ((register >> 15 | register << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.fixture
def rlds(tmp_path) -> Path:
    """Two shards as TFDS writes them, one of either format."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path / "toy" / "0.1.0"
    folder.mkdir(parents=True)
    records = [as_serialized(pixels(5, seed=number), 100.0 * number) for number in range(3)]
    (folder / "toy-train.tfrecord-00000-of-00001").write_bytes(as_tfrecord(records[:2]))
    writer = ArrayRecordWriter(str(folder / "toy-test.array_record-00000-of-00001"), "group_size:1")
    writer.write(records[2])
    writer.close()
    (folder / "features.json").write_text("{}")
    return folder


def test_episodes_of_tfds_are_read_without_tensorflow(rlds, tmp_path):
    summary = build_robot_episodes(rlds, tmp_path / "data", validation=0.0, workers=1)
    assert summary.counts == {"train": {"dynamic": 3}}
    source = open_source(tmp_path / "data", "train")
    found = {record.id: record for record in map(source.read, range(3))}
    first = found["toy-train.tfrecord-00000-of-00001/000001/sawyer_traj100"]
    assert first.captions == ("close it",) and (first.frames, first.height) == (5, 16)
    # Parts of an action are put side by side in the order of their names.
    np.testing.assert_allclose(first.actions[2], [7, 106, 107, 108])
    assert first.rewards.tolist() == [0, 1, 2, 3, 4]
    last = found["toy-test.array_record-00000-of-00001/000000/sawyer_traj200"]
    seen = decode_window(last.clips[0], range(5))
    assert np.abs(seen.astype(int) - pixels(5, seed=2)).mean() < 2 and last.actions[0, 1] == 200


def test_corrupt_shards_are_reported(rlds, tmp_path):
    shard = rlds / "toy-train.tfrecord-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-300])
    (rlds / "toy-val.tfrecord-00000-of-00001").write_bytes(as_tfrecord([b"not an example"]))
    with pytest.raises(BuildError, match="2 of 4 files(.|\n)*not an example(.|\n)*truncated: the file ends within"):
        build_robot_episodes(rlds, tmp_path / "data", workers=1)
    shard.write_bytes(as_tfrecord([b""]))
    with pytest.raises(DecodeError, match="has no steps"):
        find_episodes(rlds)[1].read()


# hdf5.


def test_robonet_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    frames = pixels(6, side=32)
    with h5py.File(tmp_path / "video.hdf5", "w") as file:
        clip = file.create_dataset(
            "env/cam0_video/frames", data=np.frombuffer(encode_video(frames, 5, quality=1, full_color=True), np.uint8)
        )
        clip.attrs["image_format"] = "RGB"
        file["env/state"] = np.linspace(0, 1, 10).reshape(5, 2)
        file["policy/actions"] = np.ones((4, 4))
        file["env/low_bound"], file["env/high_bound"] = [[0.0, 0.0]], [[1.0, 1.0]]
        file.create_group("metadata").attrs["primitives"] = "autograsp"
    with h5py.File(tmp_path / "wide.hdf5", "w") as file:
        for number, frame in enumerate(frames):
            picture = file.create_dataset(
                f"env/cam1_video/frame{number}", data=np.frombuffer(encode_image(frame), np.uint8)
            )
            picture.attrs["image_format"] = "RGB"
        file["env/state"], file["policy/actions"] = np.zeros((6, 2)), np.arange(30.0).reshape(5, 6)
    build_robot_episodes(tmp_path, tmp_path / "out" / "data", EpisodeOptions(action_width=5), validation=0.0, workers=1)
    source = open_source(tmp_path / "out" / "data", "train")
    found = {record.id: record for record in map(source.read, range(2))}
    video, wide = found["video.hdf5"], found["wide.hdf5"]
    # As many frames as states; the gripper's bound by where it is next, the last action zero.
    assert video.frames == 5 and video.captions == ()
    assert video.actions.tolist() == [[1, 1, 1, 1, 0], *[[1, 1, 1, 1, 1]] * 3, [0] * 5]
    seen = decode_window(video.clips[0], [0, 4])
    assert np.abs(seen.astype(int) - frames[[0, 4]]).mean() < 3
    assert wide.actions[0].tolist() == [0, 1, 2, 3, 4]
    seen = decode_window(wide.clips[0], [5])
    assert np.abs(seen[0, ..., ::-1].astype(int) - frames[5]).mean() < 3


def test_many_episodes_in_one_hdf5_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        for number in (2, 10, 1):
            group = file.create_group(f"data/demo_{number}")
            group["obs/camera_image"], group["obs/depth"] = pixels(4, seed=number), np.zeros((4, 16, 16, 1))
            group["actions"], group["rewards"] = np.full((4, 2), number), np.arange(4.0)
    episodes = find_episodes(tmp_path)
    assert [episode.name for episode in episodes] == [f"demos.hdf5/demo_{number}" for number in (1, 2, 10)]
    build_robot_episodes(tmp_path, tmp_path / "out" / "data", EpisodeOptions(action_width=3), validation=0, workers=1)
    records = [open_source(tmp_path / "out" / "data", "train").read(row) for row in range(3)]
    assert sorted(record.actions[0].tolist() for record in records) == [[1, 1, 0], [2, 2, 0], [10, 10, 0]]
    assert records[0].rewards.tolist() == [0, 1, 2, 3] and records[0].captions == ()
    (tmp_path / "broken.h5").write_bytes(b"no hdf5")
    with pytest.raises(DecodeError, match="cannot be read as hdf5"):
        find_episodes(tmp_path)[0].read()
    with pytest.raises(ValueError, match="action_width = 0"):
        EpisodeOptions(action_width=0).validate()


def test_folders_of_numbered_images(tmp_path):
    for name in ("pushing/clip_2", "pushing/clip_10"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number, frame in enumerate(pixels(12)):
            (tmp_path / "in" / name / f"{number}.png").write_bytes(encode_image(frame))
    (tmp_path / "in" / "cover.png").write_bytes(b"no frame: it has no number")
    episodes = find_episodes(tmp_path / "in")
    assert [episode.name for episode in episodes] == ["pushing/clip_2", "pushing/clip_10"]
    build_robot_episodes(tmp_path / "in", tmp_path / "data", validation=0.0, workers=1)
    record = open_source(tmp_path / "data", "train").read(1)
    assert (record.frames, record.captions, record.actions.size) == (12, ("pushing",), 0)
    # 10 after 9, not after 1.
    assert np.abs(decode_window(record.clips[0], range(12)).astype(int) - pixels(12)).mean() < 2
    (tmp_path / "in" / "pushing" / "clip_2" / "7.png").write_bytes(encode_image(pixels(1, side=8)[0]))
    with pytest.raises(DecodeError, match="frames change size"):
        frames_and_actions(find_episodes(tmp_path / "in")[0].read().arrays, PLAIN)


# The mix.


def test_the_mix_is_the_published_one():
    assert len(MIX) == 38 and sum(entry.trajectories for entry in MIX) + 120_581 == 1_417_954
    shares = weights(something=True)
    assert sum(shares.values()) == pytest.approx(0.85)
    assert shares["bridge"] == pytest.approx(0.1275) and shares["kuka"] == pytest.approx(0.085)
    views = sum(share for name, share in shares.items() if "d3field" in name)
    assert views == pytest.approx(0.022, abs=5e-4) and shares["cmu_stretch"] == pytest.approx(0.0055, abs=5e-5)
    chosen = sources("data/oxe", something="data/something")
    assert len(chosen) == 39 and sum(source.weight for source in chosen) == pytest.approx(1.0)
    assert {source.path: source.frame_stride for source in chosen}["data/oxe/toto"] == 10
    assert sum(source.weight for source in sources("data/oxe")) == pytest.approx(1.0)
    assert [source.path for source in chosen if source.exclude == "robonet_test"] == ["data/oxe/robo_net"]


# Real files.


def window(folder: Path, frames: int, side: int) -> dict:
    bucket = BucketConfig(frames=frames, height=side, width=side, batch_size=1)
    source = SourceConfig(path=str(folder))
    config = DataConfig(sources=(source,), evaluation_sources=(source,), buckets=(bucket,), threads=1)
    loader = Loader(config, seed=0, preprocess=lambda example: {
        name: example[name] for name in ("video", "actions", "rewards")
    }, evaluation=True)  # fmt: skip
    with loader.batches(0, 1) as batches:
        return next(batches).arrays


@needs_real
def test_metaworld(tmp_path):
    summary = build_robot_episodes(
        Path(REAL) / "metaworld", tmp_path / "data", EpisodeOptions(clip_actions=(-1.0, 1.0)), validation=0.2
    )
    assert summary.counts == {"train": {"dynamic": 16}, "validation": {"dynamic": 4}}
    record = open_source(tmp_path / "data", "train").read(0)
    assert (record.frames, record.height, record.actions.shape) == (101, 64, (101, 4))
    assert 0.9 < np.abs(record.actions).max() <= 1 and record.rewards.max() > 5 and not record.rewards[-1]
    with np.load(Path(REAL) / "metaworld" / record.id) as file:
        original, action, reward = file["observation"], file["action"], file["reward"]
    seen = decode_window(record.clips[0], list(range(0, 101, 10)))
    assert np.abs(seen.astype(int) - original[::10, -3:].transpose(0, 2, 3, 1)).mean() < 2
    np.testing.assert_allclose(record.actions[:-1], np.clip(action[1:], -1, 1))
    np.testing.assert_allclose(record.rewards[:-1], reward[1:, 0])
    arrays = window(tmp_path / "data", 12, 64)
    assert arrays["video"].shape == (1, 12, 64, 64, 3) and arrays["actions"].shape == (1, 12, 4)


@needs_real
@pytest.mark.parametrize(
    ("name", "camera", "frames", "size", "width"),
    [("bair", "aux1_image", 30, (64, 64), 4), ("fractal", None, 22, (256, 320), 0)],
)
def test_bair_and_fractal(tmp_path, name, camera, frames, size, width):
    build_robot_episodes(Path(REAL) / name, tmp_path / "data", EpisodeOptions(camera=camera))
    record = open_source(tmp_path / "data", "train").read(0)
    assert (record.frames, (record.height, record.width), record.actions.shape[1]) == (frames, size, width)
    assert record.has_action == bool(width)
    arrays = window(tmp_path / "data", 16, 64)
    assert arrays["video"].shape == (1, 16, 64, 64, 3) and arrays["actions"].shape == (1, 16, width)
    assert arrays["video"].std() > 20
