"""diffusers' `scheduler_config.json`: noise schedule, prediction and sampler in one file, written and read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jvgen.config import validate_tree
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import TIMESTEPS, Prediction, ScheduleConfig

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "sample": "clean", "v_prediction": "v"}
SAMPLERS = {"CogVideoXDDIMScheduler": "ddim", "CogVideoXDPMScheduler": "dpm_solver_sde"}
BETAS = {"scaled_linear": "cogvideox", "linear": "linear"}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The content of a scheduler file: how the network was trained, and how to sample from it."""

    schedule: ScheduleConfig
    prediction: Prediction
    sampler: SamplerConfig


def to_diffusers(scheduler: Scheduler) -> dict[str, Any] | None:
    """The `scheduler_config.json` of the diffusers scheduler that samples in the same way; None if there is none.

    A flow sampler with "trailing" spacing ends at 1 / steps, where diffusers' default list ends at 1 / 1000: give its
    `set_timesteps` the noise levels (`sigmas`) then. None where diffusers has no scheduler for schedule and prediction.
    """
    schedule, sampler = scheduler.schedule, scheduler.sampler
    if schedule.continuous:
        flow = {"num_train_timesteps": TIMESTEPS, "shift": schedule.flow_shift}
        velocity = scheduler.prediction == "velocity"
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **flow} if velocity else None
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if scheduler.prediction not in names:
        return None
    return {
        "_class_name": "CogVideoXDPMScheduler" if sampler.kind == "dpm_solver_sde" else "CogVideoXDDIMScheduler",
        "num_train_timesteps": TIMESTEPS,
        "beta_schedule": "linear" if schedule.kind == "linear" else "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "clip_sample": False,
        "prediction_type": names[scheduler.prediction],
        "rescale_betas_zero_snr": schedule.ends_in_pure_noise,
        "snr_shift_scale": schedule.effective_snr_shift,
        "set_alpha_to_one": sampler.final_step_clean,
        "steps_offset": sampler.steps_offset,
        "timestep_spacing": sampler.spacing,
    }


def from_diffusers(values: Mapping[str, Any], where: str) -> Scheduler:
    """The schedule, prediction and sampler of a `scheduler_config.json`; keys it lacks have diffusers' defaults.

    The sampler goes in strides, as diffusers' do; `steps` is left at its default. `clip_sample` is ignored, as the two
    classes do.

    Args:
      values: the parsed file.
      where: its path, for messages.

    Raises:
      ValueError: an unknown class, or unsupported values.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(
            f"{where}: the scheduler is of class {name!r}, which is not supported; "
            f"those of CogVideoX pipelines are {' and '.join(SAMPLERS)}."
        )
    rules = {
        "num_train_timesteps": (TIMESTEPS, (TIMESTEPS,)),
        "trained_betas": (None, (None,)),
        "beta_schedule": ("scaled_linear", tuple(BETAS)),
        "prediction_type": ("epsilon", tuple(PREDICTIONS)),
        "timestep_spacing": ("leading", ("leading", "linspace", "trailing")),
    }
    read = {key: values.get(key, default) for key, (default, _) in rules.items()}
    for key, (_, known) in rules.items():
        if read[key] not in known:
            listed = ", ".join(repr(value) for value in known)
            raise ValueError(f"{where}: {key} = {read[key]!r}; supported: {listed}.")
    scheduler = Scheduler(
        ScheduleConfig(
            kind=BETAS[read["beta_schedule"]],
            beta_start=values.get("beta_start", 0.00085),
            beta_end=values.get("beta_end", 0.012),
            snr_shift=values.get("snr_shift_scale", 3.0),
            zero_terminal=values.get("rescale_betas_zero_snr", False),
        ),
        PREDICTIONS[read["prediction_type"]],
        SamplerConfig(
            kind=SAMPLERS[name],
            spacing=read["timestep_spacing"],
            steps_offset=values.get("steps_offset", 0),
            final_step_clean=values.get("set_alpha_to_one", True),
            step_to="stride",
        ),
    )
    try:
        validate_tree(scheduler.schedule)
        validate_tree(scheduler.sampler)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return scheduler
