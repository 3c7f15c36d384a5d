"""Whole sampling trajectories against diffusers' schedulers, with a network in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.diffusion.guidance import GuidanceConfig, guidance_scales, guided
from jvgen.diffusion.sampler import SamplerConfig, discrete_timesteps, step_noise, trajectory
from jvgen.diffusion.schedule import ScheduleConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

SHAPE = (2, 3, 4, 4, 2)
DIFFUSERS_NAMES = {"v": "v_prediction", "epsilon": "epsilon", "clean": "sample"}


def closed_form(noisy, timesteps, condition):
    """A network that depends on everything: `0.1 x + t / 1000 + 0.05 c`, the same for numpy, torch and jax arrays."""
    return 0.1 * noisy + timesteps / 1000 + 0.05 * condition


def ours(schedule, sampler, prediction, *, guidance=None, key=None):
    start = jnp.asarray(np.random.default_rng(7).normal(size=SHAPE), jnp.float32)
    condition = jnp.ones((SHAPE[0], 1, 1, 1, 1))
    denoise = guided(lambda x, t, c: closed_form(x, t.reshape(-1, 1, 1, 1, 1), c), condition, 0 * condition)
    run = jax.jit(
        lambda noise: trajectory(
            denoise,
            noise,
            schedule=schedule.build(),
            sampler=sampler,
            prediction=prediction,
            guidance=guidance or GuidanceConfig(scale=1.0),
            key=key,
            keep=True,
        )
    )
    result, kept, finite_steps, _ = run(start)
    np.testing.assert_array_equal(finite_steps, len(kept))
    np.testing.assert_array_equal(result, kept[-1])
    return start, np.asarray(kept)


def theirs(scheduler, start, steps, scales=None, **options):
    scheduler.set_timesteps(steps)
    noisy, kept = torch.tensor(np.array(start)), []
    scales = np.ones(len(scheduler.timesteps)) if scales is None else scales
    for scale, timestep in zip(scales, scheduler.timesteps, strict=True):
        number = float(timestep)
        without, with_condition = (closed_form(noisy, number, c) for c in (0.0, 1.0))
        prediction = without + float(scale) * (with_condition - without)
        extra = {name: function(len(kept)) for name, function in options.items()}
        noisy = scheduler.step(prediction, timestep, noisy, return_dict=False, **extra)[0]
        kept.append(noisy.numpy())
    return np.stack(kept)


def cogvideox_scheduler(shift, cls="CogVideoXDDIMScheduler", spacing="trailing", prediction="v"):
    return getattr(diffusers, cls)(
        prediction_type=DIFFUSERS_NAMES[prediction],
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
        timestep_spacing=spacing,
        clip_sample=False,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cogvideox_alpha_bar(shift):
    table = ScheduleConfig(kind="cogvideox", snr_shift=shift).build().alpha_bar
    np.testing.assert_allclose(table, cogvideox_scheduler(shift).alphas_cumprod.numpy(), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_stable_diffusion_alpha_bar(zero_terminal):
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal
    )
    table = ScheduleConfig(kind="scaled_linear", zero_terminal=zero_terminal).build().alpha_bar
    # diffusers computes this table in float32 and may leave a tiny last entry.
    np.testing.assert_allclose(table, scheduler.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_for_every_number_of_steps(spacing):
    scheduler = cogvideox_scheduler(1.0, spacing=spacing)
    different = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.numpy()
        # For some counts diffusers' float range is one entry too long; the extra entry is -1.
        if len(expected) == steps + 1 and expected[-1] == -1:
            expected = expected[:-1]
        if not np.array_equal(discrete_timesteps(SamplerConfig(steps=steps, spacing=spacing)), expected):
            different.append(steps)
    assert different == []


@pytest.mark.parametrize("prediction", ["v", "clean"])
@pytest.mark.parametrize(
    "spacing, steps, step_to", [("trailing", 50, "next"), ("trailing", 7, "stride"), ("linspace", 10, "stride")]
)
def test_cogvideox_ddim(spacing, steps, step_to, prediction):
    sampler = SamplerConfig(steps=steps, spacing=spacing, step_to=step_to)
    start, result = ours(ScheduleConfig(kind="cogvideox", snr_shift=3.0), sampler, prediction)
    expected = theirs(cogvideox_scheduler(3.0, spacing=spacing, prediction=prediction), start, steps)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("steps", [10, 50])
def test_cogvideox_ddim_with_dynamic_guidance(steps):
    guidance = GuidanceConfig(kind="dynamic", scale=6.0)
    start, result = ours(ScheduleConfig(kind="cogvideox"), SamplerConfig(steps=steps), "v", guidance=guidance)
    scales = guidance_scales(guidance, discrete_timesteps(SamplerConfig(steps=steps)))
    expected = theirs(cogvideox_scheduler(3.0), start, steps, scales)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("prediction, eta", [("epsilon", 0.0), ("v", 0.0), ("clean", 0.0), ("epsilon", 0.6)])
def test_stable_diffusion_ddim(prediction, eta, key):
    sampler = SamplerConfig(
        steps=20, spacing="leading", steps_offset=1, eta=eta, final_step_clean=False, step_to="stride"
    )
    start, result = ours(ScheduleConfig(kind="scaled_linear"), sampler, prediction, key=key)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=DIFFUSERS_NAMES[prediction],
    )
    options = {"eta": lambda step: eta}
    if eta:
        options["variance_noise"] = lambda step: torch.tensor(np.array(step_noise(key, jnp.int32(step), SHAPE)))
    expected = theirs(scheduler, start, 20, **options)
    # The float32 table of diffusers is the difference; noise predictions are divided by small numbers.
    np.testing.assert_allclose(result, expected, atol=2e-4 if prediction == "epsilon" else 5e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_flow_euler(shift, steps):
    schedule = ScheduleConfig(kind="rectified_flow", flow_shift=shift)
    start, result = ours(schedule, SamplerConfig(kind="euler", steps=steps, spacing="linspace"), "velocity")
    expected = theirs(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), start, steps)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("shift, steps, step_to", [(1.0, 20, "next"), (3.0, 20, "stride"), (3.0, 28, "stride")])
def test_dpm_solver_with_the_same_noise(shift, steps, step_to, key, monkeypatch):
    scheduler = cogvideox_scheduler(shift, "CogVideoXDPMScheduler")
    scheduler.set_timesteps(steps)
    start, result = ours(
        ScheduleConfig(kind="cogvideox", snr_shift=shift),
        SamplerConfig(kind="dpm_solver_sde", steps=steps, step_to=step_to),
        "v",
        key=key,
    )
    noisy, old, back, kept = torch.tensor(np.array(start)), None, None, []
    module = __import__(scheduler.__module__, fromlist=["randn_tensor"])
    for index, timestep in enumerate(scheduler.timesteps):
        drawn = torch.tensor(np.array(step_noise(key, jnp.int32(index), SHAPE)))
        monkeypatch.setattr(module, "randn_tensor", lambda *args, drawn=drawn, **kwargs: drawn)
        prediction = closed_form(noisy, float(timestep), 1.0)
        noisy, old = scheduler.step(prediction, old, timestep, back, noisy, return_dict=False)
        noisy, back = noisy.float(), timestep
        kept.append(noisy.numpy())
    np.testing.assert_allclose(result, np.stack(kept), atol=2e-5)


def test_forward_noising_and_v_target():
    schedule = ScheduleConfig(kind="cogvideox", snr_shift=1.0).build()
    scheduler = cogvideox_scheduler(1.0)
    clean, noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 5)), jnp.float32)
    timesteps = [0, 19, 500, 999]
    arguments = [torch.tensor(np.array(clean)), torch.tensor(np.array(noise)), torch.tensor(timesteps)]
    ours_t = jnp.asarray(timesteps, jnp.float32)
    np.testing.assert_allclose(schedule.add_noise(clean, noise, ours_t), scheduler.add_noise(*arguments), atol=1e-6)
    velocity = schedule.target(clean, noise, ours_t, "v")
    np.testing.assert_allclose(velocity, scheduler.get_velocity(*arguments), atol=1e-6)
