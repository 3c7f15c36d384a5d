"""Buckets of many sizes from one line: each record goes to those of its own aspect, and all steps take as long."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data import aspect_buckets
from jvgen.data.store.index import Index
from jvgen.data.store.records import Record
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.plan import Plan
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.preflight.check import inspect_run
from jvgen.tasks.image_vae import ImageVAETaskConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training import balance
from jvgen.training.balance import balanced_buckets, described, step_costs, with_batch_sizes
from jvgen.training.config import TrainingConfig
from jvgen.training.experiment import Experiment

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import CONFIG  # noqa: E402


def test_sizes():
    buckets = aspect_buckets(
        resolutions=(256,), aspects=("16:9", "1:1", "9:16"), frames=(1, 17), frames_per_second=8.0, weight=3.0
    )
    assert {(b.height, b.width) for b in buckets} == {(192, 336), (256, 256), (336, 192)}
    assert all(abs(b.height * b.width / 256**2 - 1) < 0.05 for b in buckets)
    assert [b.frames for b in buckets] == [1, 17] * 3 and {b.weight for b in buckets} == {0.5}
    assert {b.frames_per_second for b in buckets} == {8.0}
    borders = sorted({b.aspects for b in buckets})
    assert borders[0][0] == 0 and borders[1] == pytest.approx((0.75, 1.3333), abs=1e-3)
    assert all(low[1] == high[0] for low, high in zip(borders, borders[1:], strict=False))
    many = aspect_buckets(resolutions=(256, 480, 720), multiple=32, frames=(1,))
    assert all(b.height % 32 == b.width % 32 == 0 for b in many) and len(many) == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aspects": ("16/9",)}, "aspect '16/9': width to height, such as '16:9'"),
        ({"aspects": ("16:0",)}, "aspect '16:0'"),
        ({"aspects": ()}, "at least one of resolutions, aspects"),
        ({"aspects": ("16:9", "15:9"), "multiple": 64}, "two of the aspects 16:9, 15:9 have the size 192x320"),
    ],
)
def test_bad_aspects(changes, message):
    with pytest.raises(ConfigError, match=message):
        aspect_buckets(**{"resolutions": (256,), "frames": (1,), **changes})


def test_records_go_to_their_own_aspect():
    sizes = [(720, 1280), (1280, 720), (512, 512), (500, 640), (544, 960), (600, 500)]
    records = [
        Record(id=f"{h}x{w}", kind="image", clips=(b"x",), height=h, width=w) for h, w in sizes for _ in range(2)
    ]
    index = Index.of((record.replace(id=f"{record.id}-{n}"), n) for n, record in enumerate(records))
    buckets = aspect_buckets(resolutions=(256,), aspects=("16:9", "1:1", "9:16"), frames=(1,))
    plan = Plan(DataConfig(sources=(SourceConfig(path="x"),), buckets=buckets), [index], seed=0)
    seen: dict[str, set[str]] = {}
    for step in range(60):
        planned = plan.at(step)
        seen.setdefault(planned.bucket.name, set()).update(index.id[int(row)].split("-")[0] for row in planned.row)
    assert seen == {
        "1x1x192x336": {"720x1280", "544x960"},
        "1x1x336x192": {"1280x720"},
        "1x1x256x256": {"512x512", "600x500", "500x640"},
    }
    wide = DataConfig(sources=(SourceConfig(path="x"),), buckets=(buckets[0].replace(aspects=(5.0, 6.0)),))
    with pytest.raises(ValueError, match=r"another aspect ratio than 5\.\.6"):
        Plan(wide, [index], seed=0)
    with pytest.raises(ValueError, match="from a ratio up to a larger one"):
        buckets[0].replace(aspects=(2.0, 1.0)).validate()


@pytest.fixture(scope="module")
def task() -> TextToVideoConfig:
    return CONFIG


BUCKETS = tuple(
    BucketConfig(frames=frames, height=height, width=width, batch_size=1)
    for frames in (1, 5)
    for height, width in ((32, 32), (16, 64), (32, 64))
)


def test_all_steps_take_about_the_same_time(task):
    buckets = balanced_buckets(task, BUCKETS, tokens_per_step=20_000, multiple_of=8)
    built = task.build()
    costs = step_costs(built, buckets)
    assert all(bucket.batch_size % 8 == 0 for bucket in buckets)
    assert all(abs(cost.relative - 1) <= balance.TOLERANCE for cost in costs)
    assert np.mean([cost.relative for cost in costs]) == pytest.approx(1)
    longest = max(costs, key=lambda cost: built.sequence_length(cost.bucket))
    assert abs(longest.tokens / 20_000 - 1) < 0.1
    assert "1x5x32x64 (batch" in str(longest) and "tokens): " in str(longest)


def test_attention_may_take_longer_than_its_flops(task):
    """Batches of what attends to more tokens get smaller, and the steps are alike again."""
    slow = {"attention_cost": 4.0}
    plain, weighted = (balanced_buckets(task, BUCKETS, tokens_per_step=80_000, **more) for more in ({}, slow))
    built = task.build()
    images = [
        sum(bucket.batch_size for bucket in buckets if bucket.frames == 1) / buckets[-1].batch_size
        for buckets in (plain, weighted)
    ]
    assert images[1] > 1.1 * images[0]
    assert all(abs(cost.relative - 1) <= balance.TOLERANCE for cost in step_costs(built, weighted, 4.0))
    assert any(abs(cost.relative - 1) > balance.TOLERANCE for cost in step_costs(built, plain, 4.0))
    assert "by FLOPs, those of attention times 4: " in described(built, weighted, 4.0)


def test_steps_that_cannot_be_alike(task):
    buckets = (*BUCKETS, BUCKETS[-1].replace(width=48))
    message = r"more than 10% from their mean:\n(.|\n)*1x5x32x48: batch 128(.|\n)*Use tokens_per_step = "
    with pytest.raises(ConfigError, match=message) as error:
        balanced_buckets(task, buckets, tokens_per_step=100, multiple_of=64)
    enough = int(str(error.value).split("Use tokens_per_step = ")[1].split(" ")[0].replace(",", ""))
    assert balanced_buckets(task, buckets, tokens_per_step=enough, multiple_of=64)


def run_of(task, **data) -> Experiment:
    made = DataConfig(sources=(SourceConfig(path="x"),), buckets=BUCKETS, **data)
    return Experiment(name="x", task=task, data=made, training=TrainingConfig(steps=10, accumulation=3))


def test_a_run_chooses_its_batch_sizes(task):
    """Each microbatch in multiples of the devices; in two stages; again, nothing changes."""
    stages = tuple(bucket.replace(start_step=5 * late, end_step=5 + 5 * late) for late in (0, 1) for bucket in BUCKETS)
    run = run_of(task, tokens_per_step=30_000, batch_multiple=3)
    run = run.replace(data=run.data.replace(buckets=stages))
    resolved = with_batch_sizes(run)
    sizes = [bucket.batch_size for bucket in resolved.data.buckets]
    assert all(size % 9 == 0 for size in sizes) and sizes[:6] == sizes[6:] and sizes[0] > sizes[3]
    assert [bucket.start_step for bucket in resolved.data.buckets] == [0] * 6 + [5] * 6
    assert with_batch_sizes(resolved) == resolved and with_batch_sizes(run_of(task)) == run_of(task)
    assert "of their mean by FLOPs: 1x1x32x32 (batch" in described(task.build(), resolved.data.buckets)
    validate_tree(resolved)
    found = inspect_run(run, devices=[]).problems["config"]
    assert found == []


def test_batch_sizes_that_cannot_be_chosen_are_one_message(task):
    uneven = run_of(task, tokens_per_step=10, batch_multiple=64)
    uneven = uneven.replace(data=uneven.data.replace(buckets=(*BUCKETS, BUCKETS[-1].replace(width=48))))
    (problem,) = inspect_run(uneven, devices=[]).problems["config"]
    assert problem.startswith("data.tokens_per_step = 10: with batch sizes in multiples of 192")
    odd = run_of(task, tokens_per_step=10)
    odd = odd.replace(data=odd.data.replace(buckets=(BUCKETS[0].replace(height=17),)))
    with pytest.raises(ConfigError, match="^data.buckets.0: height = 17"):
        with_batch_sizes(odd)
    with pytest.raises(ConfigError, match="tokens_per_step"):
        validate_tree(run_of(task, tokens_per_step=0))


def test_networks_without_tokens():
    with pytest.raises(ConfigError, match="ImageVAETaskConfig does not say how many tokens"):
        balanced_buckets(ImageVAETaskConfig(network=ImageVAEConfig.tiny()), BUCKETS[:1], tokens_per_step=100)
