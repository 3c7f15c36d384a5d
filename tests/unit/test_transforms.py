"""Transforms: cameras follow the pixels; actions, rewards and latents follow the frames."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvgen.data.store.records import Record
from jvgen.data.stream import transforms
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.video_files import DecodeError, encode_image


def spec(**changes) -> ClipSpec:
    fields = {"start": 0, "stride": 1, "views": (0,), "crop_y": 0.0, "crop_x": 0.0, "flip": False, "caption": -1}
    return ClipSpec(**{**fields, **changes})


def bucket(**changes) -> BucketConfig:
    return BucketConfig(**{"frames": 3, "height": 8, "width": 8, "batch_size": 1, **changes})


@pytest.fixture
def stored(monkeypatch):
    """Records whose "encoded" clips are raw pixels, so that exact values can be followed."""
    pixels = {}

    def decode_window(clip, frames):
        return pixels[clip][list(frames)]

    monkeypatch.setattr(transforms, "decode_window", decode_window)

    def store(video: np.ndarray) -> bytes:
        name = f"clip{len(pixels)}".encode()
        pixels[name] = video
        return name

    return store


def numbered(frames=10, height=8, width=8, offset=0) -> np.ndarray:
    video = np.arange(frames, dtype=np.uint8)[:, None, None, None] + np.zeros((1, height, width, 3), np.uint8)
    return video + np.uint8(offset)


def test_the_clip_has_the_frames_of_the_spec(stored):
    record = Record(
        id="a", kind="dynamic", clips=(stored(numbered()),), captions=("one", "two"), frames=10, height=8, width=8,
        frames_per_second=24,
    )  # fmt: skip
    example = transforms.load_example(record, spec(start=2, stride=3, caption=1), bucket())
    assert example["video"].shape == (3, 8, 8, 3) and example["video"].dtype == np.uint8
    assert example["video"][:, 0, 0, 0].tolist() == [2, 5, 8]
    assert example["caption"] == "two" and example["frames_per_second"] == 8 and example["kind"] == 2
    assert example["frames_per_second"].dtype == np.float32 and example["kind"].dtype == np.int32
    assert not example["has_camera"] and not example["has_action"] and "latents" not in example
    assert example["intrinsics"].shape == (3, 4) and example["extrinsics"].shape == (3, 3, 4)
    assert example["actions"].shape == (3, 0) and example["rewards"].tolist() == [0, 0, 0]


def test_views_get_an_axis_only_when_the_bucket_has_several(stored):
    clips = tuple(stored(numbered(offset=50 * view)) for view in range(3))
    cameras = np.arange(3 * 10 * 4, dtype=np.float32).reshape(30, 4)
    poses = np.arange(3 * 10 * 12, dtype=np.float32).reshape(30, 3, 4)
    record = Record(
        id="a", kind="static", clips=clips, frames=10, height=8, width=8, views=3, intrinsics=cameras, extrinsics=poses
    )
    example = transforms.load_example(record, spec(views=(2, 0), start=4), bucket(views=2))
    assert example["video"].shape == (2, 3, 8, 8, 3)
    assert example["video"][:, 0, 0, 0, 0].tolist() == [104, 4]
    assert np.array_equal(example["intrinsics"], cameras.reshape(3, 10, 4)[[2, 0], 4:7])
    assert np.array_equal(example["extrinsics"], poses.reshape(3, 10, 3, 4)[[2, 0], 4:7])
    assert example["has_camera"]
    alone = transforms.load_example(record, spec(views=(1,)), bucket())
    assert alone["video"].shape == (3, 8, 8, 3) and alone["video"][0, 0, 0, 0] == 50


SIZES = st.tuples(st.integers(8, 40), st.integers(8, 40))


@settings(max_examples=150, deadline=None)
@given(
    source=SIZES,
    size=SIZES,
    crop=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    flip=st.booleans(),
    resize=st.sampled_from(["crop", "center_crop", "squash"]),
)
def test_cameras_follow_the_pixels(source, size, crop, flip, resize):
    """A linear ramp carries the coordinates of every pixel: the point a camera sees there must be the same before and
    after."""
    height, width = source
    ys, xs = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    ramp = np.stack([xs * 250, ys * 250, 0 * xs], -1)
    drawn = spec(crop_y=crop[0], crop_x=crop[1], flip=flip)
    fitted = transforms.fit(np.round(ramp)[None].astype(np.uint8), drawn, size, resize)[0]
    assert fitted.shape == (*size, 3) and fitted.flags.c_contiguous

    before = np.array([[1.1, 0.9, 0.48, 0.55]], np.float32)
    after = transforms.fit_intrinsics(before, drawn, source, size, resize)[0].astype(np.float64)
    # The viewing direction of each new pixel by the new camera, sent through the old camera, names the old pixel.
    v, u = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1], indexing="ij")
    direction_x, direction_y = (u - after[2]) / after[0], (v - after[3]) / after[1]
    old_x, old_y = direction_x * before[0, 0] + before[0, 2], direction_y * before[0, 1] + before[0, 3]
    # Interpolation cannot follow the ramp within a pixel of the edge, and rounds to integers.
    inside = (old_x > 1.5 / width) & (old_x < 1 - 1.5 / width) & (old_y > 1.5 / height) & (old_y < 1 - 1.5 / height)
    step = 250 / min(height, width)
    tolerance = 1.5 + 0.1 * step
    assert np.all(np.abs(fitted[..., 0] - old_x * 250)[inside] <= tolerance)
    assert np.all(np.abs(fitted[..., 1] - old_y * 250)[inside] <= tolerance)


def test_crop_keeps_the_aspect_ratio_and_reaches_both_ends():
    frame = np.zeros((1, 10, 40, 3), np.uint8)
    frame[0, :, :, 0] = 6 * np.arange(40)
    left = transforms.fit(frame, spec(), (10, 10), "crop")
    right = transforms.fit(frame, spec(crop_x=0.9999), (10, 10), "crop")
    center = transforms.fit(frame, spec(), (10, 10), "center_crop")
    assert left[0, 0, :, 0].tolist() == (6 * np.arange(10)).tolist()
    assert right[0, 0, :, 0].tolist() == (6 * np.arange(30, 40)).tolist()
    assert center[0, 0, :, 0].tolist() == (6 * np.arange(15, 25)).tolist()
    squashed = transforms.fit(frame, spec(), (10, 10), "squash")
    assert squashed[0, 0, 0, 0] < 12 and squashed[0, 0, -1, 0] > 220


def test_shrinking_averages_and_does_not_alias():
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.all(np.abs(transforms.fit(stripes, spec(), (8, 8), "crop").astype(int) - 127.5) < 2)


@pytest.mark.parametrize(("source", "size"), [((32, 57), (28, 28)), ((31, 50), (17, 9)), ((64, 48), (24, 24))])
def test_downscaling_only_the_crop_gives_the_same_pixels(source, size):
    frame = np.random.default_rng(0).integers(0, 255, (1, *source, 3), np.uint8)
    scale = max(size[0] / source[0], size[1] / source[1])
    scaled = [max(small, round(side * scale)) for small, side in zip(size, source, strict=True)]
    whole = cv2.resize(frame[0], scaled[::-1], interpolation=cv2.INTER_AREA).astype(int)
    for place in (0.0, 0.31, 0.5, 0.9999):
        fitted = transforms.fit(frame, spec(crop_y=place, crop_x=place), size, "crop")[0].astype(int)
        top, left = (int(place * (big - small + 1)) for big, small in zip(scaled, size, strict=True))
        assert np.abs(fitted - whole[top : top + size[0], left : left + size[1]]).max() <= 1


def test_flipping_reverses_columns():
    frame = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    assert np.array_equal(transforms.fit(frame, spec(flip=True), (8, 8), "crop"), frame[:, :, ::-1])


def test_actions_and_rewards_are_summed_over_the_stride(stored):
    actions = np.stack([np.arange(10), 10.0 * np.arange(10)], -1).astype(np.float32)
    record = Record(
        id="a", kind="dynamic", clips=(stored(numbered()),), frames=10, height=8, width=8,
        actions=actions, rewards=np.ones(10, np.float32),
    )  # fmt: skip
    example = transforms.load_example(record, spec(start=2, stride=3), bucket())
    # The last frame kept is 8: only actions 8 and 9 were recorded after it.
    assert example["actions"][:, 0].tolist() == [2 + 3 + 4, 5 + 6 + 7, 8 + 9]
    assert example["actions"][:, 1].tolist() == [90, 180, 170]
    assert example["rewards"].tolist() == [3, 3, 2]
    assert example["has_action"] and example["has_reward"] and example["actions"].dtype == np.float32


def test_latents_have_the_frames_of_the_clip():
    latents = np.zeros((1, 10, 2, 2, 8), np.float16) + np.arange(10, dtype=np.float16)[None, :, None, None, None]
    record = Record(id="a", kind="dynamic", clips=(), frames=10, height=8, width=8, latents=latents)
    example = transforms.load_example(record, spec(start=1, stride=4), bucket())
    assert example["latents"].dtype == np.float32 and example["latents"].shape == (3, 2, 2, 8)
    assert example["latents"][:, 0, 0, 0].tolist() == [1, 5, 9]
    assert "video" not in example


def test_compressed_latents_are_cut_from_the_beginning():
    # 41 frames in 11 latents: the first one alone, then four each.
    latents = np.arange(11, dtype=np.float16)[None, :, None, None, None]
    record = Record(id="a", kind="dynamic", clips=(), frames=41, height=8, width=8, latents=latents)
    example = transforms.load_example(record, spec(), bucket(frames=17))
    assert example["latents"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_encoded_clips_are_decoded_and_corrupt_ones_refused():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    record = Record(id="a", kind="image", clips=(encode_image(image),), height=8, width=8)
    example = transforms.load_example(record, spec(), bucket(frames=1))
    assert np.array_equal(example["video"][0], image) and example["frames_per_second"] == 0
    with pytest.raises(DecodeError):
        transforms.load_example(record.replace(clips=(b"no image",)), spec(), bucket(frames=1))
