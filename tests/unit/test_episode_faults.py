"""Recordings of robots with parts that do not fit: refused by name, or read with the right values."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.builders.build_loop import BuildError
from jvgen.data.builders.episode_files import find_episodes
from jvgen.data.builders.robot_episodes import EpisodeOptions, build_robot_episodes
from jvgen.data.builders.tf_records import tf_records
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import DecodeError, encode_image
from tests.unit.test_robot_episodes import as_tfrecord

STEPS = 6


def pixels(frames: int = STEPS, tone: int = 0) -> np.ndarray:
    return np.full((frames, 16, 16, 3), tone, np.uint8) + np.arange(frames, dtype=np.uint8)[:, None, None, None] * 9


def example(**changes) -> bytes:
    """A serialized RLDS episode; None leaves a feature out."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = {
        "steps/observation/image": [encode_image(frame) for frame in pixels()],
        "steps/action": np.arange(7.0 * STEPS).tolist(),
        "steps/reward": [0.0] * STEPS,
        "steps/is_first": [1] + [0] * (STEPS - 1),
        "steps/language_instruction": [b"pick up the can"] * STEPS,
        **{name.replace("__", "/"): value for name, value in changes.items()},
    }
    made = tf_example_pb2.Example()
    for name, values in features.items():
        if values is None:
            continue
        feature = made.features.feature[name]
        kind = "bytes_list" if not values or isinstance(values[0], bytes) else "float_list"
        kind = "int64_list" if values and isinstance(values[0], int) else kind
        getattr(feature, kind).value.extend(values)
        getattr(feature, kind).SetInParent()
    return made.SerializeToString()


def shard(folder: Path, *episodes: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "x-train.tfrecord-00000-of-00001"
    path.write_bytes(as_tfrecord(list(episodes)))
    return path


def built(folder: Path, out: Path, options: EpisodeOptions | None = None, budget: float = 0.0):
    summary = build_robot_episodes(folder, out, options, validation=0, workers=1, error_budget=budget)
    source = open_source(out, "train")
    return {record.id: record for record in map(source.read, range(len(source)))}, summary


def test_a_record_whose_length_begins_like_gzip_is_read(tmp_path: Path) -> None:
    """0x8b1f bytes, little-endian."""
    path = shard(tmp_path, bytes(0x8B1F), b"next")
    assert path.read_bytes().startswith(b"\x1f\x8b")
    assert [len(read()) for read in tf_records(path)] == [0x8B1F, 4]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:], "its checksum is wrong: the record is damaged"),
        (lambda b: bytes([b[0] ^ 4]) + b[1:], "the checksum of its length is wrong"),
        (lambda b: b[:5] + b"\x7f" + b[6:], "the checksum of its length is wrong"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:7], "truncated"),
        (lambda b: b"\x1f\x8b" + zlib.compress(b), "compressed with gzip"),
    ],
)
def test_damaged_tfrecords(tmp_path: Path, damage, words: str) -> None:
    path = shard(tmp_path / "in", example())
    path.write_bytes(damage(path.read_bytes()))
    [read] = tf_records(path)
    with pytest.raises(DecodeError, match=words):
        read()
    with pytest.raises(BuildError, match=f"x-train.tfrecord-00000-of-00001/000000: {words}"):
        built(tmp_path / "in", tmp_path / "out")


def test_tfrecords_without_checksums_are_read_on_request(tmp_path: Path) -> None:
    content = example()
    path = shard(tmp_path / "in")
    path.write_bytes(struct.pack("<Q", len(content)) + bytes(4) + content + bytes(4))
    with pytest.raises(BuildError, match="the checksum of its length is wrong"):
        built(tmp_path / "in", tmp_path / "out")
    found, _ = built(tmp_path / "in", tmp_path / "out", EpisodeOptions(checksums=False))
    assert [record.frames for record in found.values()] == [STEPS]
    path.write_bytes(b"\xff" * 8 + bytes(20))
    with pytest.raises(DecodeError, match="its length is 1844"):
        next(tf_records(path, checksums=False))()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps__action": [0.0] * 41}, "action has 41 numbers for 6 steps"),
        ({"steps__reward": [0.0] * 7}, "reward has 7 numbers for 6 steps"),
        ({"steps__observation__image": [b"", *(encode_image(f) for f in pixels(5))]}, "image is empty at step 0"),
        ({"steps__observation__image": [encode_image(f) for f in pixels(5)]}, "image has 5 for 6 steps"),
    ],
)
def test_features_that_do_not_fit_the_steps(tmp_path: Path, changes: dict, words: str) -> None:
    shard(tmp_path / "in", example(**changes), example())
    found, summary = built(tmp_path / "in", tmp_path / "out", budget=0.5)
    assert len(found) == 1 and words in summary.rejected[0].reason
    assert summary.rejected[0].name == "x-train.tfrecord-00000-of-00001/000000"


def test_rewards_in_some_episodes_are_told(tmp_path: Path) -> None:
    shard(tmp_path / "in", example(steps__reward=None), example())
    found, summary = built(tmp_path / "in", tmp_path / "out")
    assert sorted(record.rewards.size for record in found.values()) == [0, STEPS]
    assert [text for text in summary.warnings if text.startswith("rewards are in 1 of 2 records")]


@pytest.mark.parametrize(
    ("changes", "captions"),
    [
        ({}, ("pick up the can",)),
        ({"steps__empty": []}, ("pick up the can",)),
        ({"steps__language_instruction_2": [b"second"] * STEPS}, ("pick up the can", "second")),
        ({"steps__language_instruction": [b""] * STEPS, "steps__language_instruction_3": [b"third"] * STEPS},
         ("third",)),
        ({"steps__language_instruction": None, "episode_metadata__language_instruction": [b"of all"]}, ("of all",)),
        ({"steps__language_instruction": None,
          "steps__observation__instruction": [*b"push", 0, 0] * STEPS}, ("push",)),
    ],
)  # fmt: skip
def test_instructions_of_different_data_sets(tmp_path: Path, changes: dict, captions: tuple) -> None:
    shard(tmp_path / "in", example(**changes))
    [record] = built(tmp_path / "in", tmp_path / "out")[0].values()
    assert record.captions == captions and record.frames == STEPS and record.actions.shape == (STEPS, 7)


def test_aloha_files(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "episode_0.hdf5", "w") as file:
        file["observations/images/cam_high"] = pixels(tone=50)
        encoded = [encode_image(frame, format="jpeg") for frame in pixels()]
        padded = [np.frombuffer(one.ljust(max(map(len, encoded)), b"\0"), np.uint8) for one in encoded]
        file["observations/images/cam_low"] = np.stack(padded)
        file["observations/qpos"], file["action"] = np.zeros((STEPS, 14)), np.ones((STEPS, 14))
    with pytest.raises(BuildError, match="has 2 arrays of frames.*cam_high.*cam_low"):
        built(tmp_path / "in", tmp_path / "out")
    for camera in ("cam_high", "cam_low"):
        [record] = built(tmp_path / "in", tmp_path / camera, EpisodeOptions(camera=camera))[0].values()
        assert (record.frames, record.actions.shape) == (STEPS, (STEPS, 14))


def test_any_damage_of_an_archive_costs_its_episode_only(tmp_path: Path) -> None:
    """A tenth of random damages raised an error that ended the build: zlib.error, TokenError, NotImplementedError."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(30):
        np.savez_compressed(folder / f"e{number:02d}.npz", image=pixels(tone=number), action=np.zeros((STEPS, 4)))
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir())[1:]:
        content = bytearray(path.read_bytes())
        start = int(rng.integers(len(content)))
        content[start : start + 20] = rng.bytes(len(content[start : start + 20]))
        path.write_bytes(content)
    found, summary = built(folder, tmp_path / "out", budget=1.0)
    assert "e00.npz" in found and len(found) + len(summary.rejected) == 30 and len(summary.rejected) > 20
    assert all(item.name.endswith(".npz") and item.reason for item in summary.rejected)


def test_numbered_pictures(tmp_path: Path) -> None:
    task = tmp_path / "in" / "open it"
    task.mkdir(parents=True)
    for number, frame in enumerate(pixels()):
        for camera in ("left", "right"):
            (task / f"{camera}_{number:03d}.png").write_bytes(encode_image(frame))
    (tmp_path / "in" / "more").mkdir()
    np.savez(tmp_path / "in" / "more" / "e0.npz", image=pixels(), action=np.zeros((STEPS, 4)))
    (tmp_path / "in" / "more" / "preview_1.png").write_bytes(encode_image(pixels()[0]))
    assert [e.name for e in find_episodes(tmp_path / "in")] == ["more/e0.npz", "open it/left", "open it/right"]
    found, _ = built(tmp_path / "in", tmp_path / "out")
    assert {record.frames for record in found.values()} == {STEPS}
    (task / "left_003.png").unlink()
    _, summary = built(tmp_path / "in", tmp_path / "again", budget=0.5)
    [refused] = summary.rejected
    assert refused.name == "open it/left" and "no image between left_002.png and left_004.png" in refused.reason
