"""CogVideoX schedulers of diffusers, and the samplers of the SAT code, which RepVideo uses, over whole trajectories."""

import jax.numpy as jnp
import numpy as np
from case_fields import check_fields

from jvgen.diffusion.guidance import GuidanceConfig, guidance_scales, guided
from jvgen.diffusion.sampler import Grid, SamplerConfig, coefficients, discrete_timesteps, grid, trajectory
from jvgen.diffusion.schedule import ScheduleConfig

KINDS = {"ddim": "ddim", "dpm": "dpm_solver_sde"}
SAT_KINDS = {"ddim": "ddim", "sde_dpmpp2m": "dpm_solver_sde", "ode_dpmpp2m": "dpm_solver"}


def serves(name: str, config: dict) -> bool:
    return name.startswith("repvideo_samplers")


def run(case) -> None:
    check_fields(
        case.config, "config.json", read=("variant", "sat", "diffusers", "closed_form_model"), about=("comparison",)
    )
    check_fields(case.config["variant"], "variant", read=("ctx_gain", "x_gain"), about=("shape", "steps"))
    formula = "v(x, t, c) = x_gain*x + t/1000 + ctx_gain*c"
    assert case.config["closed_form_model"].startswith(formula), case.config["closed_form_model"]
    _run_diffusers(case)
    _run_sat(case)


def _run_sat(case) -> None:
    io = case.io
    for name, made in case.config["sat"].items():
        _, kind, steps = name.split(".")
        steps = int(steps.removeprefix("n"))
        check_fields(made, f"sat.{name}", read=("denoiser_config", "sampler_config"), about=("draws",))
        denoising, sampling = (made[f"{part}_config"]["params"] for part in ("denoiser", "sampler"))
        fixed = {"num_idx": 1000, "quantize_c_noise": False}
        parts = ("weighting_config", "scaling_config", "discretization_config")
        check_fields(denoising, f"sat.{name}.denoiser_config.params", read=parts, fixed=fixed)
        fixed, about = {"num_steps": steps}, ("verbose", "device")
        parts = ("discretization_config", "guider_config")
        check_fields(sampling, f"sat.{name}.sampler_config.params", read=parts, about=about, fixed=fixed)
        assert denoising["scaling_config"]["target"].endswith("VideoScaling"), denoising["scaling_config"]
        (shift,) = {part["discretization_config"]["params"]["shift_scale"] for part in (denoising, sampling)}
        schedule = ScheduleConfig(kind="cogvideox", snr_shift=float(shift)).build()
        guider = made["sampler_config"]["params"]["guider_config"]
        assert guider["target"].endswith("DynamicCFG") and guider["params"]["num_steps"] == steps
        scale, exponent = (float(guider["params"][name]) for name in ("scale", "exp"))
        guidance = GuidanceConfig(kind="dynamic", scale=scale, exponent=exponent)
        sampler = SamplerConfig(kind=SAT_KINDS[kind], steps=steps, levels="sat")
        # Their table and levels are float32.
        np.testing.assert_allclose(np.sqrt(schedule.alpha_bar), io["sat.table.sqrt_alpha_bar"], atol=2e-7)
        levels = grid(sampler, schedule)
        np.testing.assert_array_equal(levels.timesteps, io[f"{name}.timesteps"], err_msg=name)
        np.testing.assert_allclose(levels.alpha, io[f"{name}.sqrt_alpha_bar_sampler"], atol=2e-7, err_msg=name)
        np.testing.assert_allclose(levels.read_alpha, io[f"{name}.sqrt_alpha_bar_denoiser"], atol=2e-7, err_msg=name)
        scales = guidance_scales(guidance, levels.timesteps)
        np.testing.assert_allclose(scales, io[f"{name}.guidance_scale"], rtol=1e-9, err_msg=name)
        follow = _stochastic if kind == "sde_dpmpp2m" else _deterministic
        visited = follow(case, name, schedule, sampler, guidance)
        expected = io[f"{name}.trajectory"]
        _close(visited, expected[1:], name)
        noisy = np.concatenate([expected[:1], np.asarray(visited)[:-1]])
        _close(_clean(case, noisy, levels, scales), io[f"{name}.denoised"], f"{name}.denoised")


def _clean(case, noisy: np.ndarray, levels: Grid, scales: np.ndarray) -> np.ndarray:
    """The guided clean sample at every step of a trajectory."""
    found = []
    for step, (x, scale) in enumerate(zip(noisy, scales, strict=True)):
        timesteps = np.full(len(x), levels.timesteps[step])
        without, with_condition = (_model(case, x, timesteps, np.full(len(x), c)) for c in (0.0, 1.0))
        prediction = without + scale * (with_condition - without)
        found.append(levels.read_alpha[step] * x - levels.read_sigma[step] * prediction)
    return np.stack(found)


def _close(ours, theirs: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0, err_msg=name)


def _run_diffusers(case) -> None:
    values, io = case.config["diffusers"], case.io
    made = values["scheduler_kwargs"]
    read = ("scheduler_kwargs", "guidance_scale", "eta")
    check_fields(values, "diffusers", read=read, fixed={"use_dynamic_cfg": True})
    fixed = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
             "clip_sample": False}  # fmt: skip
    read = ("beta_start", "beta_end", "rescale_betas_zero_snr", "set_alpha_to_one", "snr_shift_scale", "steps_offset")
    check_fields(made, "diffusers.scheduler_kwargs", read=read, about=("timestep_spacing",), fixed=fixed)
    schedule = ScheduleConfig(
        kind="cogvideox",
        beta_start=made["beta_start"],
        beta_end=made["beta_end"],
        snr_shift=float(made["snr_shift_scale"]),
        zero_terminal=made["rescale_betas_zero_snr"],
    ).build()
    np.testing.assert_allclose(schedule.alpha_bar, io["diffusers.table.alpha_bar"], atol=1e-12, rtol=0)
    guidance = GuidanceConfig(kind="dynamic", scale=float(values["guidance_scale"]))
    runs = [name.removesuffix(".x_init") for name in io if name.startswith("diffusers.") and name.endswith(".x_init")]
    assert {name.split(".")[1] for name in runs} <= set(KINDS)
    for name in runs:
        _, kind, spacing, steps = name.split(".")
        sampler = SamplerConfig(
            kind=KINDS[kind],
            steps=int(steps.removeprefix("n")),
            spacing=spacing,
            eta=float(values["eta"]),
            steps_offset=made["steps_offset"],
            final_step_clean=made["set_alpha_to_one"],
            step_to="stride",
        )
        timesteps = discrete_timesteps(sampler)
        np.testing.assert_array_equal(timesteps, io[f"{name}.timesteps"], err_msg=name)
        scales = guidance_scales(guidance, timesteps)
        np.testing.assert_allclose(scales, io[f"{name}.guidance_scale"], rtol=1e-9, err_msg=name)
        follow = _deterministic if kind == "ddim" else _stochastic
        visited = follow(case, name, schedule, sampler, guidance)
        _close(visited, io[f"{name}.trajectory"][1:], name)


def _deterministic(case, name: str, schedule, sampler: SamplerConfig, guidance: GuidanceConfig) -> np.ndarray:
    start = case.io[f"{name}.x_init"]
    ones = jnp.ones((len(start),))
    denoise = guided(lambda x, t, c: _model(case, x, t, c), conditional=ones, unconditional=0 * ones)
    return trajectory(
        denoise, jnp.asarray(start), schedule=schedule, sampler=sampler, prediction="v", guidance=guidance, keep=True
    )[1]


def _stochastic(case, name: str, schedule, sampler: SamplerConfig, guidance: GuidanceConfig) -> np.ndarray:
    """The table of the sampler, run with the noise that was drawn there; the last draw of a step is the one used."""
    draws = dict(zip(case.io[f"{name}.noise_draw_step"].tolist(), case.io[f"{name}.noise_draws"], strict=True))
    table = coefficients(sampler, schedule, "v", guidance)
    noisy = case.io[f"{name}.x_init"].astype(np.float64)
    previous, visited = np.zeros_like(noisy), []
    for step in range(sampler.steps):
        row = {column: values[step] for column, values in table._asdict().items()}
        timesteps = np.full(len(noisy), row["timesteps"])
        without, with_condition = (_model(case, noisy, timesteps, np.full(len(noisy), c)) for c in (0.0, 1.0))
        prediction = without + row["guidance"] * (with_condition - without)
        clean = row["clean_of_noisy"] * noisy + row["clean_of_prediction"] * prediction
        noisy = row["noisy"] * noisy + row["clean"] * clean
        # SAT draws nothing for a step that adds nothing.
        noisy += row["previous_clean"] * previous + (row["noise"] * draws[step] if row["noise"] else 0.0)
        previous = clean
        visited.append(noisy)
    return np.stack(visited)


def _model(case, noisy, timesteps, condition):
    gains = case.config["variant"]
    shape = (-1,) + (1,) * (noisy.ndim - 1)
    return gains["x_gain"] * noisy + (timesteps / 1000 + gains["ctx_gain"] * condition).reshape(shape)
