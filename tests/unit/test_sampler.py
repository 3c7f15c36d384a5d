"""Samplers recover known distributions, refuse invalid combinations, and give a slot the same noise in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import slot_normal
from jvgen.diffusion.sampler import SamplerConfig, coefficients, discrete_timesteps, grid, sample, trajectory
from jvgen.diffusion.schedule import ScheduleConfig

COGVIDEOX = ScheduleConfig(kind="cogvideox").build()
STABLE = ScheduleConfig(kind="scaled_linear").build()
FLOW = ScheduleConfig(kind="rectified_flow").build()
MEAN, DEVIATION = 0.7, 0.4


def exact(schedule, kind):
    """The best possible predictor when clean samples are normal with MEAN and DEVIATION."""

    def denoise(noisy, timesteps, scale):
        alpha, sigma = schedule.alpha(timesteps)[:, None], schedule.sigma(timesteps)[:, None]
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        clean = MEAN + gain * (noisy - alpha * MEAN)
        noise = (noisy - alpha * clean) / sigma
        return schedule.target(clean, noise, timesteps, kind)

    return denoise


@pytest.mark.parametrize(
    "schedule, prediction, sampler",
    [
        (COGVIDEOX, "v", SamplerConfig(steps=250)),
        (COGVIDEOX, "v", SamplerConfig(steps=250, eta=1.0)),
        (COGVIDEOX, "clean", SamplerConfig(steps=250, kind="dpm_solver_sde")),
        (COGVIDEOX, "v", SamplerConfig(steps=250, kind="dpm_solver")),
        (COGVIDEOX, "v", SamplerConfig(steps=250, kind="dpm_solver_sde", levels="sat")),
        (STABLE, "epsilon", SamplerConfig(steps=250)),
        (FLOW, "velocity", SamplerConfig(steps=250, kind="euler")),
        (ScheduleConfig(kind="rectified_flow", flow_shift=3.0).build(), "v", SamplerConfig(steps=250)),
    ],
)
def test_the_exact_predictor_recovers_the_distribution(key, schedule, prediction, sampler):
    noise = slot_normal(key, (64, 64))
    options = {"schedule": schedule, "sampler": sampler, "prediction": prediction, "key": jax.random.fold_in(key, 1)}
    result = jax.jit(lambda x: sample(exact(schedule, prediction), x, **options))(noise)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(result.std()) == pytest.approx(DEVIATION, abs=0.04)


def test_ddim_on_rectified_flow_is_euler(key):
    noise = slot_normal(key, (2, 3))
    results = [
        sample(exact(FLOW, "v"), noise, schedule=FLOW, sampler=SamplerConfig(kind=kind, steps=9), prediction="v")
        for kind in ("ddim", "euler")
    ]
    np.testing.assert_array_equal(*results)
    x, levels = noise, np.linspace(1, 1 / 9, 9)
    for level, arrival in zip(levels, np.append(levels[1:], 0.0), strict=True):
        timesteps = jnp.full((2,), 1000 * level, jnp.float32)
        x = x + (arrival - level) * exact(FLOW, "velocity")(x, timesteps, None)
    np.testing.assert_allclose(results[0], x, atol=1e-5)


@pytest.mark.parametrize("sampler", [SamplerConfig(steps=6, eta=0.8), SamplerConfig(steps=6, kind="dpm_solver_sde")])
def test_the_sample_of_a_slot_is_independent_of_its_batch(key, sampler):
    def run(slots):
        noise = slot_normal(key, (len(slots), 5), slots)
        denoise = exact(COGVIDEOX, "v")
        return sample(denoise, noise, schedule=COGVIDEOX, sampler=sampler, prediction="v", key=key, slots=slots)

    np.testing.assert_allclose(run(jnp.arange(2, 4)), run(jnp.arange(6))[2:4], atol=1e-6)


def test_the_scale_of_each_step_reaches_the_network():
    seen = jax.jit(
        lambda noise: trajectory(
            lambda noisy, timesteps, scale: jnp.full_like(noisy, scale),
            noise,
            schedule=COGVIDEOX,
            sampler=SamplerConfig(steps=50),
            prediction="clean",
            guidance=GuidanceConfig(kind="dynamic"),
        )
    )(jnp.zeros((1, 1)))[0]
    # The last prediction of the clean sample is the result: the last dynamic scale.
    assert float(seen[0, 0]) == pytest.approx(1.1234, abs=1e-4)


def test_the_last_step_ends_at_the_clean_sample_for_any_number_of_steps():
    for steps in (1, 2, 7, 30, 50):
        table = coefficients(SamplerConfig(steps=steps), COGVIDEOX, "v")
        assert table.noisy[-1] == 0.0 and table.clean[-1] == 1.0 and table.timesteps[0] == 999.0


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_fall_within_the_table(spacing):
    for steps in (1, 3, 7, 10, 28, 30, 50, 999, 1000):
        timesteps = discrete_timesteps(SamplerConfig(steps=steps, spacing=spacing))
        assert len(timesteps) == steps and timesteps.min() >= 0 and timesteps.max() <= 999
        assert (np.diff(timesteps) < 0).all()


def test_levels_of_the_sat_code():
    """Its last steps are read at the level of the timestep before; of 28 steps it rounds timesteps down."""
    levels = grid(SamplerConfig(levels="sat"), COGVIDEOX)
    table, _ = COGVIDEOX.levels(np.arange(1000))
    read = [int(np.flatnonzero(table == alpha)[0]) for alpha in levels.read_alpha]
    assert read == [*range(999, 178, -20), *range(158, 17, -20)]
    np.testing.assert_allclose(levels.alpha[:4], [0.0, 0.00522029, 0.01092453, 0.01713505], atol=1e-8)
    np.testing.assert_allclose(levels.alpha[-2:], [0.94562322, 0.97393978], atol=1e-7)
    assert levels.next_alpha[-1] == 1.0 and levels.next_sigma[-1] == 0.0
    down, near = (grid(SamplerConfig(steps=28, levels=name), COGVIDEOX).timesteps for name in ("sat", "schedule"))
    np.testing.assert_array_equal(down, np.floor(999 - np.arange(28) * 999 / 28 + 1e-9))
    assert (down != near).any()


@pytest.mark.parametrize(
    "schedule, prediction, sampler, words",
    [
        (COGVIDEOX, "v", SamplerConfig(kind="euler"), "rectified_flow"),
        (FLOW, "velocity", SamplerConfig(step_to="stride"), "step_to = 'stride': rectified flow does not read it"),
        (FLOW, "velocity", SamplerConfig(final_step_clean=False), "final_step_clean = False.*leave True"),
        (FLOW, "velocity", SamplerConfig(kind="dpm_solver_sde"), "euler"),
        (FLOW, "velocity", SamplerConfig(eta=0.5), "eta = 0"),
        (FLOW, "velocity", SamplerConfig(spacing="leading"), "trailing"),
        (FLOW, "epsilon", SamplerConfig(), "pure noise"),
        (COGVIDEOX, "epsilon", SamplerConfig(), "pure noise"),
        (COGVIDEOX, "v", SamplerConfig(steps=0), "steps"),
        (COGVIDEOX, "v", SamplerConfig(spacing="leading", steps=1000, steps_offset=1), "steps_offset"),
        (COGVIDEOX, "v", SamplerConfig(levels="sat", spacing="leading"), "spacing = 'trailing'"),
        (STABLE, "epsilon", SamplerConfig(spacing="linspace", steps=1), "timestep 0, .* set spacing = 'trailing'"),
        (COGVIDEOX, "v", SamplerConfig(spacing="leading", steps=1, steps_offset=1), "at timestep 1, which takes noise"),
        (STABLE, "v", SamplerConfig(levels="sat"), "zero_terminal = true"),
        (FLOW, "velocity", SamplerConfig(levels="sat"), "levels = 'schedule'"),
        (COGVIDEOX, "v", SamplerConfig(levels="sat", steps=1), "steps = 1: .* at least 2 steps"),
    ],
)
def test_invalid_combinations_are_refused(schedule, prediction, sampler, words):
    with pytest.raises(ValueError, match=words):
        coefficients(sampler, schedule, prediction)


def test_a_stochastic_sampler_requires_a_key():
    with pytest.raises(ValueError, match="key"):
        sample(
            exact(COGVIDEOX, "v"),
            jnp.zeros((1, 1)),
            schedule=COGVIDEOX,
            sampler=SamplerConfig(eta=1.0),
            prediction="v",
        )
