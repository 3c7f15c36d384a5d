"""The plan: pure, O(1), complete in every epoch, with errors that name what cannot be filled."""

import collections
import dataclasses
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvgen.data.store.index import Index
from jvgen.data.store.index_files import draft_index
from jvgen.data.store.records import KINDS
from jvgen.data.stream import exclusions, shared_rows
from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig, WeightStage
from jvgen.data.stream.plan import Plan
from jvgen.data.stream.segments import SegmentConfig
from jvgen.saved_config import from_json


def index_of(count: int, *, kind="dynamic", frames=40, height=64, width=64, views=1, captions=2, seed=0, **columns):
    """An index of `count` rows; scalars are repeated, lists are columns."""
    kinds = [kind] * count if isinstance(kind, str) else kind
    full = {
        "frames": frames,
        "height": height,
        "width": width,
        "views": views,
        "captions": captions,
        "frames_per_second": 24.0,
        "has_camera": False,
        "has_action": False,
        "latent_frames": 0,
        **columns,
    }
    return Index(
        id=np.array([f"r{seed}-{row}" for row in range(count)]),
        kind=np.array([KINDS.index(name) for name in kinds]),
        checksum=np.arange(count, dtype=np.uint64) + np.uint64(1000 * seed),
        **{name: np.broadcast_to(np.asarray(value), (count,)) for name, value in full.items()},
    )


def bucket(**changes) -> BucketConfig:
    return BucketConfig(**{"frames": 9, "height": 64, "width": 64, "batch_size": 6, "strides": (1, 2), **changes})


def config(buckets=None, sources=2, weights=(3.0, 1.0), **changes) -> DataConfig:
    return DataConfig(
        sources=tuple(SourceConfig(path=f"set{i}", weight=weights[i]) for i in range(sources)),
        buckets=buckets or (bucket(), bucket(frames=1, batch_size=8, weight=0.5)),
        **changes,
    )


def mixed_plan(seed=0, **changes) -> Plan:
    kinds = ["static", "dynamic", "dynamic", "image"] * 5
    frames = [40, 17, 9, 1] * 5
    return Plan(config(**changes), [index_of(20, kind=kinds, frames=frames), index_of(13, seed=1)], seed)


def same(a, b) -> bool:
    return a.bucket_index == b.bucket_index and np.array_equal(a.source, b.source) and np.array_equal(a.row, b.row)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(list(range(40)) + [10**9, 10**12]))
def test_a_step_is_the_same_in_any_order_of_access(order):
    first, second = mixed_plan(), mixed_plan()
    expected = {step: first.at(step) for step in sorted(order)}
    for step in order:
        assert same(second.at(step), expected[step])
        assert second.clip_spec(step, 3) == first.clip_spec(step, 3)


def test_buckets_sources_and_kinds_follow_their_weights():
    plan = mixed_plan(kind_weights={"static": 3.0})
    steps = [plan.at(step) for step in range(600)]
    assert collections.Counter(step.bucket_index for step in steps) == {0: 400, 1: 200}
    index = index_of(20, kind=["static", "dynamic", "dynamic", "image"] * 5)
    counts = collections.Counter()
    for step in steps:
        if step.bucket_index == 0:
            for source, row in zip(step.source, step.row, strict=True):
                counts[int(source), KINDS[index.kind[row]] if source == 0 else "dynamic"] += 1
    # Source 0 has weight 3 over two kinds, of which static counts three times.
    weights = {(0, "static"): 4.5, (0, "dynamic"): 1.5, (1, "dynamic"): 1.0}
    for pool, weight in weights.items():
        assert abs(counts[pool] - 2400 * weight / 7) < 1, (pool, counts)


def test_every_batch_is_mixed():
    plan = Plan(config(buckets=(bucket(batch_size=8),)), [index_of(50), index_of(50, seed=1)], 0)
    for step in range(30):
        assert np.count_nonzero(plan.at(step).source == 0) == 6


@settings(max_examples=20, deadline=None)
@given(count=st.integers(6, 40), seed=st.integers(-(2**40), 2**40), batch=st.integers(1, 6))
def test_every_row_comes_once_per_epoch_and_epochs_differ(count, seed, batch):
    plan = Plan(config(buckets=(bucket(batch_size=batch),), sources=1), [index_of(count)], seed)
    rows = np.concatenate([plan.at(step).row for step in range(3 * count)])[: 3 * count].reshape(3, count)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(count))
    if count > 10:
        assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])


def test_rows_that_do_not_fit_are_never_planned():
    kinds = ["image", "dynamic", "static", "dynamic"] * 10
    frames = np.tile([1, 8, 9, 30], 10)
    sizes = np.repeat([64, 32], 20)
    plan = Plan(config(buckets=(bucket(),), sources=1), [index_of(40, kind=kinds, frames=frames, height=sizes)], 0)
    seen = {int(row) for step in range(40) for row in plan.at(step).row}
    assert seen == {row for row in range(20) if frames[row] >= 9}


def test_seeds_make_different_plans():
    first, second = mixed_plan(seed=1), mixed_plan(seed=2)
    assert first.digest != second.digest and first.manifest == second.manifest
    assert not all(np.array_equal(first.at(step).row, second.at(step).row) for step in range(5))
    assert [first.clip_spec(step, 0) for step in range(9)] != [second.clip_spec(step, 0) for step in range(9)]


def test_samples_stay_within_their_records():
    frames = np.array([9, 10, 17, 18, 40, 16])
    plan = Plan(config(buckets=(bucket(strides=(1, 2, 4)),), sources=1), [index_of(6, frames=frames, views=3)], 0)
    seen = collections.defaultdict(set)
    for step in range(250):
        rows = plan.at(step).row
        for slot in range(6):
            sample = plan.clip_spec(step, slot)
            recorded = frames[rows[slot]]
            assert 0 <= sample.start and sample.start + 8 * sample.stride < recorded
            assert 0 <= sample.crop_y < 1 and 0 <= sample.crop_x < 1
            seen[recorded].add((sample.start, sample.stride))
            seen["view"].add(sample.views)
            seen["caption"].add(sample.caption)
    assert seen[9] == {(0, 1)} and seen[10] == {(0, 1), (1, 1)}
    assert seen[17] == {(start, 1) for start in range(9)} | {(0, 2)}
    assert {stride for _, stride in seen[40]} == {1, 2, 4}
    assert (31, 1) in seen[40] and (7, 4) in seen[40]
    assert seen["view"] == {(0,), (1,), (2,)} and seen["caption"] == {0, 1}


def test_several_views_are_distinct_and_in_any_order():
    plan = Plan(config(buckets=(bucket(views=2),), sources=1), [index_of(6, views=3)], 0)
    views = {plan.clip_spec(step, slot).views for step in range(40) for slot in range(6)}
    assert views == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_windows_differ_between_epochs():
    plan = Plan(config(buckets=(bucket(strides=(1,)),), sources=1), [index_of(6)], 0)
    starts = collections.defaultdict(set)
    for step in range(20):
        for slot, row in enumerate(plan.at(step).row):
            starts[int(row)].add(plan.clip_spec(step, slot).start)
    assert all(len(values) > 5 for values in starts.values())


def test_only_clips_without_cameras_actions_and_latents_are_flipped():
    # Rows: plain, with cameras, with actions, with latents of the bucket's size.
    columns = {"has_camera": [0, 1, 0, 0], "has_action": [0, 0, 1, 0], "latent_frames": [0, 0, 0, 40]}
    index = index_of(4, **columns)
    plan = Plan(config(buckets=(bucket(batch_size=4),), sources=1, flip=True), [index], 0)
    flips = collections.defaultdict(set)
    for step in range(40):
        for slot, row in enumerate(plan.at(step).row):
            flips[int(row)].add(plan.clip_spec(step, slot).flip)
    assert flips == {0: {True, False}, 1: {False}, 2: {False}, 3: {False}}


def test_compressed_latents_start_at_the_first_frame():
    plan = Plan(config(buckets=(bucket(),), sources=1), [index_of(6, frames=41, latent_frames=11)], 0)
    assert {(plan.clip_spec(step, 0).start, plan.clip_spec(step, 0).stride) for step in range(30)} == {(0, 1)}


def test_a_record_without_captions_has_none():
    plan = Plan(config(buckets=(bucket(),), sources=1), [index_of(6, captions=0)], 0)
    assert plan.clip_spec(0, 0).caption == -1


def test_substitutes_are_of_the_same_pool_and_reach_all_of_it():
    plan = mixed_plan()
    planned = plan.at(5)
    kinds = ["static", "dynamic", "dynamic", "image"] * 5
    for slot in range(len(planned.row)):
        source, row = int(planned.source[slot]), int(planned.row[slot])
        found = []
        while (place := plan.substitute(5, slot, len(found) + 1)) is not None:
            found.append(place)
        assert {s for s, _ in found} == {source}
        assert len({r for _, r in found}) == len(found)
        if source == 0:
            assert {kinds[r] for _, r in found} == {kinds[row]}
            assert row in {r for _, r in found}
        else:
            assert len(found) == 13
    assert plan.clip_spec(5, 0, 2) == mixed_plan().clip_spec(5, 0, 2) != plan.clip_spec(5, 0)


def test_seek_is_constant_time():
    plan = mixed_plan()

    def cost(start: int) -> float:
        began = time.process_time()
        for step in range(start, start + 50):
            plan.at(step)
        return time.process_time() - began

    near, far = min(cost(0) for _ in range(3)), min(cost(10**9) for _ in range(3))
    assert far < 5 * near + 0.01


def test_what_is_sent_to_workers_is_small(tmp_path, monkeypatch):
    """The index is a path, tables of rows are files; a copy has the same batches, and the file goes with the plan."""
    monkeypatch.setattr(shared_rows.SharedRows.__init__, "__defaults__", (1000,))
    monkeypatch.setattr(shared_rows.tempfile, "tempdir", str(tmp_path))
    index = index_of(4000, frames=[40, 3] * 2000)
    index = draft_index(tmp_path, "train", [index], ()).commit()
    plan = Plan(config(sources=1), [index], seed=0)
    sent = pickle.dumps(plan)
    assert len(sent) < 10_000
    copy = pickle.loads(sent)
    assert all(same(copy.at(step), plan.at(step)) for step in (0, 7, 10**9))
    assert copy.clip_spec(5, 2) == plan.clip_spec(5, 2)
    assert len(list(tmp_path.glob("jvgen-rows-*"))) == 1
    del plan
    assert not list(tmp_path.glob("jvgen-rows-*"))
    assert copy.at(3).row.size
    assert all(same(pickle.loads(pickle.dumps(p)).at(9), p.at(9)) for p in [mixed_plan()])


def test_evaluation_is_in_recorded_order_for_any_seed():
    settings = dataclasses.replace(
        config(buckets=(bucket(batch_size=4),), flip=True), evaluation_sources=(SourceConfig(path="held"),)
    )
    plans = [Plan(settings, [index_of(6, frames=20)], seed, evaluation=True) for seed in (0, 99)]
    assert plans[0].digest == plans[1].digest
    assert [plans[0].at(step).row.tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    samples = {plans[number].clip_spec(step, slot) for number in (0, 1) for step in range(3) for slot in range(4)}
    assert len(samples) == 1
    sample = samples.pop()
    assert (sample.start, sample.stride, sample.crop_y, sample.flip, sample.caption) == (6, 1, 0.5, False, 0)


def test_evaluation_leaves_out_buckets_that_its_sources_cannot_fill():
    settings = dataclasses.replace(config(), evaluation_sources=(SourceConfig(path="held"),))
    plan = Plan(settings, [index_of(3, frames=1, kind="image")], 0, evaluation=True)
    assert [b.frames for b in plan.buckets] == [1]
    assert plan.at(0).bucket_index == 1


def test_a_bucket_that_cannot_be_filled_lists_the_reasons():
    kinds = ["image"] * 4 + ["dynamic"] * 6
    with pytest.raises(ValueError) as caught:
        Plan(
            config(buckets=(bucket(frames=1), bucket(frames=65, kinds=("dynamic",))), sources=1),
            [index_of(10, kind=kinds, height=[64] * 9 + [32])],
            0,
        )
    message = str(caught.value)
    assert "buckets.1 (1x65x64x64, batch_size 6) cannot be filled by any source" in message
    assert "sources.0 (set0 [train]): 0 of 10" in message and "6 too short (fewer than 65 frames)" in message
    assert "4 of kind image, which the bucket does not take" in message


@pytest.mark.parametrize(
    ("changes", "columns", "reason"),
    [
        ({}, {"height": 63}, "smaller than 64x64 (upscale = True takes them)"),
        ({"views": 2}, {}, "with fewer than 2 views"),
        ({}, {"latent_frames": 40, "height": 128, "width": 128}, "cached latents of another size"),
        ({"strides": (2,)}, {"latent_frames": 10}, "need stride 1"),
    ],
)
def test_reasons_name_the_rule(changes, columns, reason):
    with pytest.raises(ValueError) as caught:
        Plan(config(buckets=(bucket(**changes),), sources=1), [index_of(10, **columns)], 0)
    assert reason in str(caught.value)


def test_upscale_takes_small_records():
    small = [index_of(10, height=32)]
    assert Plan(config(buckets=(bucket(),), sources=1, upscale=True), small, 0).records(0) == {("set0", "dynamic"): 10}


def test_a_bucket_with_fewer_records_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="has only 5 records for a batch"):
        Plan(config(buckets=(bucket(),), sources=1), [index_of(5)], 0)


def test_a_source_that_fits_no_bucket_is_refused():
    with pytest.raises(ValueError, match=r"sources.1 \(set1 \[train\]\) has no record for any bucket") as caught:
        Plan(config(), [index_of(10), index_of(10, height=8)], 0)
    assert "10 smaller than 64x64" in str(caught.value)


def test_kinds_can_be_left_out_by_source_and_by_weight():
    kinds = ["static", "dynamic"] * 10
    settings = config(buckets=(bucket(),), sources=1)
    settings = dataclasses.replace(settings, sources=(SourceConfig(path="a", kinds=("static",)),))
    assert Plan(settings, [index_of(20, kind=kinds)], 0).records(0) == {("a", "static"): 10}
    settings = config(buckets=(bucket(),), sources=1, kind_weights={"dynamic": 0.0})
    assert Plan(settings, [index_of(20, kind=kinds)], 0).records(0) == {("set0", "static"): 10}


# Ids as the builders make them of RLDS shards, RoboNet's own files, and iVideoGPT's npz files.
ROBONET_IDS = [
    "robo_net-train.tfrecord-00000-of-01024/000001/berkeley_sawyer_traj11106", "penn_kuka_traj280.hdf5",
    "robo_net/train_eps_00009935.npz", "berkeley_sawyer_traj1110.hdf5", "train_eps_00000001.npz",
]  # fmt: skip


def test_test_recordings_of_other_data_sets_are_left_out():
    index = dataclasses.replace(index_of(5), id=np.array(ROBONET_IDS))
    data = config((bucket(batch_size=2),), sources=1)
    excluding = data.replace(sources=(data.sources[0].replace(exclude="robonet_test"),))
    plan = Plan(excluding, [index], 0)
    assert {int(row) for step in range(4) for row in plan.at(step).row} == {3, 4}
    assert {int(row) for step in range(5) for row in Plan(data, [index], 0).at(step).row} == {0, 1, 2, 3, 4}
    assert plan.digest != Plan(data, [index], 0).digest
    with pytest.raises(ValueError, match="exclude = 'robonet_test' names none of its 20 records.*'r0-0'"):
        Plan(excluding, [index_of(20)], 0)


def test_lists_of_excluded_recordings(tmp_path):
    names = exclusions.read("robonet_test")
    assert len(names) == 2 * 126 and {"berkeley_sawyer_traj63759", "train_eps_00009935"} < names
    (tmp_path / "mine.txt").write_text("# ours\na b\nc\n")
    assert exclusions.read(str(tmp_path / "mine.txt")) == {"a", "b", "c"}
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no names"):
        exclusions.read(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="exclude = 'nowhere.txt': name a text file, or one of the lists robonet_test"):
        exclusions.read("nowhere.txt")


@pytest.mark.parametrize(
    "change",
    [
        {"flip": True},
        {"resize": "squash"},
        {"upscale": True},
        {"kind_weights": {"dynamic": 0.5}},
        {"weights": (1.0, 1.0)},
        {"buckets": (bucket(strides=(1, 3)),)},
    ],
)
def test_the_digest_changes_with_the_batches(change):
    indices = [index_of(20), index_of(20, seed=1)]
    base = {"buckets": (bucket(),)}
    assert Plan(config(**base), indices, 0).digest != Plan(config(**{**base, **change}), indices, 0).digest


def test_the_digest_is_independent_of_performance_settings_and_paths():
    indices = [index_of(20), index_of(20, seed=1)]
    base = config()
    moved = dataclasses.replace(
        base, threads=3, workers=2, prefetch=9, error_budget=0.5,
        sources=tuple(dataclasses.replace(source, path=f"/elsewhere/{source.path}") for source in base.sources),
    )  # fmt: skip
    assert Plan(base, indices, 0).digest == Plan(moved, indices, 0).digest
    assert Plan(base, indices, 0).manifest == Plan(moved, indices, 0).manifest
    other = Plan(base, [index_of(20), index_of(20, seed=2)], 0)
    assert Plan(base, indices, 0).manifest != other.manifest and Plan(base, indices, 0).digest == other.digest


def test_the_plan_is_the_same_on_every_machine():
    """Frozen: a change here is a change of `jvgen.data.stream.plan.VERSION`."""
    plan = mixed_plan(seed=123)
    assert plan.at(10**9).row.tolist() == [3, 8, 2, 4, 15, 12, 1, 0]
    sample = plan.clip_spec(10**9, 1)
    assert (sample.start, sample.stride, sample.caption) == (30, 2, 1)
    assert sample.crop_y == 0.1427265929693915


def test_digests_are_those_of_version_0_1():
    """Constants computed by version 0.1.0, with and without the fields that a digest leaves out if unused."""
    indices = [index_of(20), index_of(13, seed=1)]
    plain = Plan(config(), indices, 0)
    assert plain.digest == "d5122c6d946a0b231d9198c27d97586d7c0f3918423a1beb9322abd0d073b6f9"
    assert plain.manifest == "b8c689d544ccc607d392497bd1a2ba23802191d57512fba21800608f00558523"
    first, second = config().sources
    full = DataConfig(
        sources=(first.replace(frame_stride=2, kinds=("dynamic",)), second),
        evaluation_sources=(SourceConfig(path="held", frame_stride=3),),
        buckets=(
            bucket(segment=SegmentConfig(choice="later", horizon=12, context=2), end_step=100),
            bucket(start_step=50, views=1),
            bucket(start_step=20, end_step=70),
        ),
        augmentation=AugmentationConfig(), flip=True, upscale=True, resize="squash", kind_weights={"dynamic": 0.5},
    )  # fmt: skip
    assert Plan(full, indices, 7).digest == "a796fc743a955fadefa59904a9f2aa16bbc644824bc7cf4967813510b307baf5"
    evaluation = Plan(full, indices[:1], 7, evaluation=True)
    assert evaluation.digest == "f99dd7dc46d040ef14093be824d052eb56f9a17aa01f930777ce0115233fa6d2"


def test_configs_of_version_0_1_are_read():
    saved = """{"class": "jvgen.data.config:BucketConfig", "frames": 9, "height": 64, "width": 64, "batch_size": 6,
                "strides": [1, 2], "begins": 3, "ends": 7}"""
    assert from_json(saved) == bucket(start_step=3, end_step=7)
    saved = """{"class": "jvgen.data.config:SourceConfig", "path": "set0", "step": 2}"""
    assert from_json(saved) == SourceConfig(path="set0", frame_stride=2)


def staged(*weights, buckets=None, **changes) -> Plan:
    """Sources whose weights are (start step, weight), ..."""
    sources = tuple(
        SourceConfig(
            path=f"set{i}",
            weight=stages[0][1] or 1.0,
            weight_stages=tuple(
                WeightStage(start_step=step, weight=weight) for step, weight in stages[not not stages[0][1] :]
            ),
        )
        for i, stages in enumerate(weights)
    )
    settings = DataConfig(sources=sources, buckets=buckets or (bucket(),), **changes)
    return Plan(settings, [index_of(20 + 3 * i, seed=i) for i in range(len(sources))], seed=4)


def test_weights_of_sources_change_at_their_steps():
    plan = staged([(0, 1.0)], [(0, 1.0), (40, 3.0), (60, 0.0)], [(0, 0.0), (60, 2.0)])
    counts = np.stack([np.bincount(plan.at(step).source, minlength=3) for step in range(120)])
    assert counts[:40].sum(0).tolist() == [120, 120, 0]
    assert counts[40:60].sum(0).tolist() == [30, 90, 0]
    assert counts[60:].sum(0).tolist() == [120, 0, 240]
    # A source goes on where it was: each row once before any row twice, over all stages.
    steps = [plan.at(step) for step in range(120)]
    rows = [row for planned in steps for row in planned.row[planned.source == 0].tolist()]
    for epoch in range(len(rows) // 20):
        assert sorted(rows[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert plan.at(10**12).source.size and plan.substitute(50, 1, 2) is not None


def test_stages_of_buckets_and_sources_together():
    """The number of samples before a step counts the batches of the bucket, not of the run."""
    buckets = (bucket(end_step=30), bucket(frames=1, batch_size=8, weight=2.0), bucket(frames=5, start_step=30))
    plan = staged([(0, 1.0)], [(0, 1.0), (10, 0.5), (45, 4.0)], buckets=buckets)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(200):
        planned = plan.at(step)
        shares = {False: (1, 2), True: (2, 3)}[10 <= step < 45] if step < 45 else (1, 5)
        assert abs(np.sum(planned.source == 0) - planned.bucket.batch_size * shares[0] / shares[1]) < 2
        for source, row in zip(planned.source.tolist(), planned.row.tolist(), strict=True):
            seen.setdefault((planned.bucket_index, source), []).append(row)
    for (_, source), rows in seen.items():
        size = 20 + 3 * source
        for epoch in range(len(rows) // size):
            assert len(set(rows[size * epoch : size * (epoch + 1)])) == size


def test_a_weight_at_all_steps_is_the_weight():
    plain, same_weights = staged([(0, 3.0)], [(0, 1.0)]), staged([(0, 3.0)], [(0, 1.0), (7, 1.0)])
    assert plain.digest != same_weights.digest
    assert all(np.array_equal(plain.at(step).source, same_weights.at(step).source) for step in range(7))


def test_stages_without_a_source_and_out_of_order():
    with pytest.raises(ValueError, match=r"buckets.0 .* all sources that fit it have weight 0 from its batch 5 on"):
        staged([(0, 1.0), (5, 0.0)])
    with pytest.raises(ValueError, match=r"weight_stages begin at steps \[5, 5\]: each must begin after"):
        SourceConfig(
            path="x", weight_stages=(WeightStage(start_step=5, weight=1), WeightStage(start_step=5, weight=2))
        ).validate()
