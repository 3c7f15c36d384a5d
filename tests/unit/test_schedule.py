"""Schedule tables against published numbers, and round trips between kinds of prediction."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvgen.config import ConfigError, validate_tree
from jvgen.diffusion.schedule import ScheduleConfig, zero_terminal_rescale

# Float64 cumulative signal power of CogVideoX's schedules (CogVideoX-2B: shift 3; 5B and 1.5: shift 1).
COGVIDEOX_ALPHA_BAR = {
    3.0: {
        0: 0.9974543276430069, 19: 0.9465729792377547, 111: 0.699592995320704, 499: 0.09596956169073541,
        888: 0.0012508661706538465, 979: 2.7194360400217652e-05, 998: 6.230788467394798e-08, 999: 0.0,
    },
    1.0: {
        0: 0.99915, 19: 0.9810104569288466, 111: 0.8719404004967952, 499: 0.24235916655614523,
        888: 0.00391044350467382, 979: 8.578784340054837e-05, 998: 1.967888056621291e-07, 999: 0.0,
    },
}  # fmt: skip
SCHEDULES = {
    "stable_diffusion": ScheduleConfig(kind="scaled_linear"),
    "cogvideox": ScheduleConfig(kind="cogvideox"),
    "flow": ScheduleConfig(kind="rectified_flow"),
}
KINDS = ("epsilon", "v", "clean", "velocity")


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shift", sorted(COGVIDEOX_ALPHA_BAR))
def test_cogvideox_table_has_the_published_numbers(shift):
    table = ScheduleConfig(kind="cogvideox", snr_shift=shift).build().alpha_bar
    for timestep, expected in COGVIDEOX_ALPHA_BAR[shift].items():
        assert table[timestep] == pytest.approx(expected, rel=1e-9, abs=1e-15), timestep


def test_cogvideox_defaults_to_shift_three_and_ends_in_pure_noise():
    schedule = ScheduleConfig(kind="cogvideox").build()
    assert schedule.alpha_bar[499] == pytest.approx(COGVIDEOX_ALPHA_BAR[3.0][499], rel=1e-9)
    last = jnp.asarray([999.0])
    assert float(schedule.alpha(last)[0]) == 0.0 and float(schedule.sigma(last)[0]) == 1.0


def test_stable_diffusion_table_and_its_last_entry():
    schedule = ScheduleConfig(kind="scaled_linear").build()
    assert schedule.alpha_bar[0] == pytest.approx(1 - 0.00085, rel=1e-12)
    assert schedule.alpha_bar[999] == pytest.approx(0.0046601, rel=1e-4)
    rescaled = ScheduleConfig(kind="scaled_linear", zero_terminal=True).build().alpha_bar
    np.testing.assert_allclose(rescaled, zero_terminal_rescale(schedule.alpha_bar))
    assert rescaled[-1] == 0.0 and rescaled[0] == pytest.approx(schedule.alpha_bar[0])


def test_flow_levels_are_continuous():
    schedule = SCHEDULES["flow"].build()
    timesteps = jnp.asarray([0.0, 250.5, 1000.0])
    np.testing.assert_allclose(schedule.sigma(timesteps), [0.0, 0.2505, 1.0], rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha(timesteps), [1.0, 0.7495, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_device_tables_agree_with_numpy_levels(name):
    schedule = SCHEDULES[name].build()
    timesteps = np.arange(0, 1000, 37)
    alpha, sigma = schedule.levels(timesteps)
    device = jnp.asarray(timesteps, jnp.float32)
    np.testing.assert_allclose(schedule.alpha(device), alpha, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(schedule.sigma(device), sigma, rtol=1e-6, atol=1e-7)


def test_noising_keeps_the_variance_and_broadcasts_over_any_rank():
    schedule = SCHEDULES["cogvideox"].build()
    clean, noise = normal(0, (2, 5, 2, 16, 16, 4))
    timesteps = jnp.asarray([0.0, 250.0, 500.0, 998.0, 999.0])
    noisy = schedule.add_noise(clean, noise, timesteps)
    np.testing.assert_allclose(jnp.var(noisy, axis=(1, 2, 3, 4)), 1.0, atol=0.1)
    np.testing.assert_array_equal(noisy[4], noise[4])
    expected = np.sqrt(schedule.alpha_bar[500]) * clean[2] + np.sqrt(1 - schedule.alpha_bar[500]) * noise[2]
    np.testing.assert_allclose(noisy[2], expected, atol=1e-5)


@settings(max_examples=24, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    source=st.sampled_from(KINDS),
    destination=st.sampled_from(KINDS),
    timestep=st.integers(20, 800),
    seed=st.integers(0, 1000),
)
def test_conversions_round_trip_and_agree_with_targets(name, source, destination, timestep, seed):
    schedule = SCHEDULES[name].build()
    clean, noise = normal(seed, (2, 2, 3))
    timesteps = jnp.full((2,), float(timestep))
    noisy = schedule.add_noise(clean, noise, timesteps)
    prediction = schedule.target(clean, noise, timesteps, source)
    converted = schedule.convert(prediction, noisy, timesteps, source, destination)
    np.testing.assert_allclose(converted, schedule.target(clean, noise, timesteps, destination), atol=1e-3)
    back = schedule.convert(converted, noisy, timesteps, destination, source)
    np.testing.assert_allclose(back, prediction, atol=2e-3)


@pytest.mark.parametrize("name", ["cogvideox", "flow"])
@pytest.mark.parametrize("kind", ["v", "velocity"])
def test_pure_noise_still_gives_a_finite_clean_sample(name, kind):
    schedule = SCHEDULES[name].build()
    clean, noise = jnp.ones((1, 4)), jnp.full((1, 4), -2.0)
    last = jnp.asarray([1000.0 if name == "flow" else 999.0])
    prediction = schedule.target(clean, noise, last, kind)
    recovered = schedule.to_clean(prediction, schedule.add_noise(clean, noise, last), last, kind)
    np.testing.assert_allclose(recovered, clean, atol=1e-6)


def test_low_precision_inputs_are_computed_in_float32():
    schedule = SCHEDULES["cogvideox"].build()
    clean = jnp.ones((1, 2), jnp.bfloat16)
    assert schedule.add_noise(clean, clean, jnp.asarray([10.0])).dtype == jnp.float32


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"kind": "rectified_flow", "snr_shift": 3.0}, "flow_shift"),
        ({"kind": "cogvideox", "flow_shift": 3.0}, "snr_shift"),
        ({"kind": "cogvideox", "snr_shift": -1.0}, "positive"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
    ],
)
def test_invalid_settings_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        validate_tree(ScheduleConfig(**fields))
