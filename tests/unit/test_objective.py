"""Random draws per slot, loss weights that are independent of the batch, and band totals that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jvgen.config import ConfigError, validate_tree
from jvgen.diffusion.objective import (
    ObjectiveConfig,
    TimestepConfig,
    draw_noise,
    draw_timesteps,
    loss_by_band,
    loss_per_sample,
    slot_normal,
    weight_table,
)
from jvgen.diffusion.schedule import ScheduleConfig

COGVIDEOX = ScheduleConfig(kind="cogvideox").build()
STABLE = ScheduleConfig(kind="scaled_linear").build()
FLOW = ScheduleConfig(kind="rectified_flow").build()
UNIFORM = TimestepConfig()


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def timesteps_of(seed, count):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 1000, count), jnp.float32)


def test_a_slot_draws_the_same_in_any_batch(key):
    many = draw_timesteps(key, 16, UNIFORM, COGVIDEOX)
    np.testing.assert_array_equal(draw_timesteps(key, 3, UNIFORM, COGVIDEOX), many[:3])
    microbatch = draw_timesteps(key, 4, UNIFORM, COGVIDEOX, slots=jnp.arange(8, 12))
    np.testing.assert_array_equal(microbatch, many[8:12])
    noise = draw_noise(key, (16, 3, 5))
    np.testing.assert_array_equal(draw_noise(key, (4, 3, 5), jnp.arange(8, 12)), noise[8:12])
    assert len(np.unique(many)) > 12 and len(np.unique(noise)) == noise.size


def test_a_slot_draws_the_same_on_any_mesh(key):
    single = jax.jit(lambda k: draw_noise(k, (8, 4, 6)))(key)
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    spread = jax.jit(lambda k: draw_noise(k, (8, 4, 6)), out_shardings=sharding)(key)
    np.testing.assert_array_equal(spread, single)


def test_timesteps_and_noise_come_from_different_keys(key):
    direct = slot_normal(key, (4, 2))
    assert not np.allclose(direct, draw_noise(key, (4, 2)))


def test_uniform_timesteps_are_whole_and_cover_the_grid(key):
    drawn = np.asarray(draw_timesteps(key, 20000, UNIFORM, COGVIDEOX))
    assert drawn.dtype == np.float32 and (drawn == np.floor(drawn)).all()
    assert drawn.min() == 0 and drawn.max() == 999
    counts = np.histogram(drawn, bins=10, range=(0, 1000))[0]
    assert np.abs(counts - 2000).max() < 200


def test_stratified_timesteps_fill_every_interval_once(key):
    """In every step, in any order of slots and any split into microbatches; a slot by itself is uniform over steps."""
    config = UNIFORM.replace(draws="stratified")
    drawn = np.asarray(draw_timesteps(key, 64, config, FLOW)) / 1000
    np.testing.assert_array_equal(np.sort(np.floor(drawn * 64)), np.arange(64))
    parts = [draw_timesteps(key, 16, config, FLOW, slots=jnp.arange(start, 64, 4)) for start in range(4)]
    np.testing.assert_array_equal(np.stack(parts, axis=1).ravel() / np.float32(1000), drawn)
    counts = np.bincount(np.floor(np.asarray(draw_timesteps(key, 48, config, FLOW)) * 0.048).astype(int), minlength=48)
    assert counts.max() <= 2 and counts.sum() == 48
    steps = jax.vmap(lambda key: draw_timesteps(key, 8, config, COGVIDEOX))(jax.random.split(key, 4000))
    for slot in np.asarray(steps).T:
        assert np.array_equal(slot, np.floor(slot)) and slot.min() >= 0 and slot.max() <= 999
        np.testing.assert_allclose(np.quantile(slot, [0.1, 0.5, 0.9]), [100, 500, 900], atol=30)
    variance = np.var(np.mean(np.asarray(steps), axis=1))
    alone = jax.vmap(lambda key: draw_timesteps(key, 8, UNIFORM, COGVIDEOX))(jax.random.split(key, 4000))
    assert variance < np.var(np.mean(np.asarray(alone), axis=1)) / 5


def test_stratified_logit_normal_has_the_stated_quantiles(key):
    config = TimestepConfig(kind="logit_normal", mean=0.5, std=0.8, draws="stratified")
    drawn = np.asarray(draw_timesteps(key, 1024, config, FLOW)) / 1000
    assert np.median(drawn) == pytest.approx(1 / (1 + np.exp(-0.5)), abs=2e-3)
    assert np.quantile(drawn, 0.8413) == pytest.approx(1 / (1 + np.exp(-1.3)), abs=2e-3)
    assert np.isfinite(drawn).all() and drawn.min() > 0 and drawn.max() < 1


def test_logit_normal_and_shift_have_the_stated_quantiles(key):
    config = TimestepConfig(kind="logit_normal", mean=0.5, std=0.8)
    drawn = np.asarray(draw_timesteps(key, 20000, config, FLOW)) / 1000
    logit = np.log(drawn / (1 - drawn))
    assert logit.mean() == pytest.approx(0.5, abs=0.03) and logit.std() == pytest.approx(0.8, abs=0.03)
    shifted = np.asarray(draw_timesteps(key, 20000, UNIFORM.replace(shift=3.0), FLOW)) / 1000
    assert np.median(shifted) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.02)


def test_shift_follows_resolution_and_duration(key):
    tokens = TimestepConfig(shift_by="tokens", base_tokens=256)
    assert tokens.shift_of(1, 16, 16) == 1.0 and tokens.shift_of(4, 32, 32) == pytest.approx(4.0)
    both = TimestepConfig(shift_by="resolution_and_duration", base_tokens=256)
    assert both.shift_of(1, 16, 16) == 1.0 and both.shift_of(9, 64, 64) == pytest.approx(9.0)
    large = np.asarray(draw_timesteps(key, 1000, tokens, FLOW, size=(4, 32, 32)))
    small = np.asarray(draw_timesteps(key, 1000, tokens, FLOW, size=(1, 16, 16)))
    assert (large >= small).all() and large.mean() > small.mean() + 100
    with pytest.raises(ValueError, match="size"):
        draw_timesteps(key, 4, tokens, FLOW)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "bell"])
@pytest.mark.parametrize(
    "target, schedule", [("v", COGVIDEOX), ("epsilon", STABLE), ("clean", STABLE), ("velocity", FLOW)]
)
def test_weights_have_mean_one_over_the_grid(weighting, target, schedule):
    table = weight_table(ObjectiveConfig(target=target, weighting=weighting), schedule)
    assert table.shape == (1000,) and table.mean() == pytest.approx(1.0)
    assert (table >= 0).all() and np.isfinite(table).all()


def test_min_snr_is_the_published_weight_for_noise_and_v():
    snr = STABLE.alpha_bar / (1 - STABLE.alpha_bar)
    for target, expected in {"epsilon": np.minimum(snr, 5) / snr, "v": np.minimum(snr, 5) / (snr + 1)}.items():
        table = weight_table(ObjectiveConfig(target=target, weighting="min_snr"), STABLE)
        np.testing.assert_allclose(table, expected / expected.mean(), rtol=1e-9)


@settings(max_examples=8, deadline=None)
@given(weighting=st.sampled_from(["uniform", "min_snr", "bell"]), size=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_the_loss_of_a_sample_is_independent_of_its_batch(weighting, size, seed):
    config = ObjectiveConfig(weighting=weighting)
    clean, noise, prediction = normal(seed, (3, 9, 4))
    timesteps = timesteps_of(seed, 9)
    whole, _ = loss_per_sample(prediction, clean, noise, timesteps, config, COGVIDEOX)
    part, _ = loss_per_sample(prediction[:size], clean[:size], noise[:size], timesteps[:size], config, COGVIDEOX)
    assert np.isfinite(part).all()
    np.testing.assert_allclose(part, whole[:size], rtol=1e-6)


def test_the_perfect_prediction_has_no_loss_and_a_wrong_one_has_its_square():
    clean, noise = jnp.ones((2, 3)), jnp.full((2, 3), 2.0)
    timesteps = jnp.asarray([100.0, 999.0])
    config = ObjectiveConfig(target="v")
    perfect = COGVIDEOX.target(clean, noise, timesteps, "v")
    weighted, plain = loss_per_sample(perfect + 3.0, clean, noise, timesteps, config, COGVIDEOX)
    np.testing.assert_allclose(plain, 9.0, rtol=1e-6)
    np.testing.assert_array_equal(weighted, plain)
    assert float(loss_per_sample(perfect, clean, noise, timesteps, config, COGVIDEOX)[0].sum()) == 0.0


def test_v_loss_is_the_clean_loss_over_the_noise_power():
    clean, noise, prediction = normal(0, (3, 4, 50))
    timesteps = jnp.asarray([50.0, 300.0, 700.0, 999.0])
    noisy = COGVIDEOX.add_noise(clean, noise, timesteps)
    v_loss, _ = loss_per_sample(prediction, clean, noise, timesteps, ObjectiveConfig(), COGVIDEOX)
    error = jnp.mean((COGVIDEOX.to_clean(prediction, noisy, timesteps, "v") - clean) ** 2, axis=1)
    np.testing.assert_allclose(error / COGVIDEOX.sigma(timesteps) ** 2, v_loss, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(bands=st.sampled_from([1, 4, 10]), split=st.sampled_from([1, 6, 9]), seed=st.integers(0, 99))
def test_bands_add_up(bands, split, seed):
    timesteps = timesteps_of(seed, 12).at[0].set(1000.0)
    losses = jnp.abs(normal(seed, (12,)))
    whole = loss_by_band(losses, timesteps, bands)
    assert len(whole) == bands
    np.testing.assert_allclose(sum(float(total) for total, _ in whole.values()), float(losses.sum()), rtol=1e-5)
    assert sum(float(count) for _, count in whole.values()) == 12
    first, second = (loss_by_band(losses[s], timesteps[s], bands) for s in (slice(split), slice(split, None)))
    for name, (total, count) in whole.items():
        assert float(count) == float(first[name][1] + second[name][1])
        np.testing.assert_allclose(total, first[name][0] + second[name][0], rtol=1e-5, atol=1e-6)


def test_a_band_is_independent_of_nans_in_other_bands():
    pairs = loss_by_band(jnp.asarray([1.0, 2.0, jnp.nan]), jnp.asarray([10.0, 240.0, 260.0]), 4)
    assert list(pairs) == ["loss_t0000_0250", "loss_t0250_0500", "loss_t0500_0750", "loss_t0750_1000"]
    assert tuple(map(float, pairs["loss_t0000_0250"])) == (3.0, 2.0)
    assert np.isnan(pairs["loss_t0250_0500"][0])


def test_invalid_objectives_are_refused():
    with pytest.raises(ConfigError, match="bands"):
        validate_tree(ObjectiveConfig(bands=3))
    with pytest.raises(ConfigError, match="std"):
        validate_tree(ObjectiveConfig(timesteps=TimestepConfig(std=0.0)))
    with pytest.raises(ValueError, match="choose target 'v'"):
        ObjectiveConfig(target="epsilon").check_schedule(COGVIDEOX.config)
    ObjectiveConfig(target="epsilon").check_schedule(STABLE.config)
