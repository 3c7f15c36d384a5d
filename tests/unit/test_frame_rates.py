"""Frames are taken at a rate by their times, whatever the recording's rate; captions are drawn by their names."""

import collections
import dataclasses

import numpy as np
import pytest

from jvgen.data.store.index import Index
from jvgen.data.store.records import Record, checksum_of
from jvgen.data.stream.captions import UNIFORMS, CaptionConfig, CaptionDraw
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.plan import ClipSpec, Plan
from jvgen.data.stream.transforms import frame_numbers, load_example
from jvgen.data.video_files import encode_video

AT_EIGHT = BucketConfig(frames=5, height=16, width=16, batch_size=2, frames_per_second=8.0)


def clip(frames: int, rate: float) -> bytes:
    """Frame n is gray 8 n."""
    gray = (8 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    return encode_video(np.broadcast_to(gray, (frames, 16, 16, 3)).copy(), rate, quality=0)


def record(rate: float, frames: int = 30, name: str = "a", **changes) -> Record:
    return Record(
        id=name, kind="dynamic", clips=(b"x",), frames=frames, height=16, width=16, frames_per_second=rate
    ).replace(**changes)  # fmt: skip


def plan_of(records: list[Record], bucket: BucketConfig = AT_EIGHT, **changes) -> Plan:
    index = Index.of((one, checksum_of(one)) for one in records)
    evaluation = changes.pop("evaluation", False)
    config = DataConfig(sources=(SourceConfig(path="set"),), buckets=(bucket,), **changes)
    if evaluation:
        config = dataclasses.replace(config, evaluation_sources=config.sources)
    return Plan(config, [index], seed=1, evaluation=evaluation)


def shown(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("rate", "step"),
    [(8, [1, 1, 1, 1]), (24, [3, 3, 3, 3]), (30, [4, 4, 3, 4]), (12, [2, 1, 2, 1]), (7.9, [1, 1, 1, 1])],
)
def test_frames_at_a_rate(rate, step):
    """The same time passes between frames of an example, within half a recorded frame."""
    one = record(rate, clips=(clip(30, rate),))
    plan = plan_of([one, one.replace(id="b")])
    starts = set()
    for number in range(20):
        spec = plan.clip_spec(number, number % 2)
        numbers = frame_numbers(one, spec, 5)
        assert np.diff(numbers).tolist() == step and 0 <= numbers[0] and numbers[-1] < 30
        np.testing.assert_allclose((numbers - numbers[0]) / rate, np.arange(5) / 8, atol=0.5 / rate + 0.01)
        starts.add(int(numbers[0]))
    assert len(starts) > 5
    example = load_example(one, spec, AT_EIGHT)
    assert shown(example["video"]) == numbers.tolist() and example["frames_per_second"] == 8
    centered = plan_of([one, one.replace(id="b")], evaluation=True).clip_spec(0, 0)
    assert frame_numbers(one, centered, 5)[0] == (30 - sum(step)) // 2


def test_a_variable_rate():
    """15 frames at 2 per second, then 15 at 60: frames by number would move at two speeds."""
    times = np.concatenate([np.arange(15) / 2, 7.5 + np.arange(15) / 60])
    one = record(30 / (times[-1] + 1 / 60), frame_times=times)
    spec = ClipSpec(0, 1, (0,), 0.5, 0.5, False, -1, frames_per_second=2.0)
    assert frame_numbers(one, spec, 16).tolist() == [*range(15), 15]
    fast = dataclasses.replace(spec, start=15, frames_per_second=30.0)
    assert frame_numbers(one, fast, 8).tolist() == list(range(15, 30, 2))
    # An example that would end after the recording begins earlier.
    late = dataclasses.replace(spec, start=28)
    assert times[frame_numbers(one, late, 4)] == pytest.approx(times[-1] - np.arange(4)[::-1] / 2, abs=0.25)


def test_actions_and_rewards_are_summed_between_the_frames():
    actions = np.arange(60, dtype=np.float32).reshape(30, 2)
    one = record(12, clips=(clip(30, 12),), actions=actions, rewards=np.arange(30, dtype=np.float32))
    spec = ClipSpec(4, 1, (0,), 0.5, 0.5, False, -1, frames_per_second=8.0)
    example = load_example(one, spec, AT_EIGHT)
    assert frame_numbers(one, spec, 5).tolist() == [4, 6, 7, 9, 10]
    assert example["rewards"].tolist() == [4 + 5, 6, 7 + 8, 9, 10]
    np.testing.assert_array_equal(example["actions"][0], actions[4] + actions[5])


def test_recordings_that_do_not_fit_say_why():
    records = [
        record(rate, frames, f"{n}") for n, (rate, frames) in enumerate([(4, 30), (30, 15), (0, 1), (30, 16), (8, 5)])
    ]
    plan = plan_of(records)
    [[stats]] = plan._filter_stats
    assert stats.accepted == 2
    assert stats.rejected == {"of fewer than 8 frames per second": 2, "too short (5 frames at 8 per second)": 1}
    assert {int(row) for step in range(8) for row in plan.at(step).row} == {3, 4}
    # One frame has no rate.
    assert plan_of(records, AT_EIGHT.replace(frames=1))._filter_stats[0][0].accepted == 5
    compressed = [record(rate, 30, f"{rate}", latents=np.ones((1, 8, 2, 2, 4), np.float16)) for rate in (8, 16)]
    plan = plan_of([*compressed, record(8, 30, "c")])
    assert plan._filter_stats[0][0].rejected == {"with temporally compressed latents, at another rate than 8": 1}
    [spec] = [plan.clip_spec(0, slot) for slot in range(2) if plan.at(0).row[slot] == 0]
    assert spec.start == 0
    assert load_example(compressed[0].replace(clips=()), spec, AT_EIGHT)["latents"].shape == (2, 2, 2, 4)


@pytest.mark.parametrize("changes", [{"strides": (2,)}, {"strides": (1, 2)}])
def test_a_rate_and_strides_exclude_each_other(changes):
    with pytest.raises(ValueError, match="either at a rate or at strides"):
        AT_EIGHT.replace(**changes).validate()


def test_the_digest_of_a_plan():
    records = [record(8, name="a"), record(8, name="b")]
    plain = plan_of(records, AT_EIGHT.replace(frames_per_second=None))
    digests = {plain.digest, plan_of(records).digest, plan_of(records, captions=CaptionConfig()).digest}
    assert len(digests) == 3


def test_captions_by_name():
    config = CaptionConfig(weights={"short": 1, "long": 9, "bad": 0})
    captions, names = ("s", "l", "b", "other"), ("short", "long", "bad", "")
    draws = np.random.default_rng(0).random((4000, UNIFORMS))
    counts = collections.Counter(CaptionDraw(config, tuple(draw)).draw(captions, names) for draw in draws)
    assert set(counts) == {"s", "l", "other"}
    assert counts["l"] / 4000 == pytest.approx(9 / 11, abs=0.03) and counts["s"] / 4000 == pytest.approx(
        1 / 11, abs=0.02
    )
    # Two captions of one name share its weight; nothing is left of captions without a weight.
    counts = collections.Counter(CaptionDraw(config, tuple(draw)).draw("xyz", ("short", "short", "")) for draw in draws)
    assert counts["z"] / 4000 == pytest.approx(1 / 2, abs=0.03) and counts["x"] / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert CaptionDraw(config, tuple(draws[0])).draw(("b",), ("bad",)) == "" == CaptionDraw(config).draw((), ())
    assert CaptionDraw(config).draw(("b", "l"), ("bad", "long")) == "l"
    assert {CaptionDraw(CaptionConfig(), tuple(draw)).draw("ab", ()) for draw in draws[:50]} == {"a", "b"}


def test_parts_of_captions():
    text = "A dog runs. It is brown! Is it wet? The sky is gray."
    draws = np.random.default_rng(0).random((2000, UNIFORMS))

    def counts(**fields) -> collections.Counter:
        config = CaptionConfig(**fields)
        return collections.Counter(CaptionDraw(config, tuple(draw)).draw((text,), ()) for draw in draws)

    assert counts() == {text: 2000}
    first = counts(first_sentence=0.25)
    assert first["A dog runs."] / 2000 == pytest.approx(0.25, abs=0.03) and first[text] == 2000 - first["A dog runs."]
    parts = counts(sentence_dropout=0.5)
    assert len(parts) == 8 and all(part.startswith("A dog runs.") for part in parts)
    assert parts["A dog runs. Is it wet?"] / 2000 == pytest.approx(1 / 8, abs=0.03)


def test_captions_of_a_plan():
    records = [record(8, name=name, captions=("s", "l"), caption_names=("short", "long")) for name in "ab"]
    plan = plan_of(records, captions=CaptionConfig(weights={"short": 3.0}))
    draws = [plan.clip_spec(step, 0).caption_draw for step in range(400)]
    assert draws[7] == plan.clip_spec(7, 0).caption_draw
    captions = collections.Counter(draw.draw(("s", "l"), ("short", "long")) for draw in draws)
    assert captions["s"] / 400 == pytest.approx(0.75, abs=0.08)
    # Other numbers of a clip are what they are without weights.
    spec, plain = plan.clip_spec(3, 1), plan_of(records).clip_spec(3, 1)
    assert dataclasses.replace(spec, caption_draw=None) == plain and plain.caption_draw is None
    assert plan_of(records, captions=CaptionConfig(), evaluation=True).clip_spec(0, 0).caption_draw.uniforms == ()
    with pytest.raises(ValueError, match="data.captions.weights.shrt: no caption of the sources .* Did you mean short"):
        plan_of(records, captions=CaptionConfig(weights={"shrt": 3.0}))
