"""Stages of a run: shapes, batch sizes and learning rates are functions of the step, and any stage can be resumed."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.stages import BucketSchedule, check_stages
from jvgen.saved_config import from_json, to_json
from jvgen.training.loop import train
from jvgen.training.optimization.curriculum import Stage, staged_buckets, staged_learning_rate, total_steps
from jvgen.training.optimization.optimizer import LRStage, OptimizerConfig, make_schedule
from jvgen.training.telemetry.json_lines import read_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402


def bucket(side: int, batch_size: int = 2, **changes) -> BucketConfig:
    return BucketConfig(**{"frames": 1, "height": side, "width": side, "batch_size": batch_size, **changes})


STAGES = (
    Stage(steps=3, buckets=(bucket(8, 4),), learning_rate=4e-3),
    Stage(steps=4, buckets=(bucket(8, 2), bucket(16, 2, weight=3.0)), learning_rate=1e-3, warmup_steps=2),
    Stage(steps=2, buckets=(bucket(16, 1),), learning_rate=5e-4),
)
BUCKETS = staged_buckets(STAGES)


def test_stages_set_the_steps_of_each_shape():
    assert total_steps(STAGES) == 9
    assert [(b.height, b.batch_size, b.start_step, b.end_step) for b in BUCKETS] == [
        (8, 4, 0, 3), (8, 2, 3, 7), (16, 2, 3, 7), (16, 1, 7, 9),
    ]  # fmt: skip
    check_stages(BUCKETS, 9)


def test_buckets_are_counted_over_all_stages():
    """At any step, asked in any order: as many batches before it as counting from the start gives."""
    buckets = (
        bucket(8, end_step=40), bucket(16, start_step=10, end_step=25), bucket(32, start_step=25, weight=2.0),
        bucket(64, weight=0.5),
    )  # fmt: skip
    turns, given = BucketSchedule(buckets), [0] * 4
    expected = []
    for step in range(200):
        number, before = turns.at(step)
        assert buckets[number].start_step <= step < (buckets[number].end_step or 200)
        assert before == given[number], step
        given[number] += 1
        expected.append((number, before))
    assert [turns.at(step) for step in reversed(range(200))] == expected[::-1]
    # Shares hold within a stage: 2 to 0.5 from step 40 on.
    late = [number for number, _ in expected[40:]]
    assert late.count(2) == 4 * late.count(3) == 128
    assert turns.at(10**12)[1] > 10**11


def test_evaluation_takes_every_shape_at_any_step():
    turns = BucketSchedule(BUCKETS, always=True)
    assert {turns.at(step)[0] for step in range(20)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "buckets, steps, words",
    [((bucket(8, end_step=4), bucket(16, start_step=5)), 9, "step 4 of 9"),
     ((bucket(8, start_step=1),), 3, "step 0 of 3"),
     ((bucket(8, end_step=3),), 4, "step 3 of 4")],
)  # fmt: skip
def test_gaps_between_stages_are_named(buckets, steps, words):
    with pytest.raises(ValueError, match=words):
        check_stages(buckets, steps)


def test_learning_rates_of_the_stages():
    config = OptimizerConfig(warmup_steps=2, **staged_learning_rate(STAGES))
    assert config.stages == (LRStage(start_step=3, scale=0.25, warmup_steps=2), LRStage(start_step=7, scale=0.125))
    rates = [float(make_schedule(config, 9)(jnp.asarray(step, jnp.int32))) for step in range(9)]
    np.testing.assert_allclose(rates, [2e-3, 4e-3, 4e-3, 2.5e-3, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4], rtol=1e-6)


@pytest.mark.parametrize(
    "stages, words",
    [((LRStage(start_step=5, scale=1.0), LRStage(start_step=5, scale=2.0)), "must increase"),
     ((LRStage(start_step=5, scale=0.0),), "scale = 0.0: must be positive")],
)  # fmt: skip
def test_stages_of_the_learning_rate_are_checked(stages, words):
    with pytest.raises(ConfigError, match=words):
        validate_tree(OptimizerConfig(stages=stages))


def test_stages_saved_by_0_1_0_are_read():
    saved = '{"class": "jvgen.training.optimizer:RateStage", "begins": 5, "factor": 0.5, "rise": 2}'
    assert from_json(saved) == LRStage(start_step=5, scale=0.5, warmup_steps=2)


# A run.


class StagedLoader(toys.FakeLoader):
    """Random numbers, in the order of shapes of a real data plan."""

    def bucket(self, step: int) -> BucketConfig:
        return self.buckets[BucketSchedule(self.buckets).at(step)[0]]


def test_a_run_resumes_within_and_between_stages(tmp_path, quick_compilations):
    small, large = (
        BucketConfig(frames=frames, height=1, width=1, batch_size=size) for frames, size in ((2, 32), (4, 16))
    )
    stages = (
        Stage(steps=3, buckets=(small,), learning_rate=4e-3),
        Stage(steps=4, buckets=(small, large.replace(weight=3.0)), learning_rate=1e-3, warmup_steps=2),
        Stage(steps=2, buckets=(large,), learning_rate=5e-4),
    )
    base = toys.experiment()
    run = base.replace(
        data=base.data.replace(buckets=staged_buckets(stages)),
        optimizer=OptimizerConfig(warmup_steps=1, **staged_learning_rate(stages)),
        training=base.training.replace(steps=total_steps(stages)),
        checkpoint=base.checkpoint.replace(every=100),
    )
    validate_tree(run)
    assert from_json(to_json(run)) == run
    assert train(run, tmp_path / "whole", make_loader=StagedLoader) == 0
    for stop in (3, 5, None):
        assert train(run, tmp_path / "parts", stop_after=stop, make_loader=StagedLoader) == 0
    whole, parts = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    names = [row["bucket"] for row in whole]
    assert names[:3] == ["1x2x1x1"] * 3 and names[7:] == ["1x4x1x1"] * 2 and len(set(names[3:7])) == 2
    for ours, theirs in zip(parts, whole, strict=True):
        for name in ("step", "bucket", "records", "loss", "gradient_norm", "learning_rate"):
            assert ours[name] == theirs[name], (name, ours["step"])
