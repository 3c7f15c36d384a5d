"""Segments and augmentation of clips: which frames are drawn, how they are changed, and that the plan stays pure."""

import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.store.index import Index
from jvgen.data.store.records import Record
from jvgen.data.stream.augment import UNIFORMS, Augmentation, AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.plan import Plan
from jvgen.data.stream.segments import SegmentConfig
from jvgen.data.stream.transforms import load_example
from jvgen.data.video_files import encode_video

LATER = SegmentConfig(choice="later", horizon=8, context=2)
SHUFFLED = SegmentConfig(choice="shuffled", horizon=8)
BUCKET = BucketConfig(frames=5, height=16, width=16, batch_size=4)
FRAMES = 30


def record(number: int = 0, frames: int = FRAMES, **fields) -> Record:
    ramp = np.broadcast_to(np.linspace(20, 220, frames)[:, None, None, None], (frames, 16, 24, 3)).astype(np.uint8)
    return Record(
        id=f"r{number}", kind="dynamic", clips=(encode_video(ramp, 8.0, quality=0),), frames_per_second=8.0,
        frames=frames, height=16, width=24, **fields,
    )  # fmt: skip


def plan(
    bucket: BucketConfig, *, frame_stride: int = 1, frames=FRAMES, evaluation=False, augmentation=None, **fields
) -> Plan:
    source = SourceConfig(path="x", frame_stride=frame_stride)
    config = DataConfig(sources=(source,), evaluation_sources=(source,), buckets=(bucket,), augmentation=augmentation)
    index = Index.of([(record(i, frames, **fields), i) for i in range(8)])
    return Plan(config, [index], seed=3, evaluation=evaluation)


def samples(made: Plan, steps: int = 6) -> list:
    return [made.clip_spec(step, slot) for step in range(steps) for slot in range(4)]


@pytest.mark.parametrize("stride", [1, 3])
def test_later_frames_come_after_the_context(stride):
    drawn = samples(plan(BUCKET.replace(segment=LATER, strides=(stride,))))
    assert len({sample.frames for sample in drawn}) > 12
    for sample in drawn:
        first, second, *rest = sample.frames
        assert (first, second) == (sample.start, sample.start + stride)
        assert rest == sorted(set(rest)) and rest[0] > second and rest[-1] <= sample.start + 7 * stride
    if stride == 3:
        # Frames that the stride leaves out are drawn too.
        assert any((frame - sample.start) % 3 for sample in drawn for frame in sample.frames)


def test_shuffled_frames_are_distinct_and_in_random_order():
    drawn = samples(plan(BUCKET.replace(segment=SHUFFLED, strides=(2,))))
    for sample in drawn:
        assert len(set(sample.frames)) == 5
        assert all((frame - sample.start) % 2 == 0 and 0 <= frame - sample.start <= 14 for frame in sample.frames)
    assert any(list(sample.frames) != sorted(sample.frames) for sample in drawn)


def test_evaluation_takes_evenly_spaced_frames():
    drawn = samples(plan(BUCKET.replace(segment=LATER), evaluation=True, augmentation=AugmentationConfig()))
    assert {(sample.frames, sample.augmentation) for sample in drawn} == {((11, 12, 13, 15, 18), None)}


def test_the_stride_of_a_source_multiplies_the_buckets_and_adapts_to_short_recordings():
    assert {sample.stride for sample in samples(plan(BUCKET, frame_stride=3))} == {3}
    assert {sample.stride for sample in samples(plan(BUCKET.replace(strides=(1, 2)), frame_stride=2))} == {2, 4}
    # Ten frames hold no five at a distance of three; at two they do.
    assert {sample.stride for sample in samples(plan(BUCKET, frame_stride=3, frames=10))} == {2}
    with pytest.raises(ValueError, match="too short"):
        plan(BUCKET, frame_stride=3, frames=4)
    with pytest.raises(ValueError, match="too short"):
        plan(BUCKET.replace(strides=(3,)), frames=10)


def test_a_segment_has_its_frames_and_no_actions():
    whole = record(actions=np.ones((FRAMES, 2), np.float32), rewards=np.ones(FRAMES, np.float32))
    bucket = BUCKET.replace(segment=LATER)
    sample = plan(bucket).clip_spec(0, 1)
    example = load_example(whole, sample, bucket)
    expected = np.linspace(20, 220, FRAMES)[list(sample.frames)]
    np.testing.assert_allclose(example["video"].mean(axis=(1, 2, 3)), expected, atol=2)
    assert example["actions"].shape == (5, 0) and not example["has_action"]


def test_plans_without_these_options_are_unchanged():
    plain = plan(BUCKET)
    assert plain.digest == "80db470c7aaa0270a00862db29425c2eeae439dc2cbdd05b01a7a9e9f811852b"
    others = {
        plan(BUCKET.replace(segment=LATER)).digest,
        plan(BUCKET, frame_stride=2).digest,
        plan(BUCKET, augmentation=AugmentationConfig()).digest,
        plain.digest,
    }
    assert len(others) == 4
    # What is drawn for a slot does not change what was drawn before.
    for with_, without in zip(samples(plan(BUCKET, augmentation=AugmentationConfig())), samples(plain), strict=True):
        assert (with_.start, with_.crop_x, with_.crop_y) == (without.start, without.crop_x, without.crop_y)


# Augmentation.


def draw(seed: int, **changes) -> Augmentation:
    return Augmentation(AugmentationConfig(**changes), tuple(np.random.default_rng(seed).random(UNIFORMS).tolist()))


def test_crops_have_the_configured_area_and_aspect_ratio():
    crops = np.array([draw(seed).crop(200, 320) for seed in range(200)])
    top, left, rows, columns = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (top + rows <= 200).all() and (left + columns <= 320).all()
    area, ratio = rows * columns / 200**2, columns / rows
    assert 0.79 < area.min() < 0.82 and 0.98 < area.max() < 1.01
    assert 0.89 < ratio.min() < 0.92 and 1.08 < ratio.max() < 1.11
    # What fits in no try is the largest square in the middle.
    assert draw(0, crop_area=(3.0, 3.0)).crop(20, 30) == (0, 5, 20, 20)


def test_all_frames_are_augmented_equally():
    frame = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    made = draw(1).apply(np.stack([frame] * 3), (16, 16))
    assert made.shape == (3, 16, 16, 3) and made.dtype == np.uint8
    assert (made[0] == made[1]).all() and (made[0] == made[2]).all()
    assert any((draw(seed).apply(frame[None], (16, 16)) != made[:1]).any() for seed in (2, 3))


def test_color_jitter():
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    video = np.random.default_rng(0).integers(60, 190, (2, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw(0, **still).jitter(video), video)
    numbers = draw(0).uniforms[: 4 * 10]
    ordered = (0.1, 0.2, 0.3, 0.4)

    def changed(values, **only):
        return Augmentation(AugmentationConfig(**still | only), (*numbers, *values, *ordered)).jitter(video)

    # The last number of its range: half of the way up, or down.
    brighter = changed((0.75, 0, 0, 0), brightness=0.4)
    np.testing.assert_allclose(brighter, np.minimum(1.2 * video, 255), atol=1)
    flat = changed((0, 0.0, 0, 0), contrast=0.99)
    assert flat.std() < 0.05 * video.std()
    gray = changed((0, 0, 0.0, 0), saturation=0.99)
    assert np.ptp(gray.astype(int), axis=-1).max() <= 3
    turned = changed((0, 0, 0, 1.0), hue=1 / 3)
    np.testing.assert_allclose(turned, np.roll(video, 1, axis=-1), atol=2)


def test_clips_with_cameras_are_not_augmented():
    cameras = {"intrinsics": np.ones((FRAMES, 4), np.float32), "extrinsics": np.ones((FRAMES, 3, 4), np.float32)}
    assert all(s.augmentation is None for s in samples(plan(BUCKET, augmentation=AugmentationConfig(), **cameras)))
    assert all(s.augmentation is not None for s in samples(plan(BUCKET, augmentation=AugmentationConfig())))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BUCKET.replace(segment=LATER.replace(horizon=4)), "frames = 5: .*context = 2 and horizon = 4 gives 3..4"),
        (BUCKET.replace(segment=LATER.replace(context=0)), "context = 0: 'later' needs"),
        (BUCKET.replace(segment=SHUFFLED.replace(horizon=1)), "horizon = 1"),
        (SourceConfig(path="x", frame_stride=0), "frame_stride = 0"),
        (AugmentationConfig(hue=0.7), "hue = 0.7"),
        (AugmentationConfig(crop_area=(1.0, 0.5)), "crop_area"),
        (AugmentationConfig(contrast=1.0), "contrast = 1.0"),
    ],
)
def test_invalid_configurations(config, words):
    with pytest.raises(ConfigError, match=words):
        validate_tree(config)
