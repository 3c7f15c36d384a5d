"""Which steps are skipped: spikes by bucket and objective, new levels, stages of a curriculum, and old checkpoints."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import exit_codes  # noqa: E402
from jvgen.data.stream.config import BucketConfig  # noqa: E402
from jvgen.parallel.mesh import make_mesh, single_device_mesh  # noqa: E402
from jvgen.training import session  # noqa: E402
from jvgen.training.checkpoint.restore import restore_state  # noqa: E402
from jvgen.training.config import TrainingConfig  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.optimization import health  # noqa: E402
from jvgen.training.optimization.health import Health  # noqa: E402
from jvgen.training.optimization.optimizer import LRStage, OptimizerConfig  # noqa: E402
from jvgen.training.program import Program  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402

GUARD = TrainingConfig(steps=10**6, spike_sigma=6.0)
EVEN = 0.1 * (1 + 0.05 * np.random.default_rng(0).standard_normal(1500)).astype(np.float32)


def skipped_steps(norms, buckets=None, config=GUARD, stages=()) -> list[int]:
    """The steps that the guard skips in a run with these gradient norms, each in its bucket ("a" unless given)."""
    buckets = buckets or ["a"] * len(norms)
    names = sorted(set(buckets))

    @functools.partial(jax.jit, static_argnames="bucket")
    def one(current, norm, new_stage, bucket):
        return health.check_step(
            config, current, {"m": jnp.float32(1)}, {"m": norm}, bucket=bucket, new_stage=new_stage
        )

    current, skipped = Health.start(["m"], names), []
    for step, (norm, bucket) in enumerate(zip(norms, buckets, strict=True)):
        healthy, current = one(current, jnp.float32(norm), jnp.bool_(step in stages), bucket)
        if not bool(healthy):
            skipped.append(step)
        assert int(current.consecutive) <= config.max_consecutive_skips
    assert int(current.skipped) == len(skipped)
    return skipped


def test_a_single_spike_is_skipped_and_the_steps_after_it_are_not():
    norms = EVEN[:300].copy()
    norms[200] *= 50
    assert skipped_steps(norms) == [200]


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_first_steps_are_no_spikes_without_a_warmup(warmup):
    """Of statistics without a step the limit would be zero."""
    config = GUARD.replace(spike_warmup=warmup)
    assert skipped_steps(EVEN[:300], config=config) == []
    assert skipped_steps(np.concatenate([EVEN[:20], 3 * EVEN[:20]]), config=config, stages=(20,)) == []


def test_a_norm_that_stays_on_a_new_level_is_accepted():
    """As after a change of the data: the run does not end, as it would if each of these steps were skipped."""
    norms = np.concatenate([EVEN[:300], 1.7 * EVEN[300:800]])
    assert 0 < len(skipped_steps(norms)) <= GUARD.spike_patience


def test_a_rare_bucket_with_larger_gradients_loses_no_steps():
    """Every 20th step comes from a bucket with twice the norm."""
    buckets = ["rare" if step % 20 == 0 else "often" for step in range(len(EVEN))]
    norms = [2 * norm if bucket == "rare" else norm for norm, bucket in zip(EVEN, buckets, strict=True)]
    assert skipped_steps(norms, buckets) == []


def test_a_new_level_in_many_buckets_at_once_is_accepted():
    buckets = [f"bucket{step % 4}" for step in range(1000)]
    norms = [norm * (1 if step < 600 else 1.8) for step, norm in enumerate(EVEN[:1000])]
    assert len(skipped_steps(norms, buckets)) <= 4 * GUARD.spike_patience


def test_norms_that_grow_are_followed():
    """Outliers enter the statistics clipped at the limit: a norm with a wider and wider spread is not cut off."""
    rng = np.random.default_rng(1)
    spread = np.linspace(0.05, 0.8, 1500)
    norms = np.exp(spread * rng.standard_normal(1500))
    assert len(skipped_steps(norms)) < 25


def test_a_stage_starts_new_statistics():
    norms = np.concatenate([EVEN[:300], 5 * EVEN[300:500]])
    assert skipped_steps(norms, stages=(300,)) == []


def test_stages_start_where_buckets_or_learning_rates_change():
    shape = {"frames": 1, "height": 8, "width": 8, "batch_size": 1}
    buckets = [BucketConfig(**shape, end_step=100), BucketConfig(**shape, start_step=100)]
    optimizer = OptimizerConfig(stages=(LRStage(start_step=150, scale=0.1),))
    assert health.stage_starts(buckets, [optimizer]) == (100, 150)


def test_without_the_guard_finite_steps_are_taken_and_others_are_not():
    config = TrainingConfig(steps=10)
    assert config.spike_sigma == 0
    norms = [1.0, 1e6, np.nan, 1.0, np.inf]
    assert skipped_steps(norms, config=config) == [2, 4]


def test_statistics_are_mean_and_variance_of_the_norms():
    config = dataclasses.replace(GUARD, spike_decay=0.999)
    norms = np.random.default_rng(0).uniform(1, 2, 50).astype(np.float32)
    current = Health.start(["m"], ["a"])
    for norm in norms:
        _, current = health.check_step(config, current, {"m": jnp.float32(1)}, {"m": jnp.asarray(norm)}, bucket="a")
    np.testing.assert_allclose(current.norms["a"]["m"].mean, norms.mean(), rtol=1e-5)
    np.testing.assert_allclose(current.norms["a"]["m"].variance, norms.var(), rtol=1e-4)


GUARDED = {
    "training.steps": 80, "training.spike_sigma": 6.0, "training.spike_warmup": 10, "optimizer.learning_rate": 1e-5,
    "optimizer.warmup_steps": 0, "checkpoint.every": 40, "data.buckets.1.batch_size": 16, "data.buckets.1.frames": 4,
}  # fmt: skip


def test_a_run_survives_a_jump_of_its_gradients(tmp_path, monkeypatch):
    """From step 40 on inputs are 1.6 times as large; before, every step after that was skipped and the run ended."""
    monkeypatch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    whole = toys.FakeLoader.at

    def at(loader, step):
        batch = whole(loader, step)
        return dataclasses.replace(batch, arrays={**batch.arrays, "x": batch.arrays["x"] * (1.0 if step < 40 else 1.6)})

    monkeypatch.setattr(toys.FakeLoader, "at", at)
    assert train(toys.experiment(**GUARDED), tmp_path / "run", make_loader=toys.FakeLoader) == exit_codes.DONE
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 80 and 0 < rows[-1]["spikes_total"] == rows[-1]["skipped_total"] <= 10


class MemoryCheckpoints:
    """Holds the arrays of one checkpoint; restores those that `Checkpoints.restore` would accept as missing."""

    def __init__(self, folder, arrays):
        self.folder, self.arrays = folder, arrays

    def restore(self, wanted, check, *, may_be_missing):
        missing = [name for name in wanted if name not in self.arrays]
        assert all(may_be_missing(name, self.arrays) for name in missing), missing
        return type("Restored", (), {"step": 3, "arrays": {n: a for n, a in self.arrays.items() if n in wanted}})


@pytest.mark.parametrize("sigma", [0.0, 6.0])
def test_a_checkpoint_without_these_statistics_is_restored(sigma, tmp_path):
    """Such as those of 0.1.0, which held one mean and variance an objective."""
    program = Program.build(toys.experiment(**{"training.spike_sigma": sigma}), single_device_mesh())
    saved = program.init().saved()
    old = {name: array for name, array in saved.items() if "norms" not in name and name != "health/spikes"}
    old |= {"health/count": jnp.int32(3), "health/mean/model": jnp.float32(7)}
    checkpoints = MemoryCheckpoints(tmp_path / "checkpoints", old)
    restored = restore_state(program, checkpoints, None, {}, False, lambda message: None)
    assert int(restored.health.count) == 3
    assert restored.saved().keys() == saved.keys()
    assert all(int(s["model"].count) == 0 for s in restored.health.norms.values())
