"""Records survive a round trip to disk, and inconsistent fields are refused."""

import numpy as np
import pytest

from jvgen.data.store.records import Record, decode, encode, features


def full_record(id: str = "clip/1") -> Record:
    rng = np.random.default_rng(len(id))
    return Record(
        id=id, kind="static", clips=(b"\0mp4\0\0", b"other\0"), captions=("a red ball", "ein Ball, größer – 球"),
        frames_per_second=29.97, frames=5, height=48, width=64, views=2,
        intrinsics=rng.normal(size=(10, 4)).astype(np.float32),
        extrinsics=rng.normal(size=(10, 3, 4)).astype(np.float32),
        actions=rng.normal(size=(5, 7)).astype(np.float32), rewards=rng.normal(size=5).astype(np.float32),
        latents=rng.normal(size=(2, 3, 6, 8, 8)).astype(np.float16),
    )  # fmt: skip


def bare_record(id: str = "picture") -> Record:
    return Record(id=id, kind="image", clips=(b"png",), height=8, width=9)


def assert_equal(a: Record, b: Record) -> None:
    for name in ("id", "kind", "clips", "captions", "frames", "height", "width", "views"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.frames_per_second == pytest.approx(b.frames_per_second, rel=1e-6)
    for name in ("intrinsics", "extrinsics", "actions", "rewards", "latents"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape, (name, x.shape, y.shape)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("record", [full_record(), bare_record()], ids=["full", "bare"])
def test_round_trip(record: Record) -> None:
    record.validate()
    assert_equal(decode(encode(record)), record)
    serialized = features().serialize_example(encode(record))
    assert_equal(decode(features().deserialize_example_np(serialized)), record)


def test_cameras_of_a_view() -> None:
    record = full_record()
    intrinsics, extrinsics = record.cameras(1)
    np.testing.assert_array_equal(intrinsics, record.intrinsics[5:])
    np.testing.assert_array_equal(extrinsics, record.extrinsics[5:])
    assert bare_record().cameras(0)[0].shape == (0, 4)
    assert record.has_camera and record.has_action and not bare_record().has_camera and not bare_record().has_action


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "film"}, "kind = 'film': one of image, static, dynamic"),
        ({"clips": (b"a",)}, "1 clips for views = 2"),
        ({"clips": (b"a", b"")}, "an encoded clip is empty"),
        ({"frames": 0}, "must be 1 or more"),
        ({"intrinsics": np.zeros((9, 4), np.float32)}, r"intrinsics \(9, 4\), not \(10, 4\)"),
        ({"extrinsics": np.zeros((0, 3, 4), np.float32)}, "beside intrinsics"),
        ({"actions": np.zeros((4, 7), np.float32)}, r"actions \(4, 7\) for 5 frames"),
        ({"actions": np.full((5, 7), np.nan, np.float32)}, "actions are not all finite"),
        ({"rewards": np.zeros(4, np.float32)}, "rewards"),
        ({"latents": np.zeros((1, 3, 6, 8, 8), np.float16)}, "latents"),
        ({"frames_per_second": float("nan")}, "frames_per_second"),
        ({"clips": (), "latents": np.zeros((0, 0, 0, 0, 0), np.float16)}, "neither clips nor latents"),
    ],
)
def test_inconsistent_fields(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full_record().replace(**changes).validate()
