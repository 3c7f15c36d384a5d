"""Samplers: from noise to a clean sample in a few steps, as one `lax.scan` over a table of coefficients.

Every sampler here is linear in four arrays, so a step is
`next = a noisy + b clean + c previous_clean + d fresh_noise`, where `clean` is the clean sample that the prediction
implies. The coefficients are computed in float64 with numpy, where their limits (no signal, no noise) are exact.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jvgen.config import Config
from jvgen.diffusion.guidance import Denoise, GuidanceConfig, guidance_scales
from jvgen.diffusion.objective import slot_normal
from jvgen.diffusion.schedule import (
    TIMESTEPS,
    Prediction,
    Schedule,
    ScheduleConfig,
    alpha_bar_table,
    clean_factors,
    zero_terminal_rescale,
)
from jvgen.finite import rows_are_finite
from jvgen.value_rules import Bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """Sampler and its timesteps.

    Attributes:
      kind: "ddim" (Song et al. 2021), "euler" (rectified flow only), "dpm_solver_sde" (DPM-Solver++ 2M, stochastic) or
        "dpm_solver" (the same without noise), the last two for discrete schedules only.
      steps: network evaluations, twice as many with guidance.
      spacing: "trailing" (starts at 999, required for zero terminal SNR), "leading" or "linspace", each as in
        diffusers. Rectified flow: "trailing" is linspace(1, 1/steps), "linspace" is the default of diffusers.
      eta: of ddim: 0 is deterministic, 1 adds as much noise as the ancestral sampler.
      steps_offset: added to the timesteps of "leading".
      final_step_clean: the last step ends at the clean sample; false: at timestep 0 (Stable Diffusion's scheduler
        files).
      step_to: "next" (each step ends at the next timestep in the list) or "stride" (at t - 1000 // steps, as in the
        discrete schedulers of diffusers; the same when steps divides 1000 and spacing is trailing or leading).
      levels: signal levels of the "schedule", or "sat": as in the SAT code, which RepVideo samples with. There
        timesteps are rounded down, levels are rescaled to zero terminal SNR over the list of steps only, and
        predictions are interpreted at the nearest level of the schedule. "sat" needs zero terminal SNR, and the
        defaults of spacing and step_to.
    """

    kind: Literal["ddim", "euler", "dpm_solver_sde", "dpm_solver"] = "ddim"
    steps: Annotated[int, Bounds(at_least=1, at_most=TIMESTEPS)] = 50
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    eta: Annotated[float, Bounds(at_least=0, at_most=1, fix="0 for a deterministic sampler")] = 0.0
    steps_offset: Annotated[int, Bounds(at_least=0, below=TIMESTEPS)] = 0
    final_step_clean: bool = True
    step_to: Literal["next", "stride"] = "next"
    levels: Literal["schedule", "sat"] = "schedule"

    renamed_fields: ClassVar[dict[str, str]] = {"goes_to": "step_to", "ends_clean": "final_step_clean"}

    def validate(self) -> None:
        if self.eta and self.kind != "ddim":
            raise ValueError(f"eta = {self.eta}: only ddim reads it; set eta = 0 for {self.kind}.")
        if self.levels == "sat" and (self.spacing, self.step_to, self.final_step_clean) != ("trailing", "next", True):
            raise ValueError(
                "levels = 'sat': leave spacing = 'trailing', step_to = 'next' and final_step_clean = true."
            )

    @property
    def needs_key(self) -> bool:
        """True if steps add fresh noise."""
        return self.eta > 0 or self.kind == "dpm_solver_sde"


class Coefficients(NamedTuple):
    """One row per step, float64: `clean = clean_of_noisy noisy + clean_of_prediction prediction`, then the factors."""

    timesteps: np.ndarray
    guidance: np.ndarray
    clean_of_noisy: np.ndarray
    clean_of_prediction: np.ndarray
    noisy: np.ndarray
    clean: np.ndarray
    previous_clean: np.ndarray
    noise: np.ndarray


class Grid(NamedTuple):
    """The raw timestep, the levels at which each step starts, and the levels at which it ends: arrays over steps.

    `read_alpha` and `read_sigma` are the levels at which predictions are interpreted; None for those of the step.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    next_alpha: np.ndarray
    next_sigma: np.ndarray
    read_alpha: np.ndarray | None = None
    read_sigma: np.ndarray | None = None


def discrete_timesteps(config: SamplerConfig) -> np.ndarray:
    """Timesteps of the discrete schedules in the order of sampling, int64."""
    if config.spacing == "linspace":
        return np.linspace(0, TIMESTEPS - 1, config.steps).round()[::-1].astype(np.int64)
    if config.spacing == "leading":
        stride = TIMESTEPS // config.steps
        return (np.arange(config.steps) * stride)[::-1].astype(np.int64) + config.steps_offset
    # A float range, because its rounding decides ties as diffusers does; a possible last timestep of -1 is cut off.
    return np.round(np.arange(TIMESTEPS, 0, -TIMESTEPS / config.steps)[: config.steps]).astype(np.int64) - 1


def flow_levels(config: SamplerConfig, shift: float) -> np.ndarray:
    """Noise levels of rectified flow in the order of sampling, float64, from 1 down, without the final 0."""
    if config.spacing == "leading":
        raise ValueError("spacing = 'leading': rectified flow starts at pure noise; choose 'trailing' or 'linspace'.")
    last = 1.0 / config.steps
    if config.spacing == "linspace":
        last = shift / TIMESTEPS / (1.0 + (shift - 1.0) / TIMESTEPS)
    fraction = np.linspace(1.0, last, config.steps)
    return shift * fraction / (1.0 + (shift - 1.0) * fraction)


def grid(config: SamplerConfig, schedule: Schedule) -> Grid:
    """The levels that a sampler visits."""
    if schedule.config.continuous:
        sigma = flow_levels(config, schedule.config.flow_shift)
        arrival = np.append(sigma[1:], 0.0)
        return Grid(sigma * TIMESTEPS, 1.0 - sigma, sigma, 1.0 - arrival, arrival)
    if config.levels == "sat":
        return sat_grid(config.steps, schedule)
    timesteps = discrete_timesteps(config)
    if config.steps == 1 and config.spacing != "trailing":
        raise ValueError(
            f"steps = 1, spacing = {config.spacing!r}: the only step would be at timestep {timesteps[0]}, which takes "
            "noise for a clip; set spacing = 'trailing', or take more steps."
        )
    if timesteps[0] >= TIMESTEPS:
        raise ValueError(
            f"steps_offset = {config.steps_offset}: leads to timestep {timesteps[0]}, above the maximum of 999."
        )
    stride = timesteps - TIMESTEPS // config.steps
    arrival = stride if config.step_to == "stride" else np.append(timesteps[1:], -1)
    alpha, sigma = schedule.levels(timesteps)
    next_alpha, next_sigma = schedule.levels(np.maximum(arrival, 0))
    if config.final_step_clean:
        next_alpha, next_sigma = np.where(arrival < 0, 1.0, next_alpha), np.where(arrival < 0, 0.0, next_sigma)
    return Grid(timesteps.astype(np.float64), alpha, sigma, next_alpha, next_sigma)


def sat_grid(steps: int, schedule: Schedule) -> Grid:
    """The levels that the SAT code visits: see `SamplerConfig.levels`."""
    if not schedule.config.ends_in_pure_noise:
        raise ValueError("levels = 'sat': needs a schedule with zero terminal SNR; set zero_terminal = true.")
    if steps < 2:
        raise ValueError(
            f"levels = 'sat', steps = {steps}: levels are rescaled between the first step and the last; take at least "
            "2 steps, or levels = 'schedule'."
        )
    timesteps = np.linspace(TIMESTEPS - 1, 0, steps, endpoint=False).astype(np.int64)
    before_rescale = alpha_bar_table(schedule.config.replace(zero_terminal=False))
    # The rescale takes a falling list, which starts with the least noisy step.
    power = zero_terminal_rescale(before_rescale[timesteps[::-1]])[::-1]
    alpha, sigma = np.sqrt(power), np.sqrt(1.0 - power)
    table, _ = schedule.levels(np.arange(TIMESTEPS))
    nearest = np.abs(alpha[:, None] - table).argmin(axis=1)
    read_alpha, read_sigma = schedule.levels(nearest)
    following = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    return Grid(timesteps.astype(np.float64), alpha, sigma, *following, read_alpha, read_sigma)


def check_schedule(config: SamplerConfig, schedule: ScheduleConfig) -> None:
    """Raise ValueError for a sampler that does not support the noise schedule."""
    if schedule.continuous and (config.kind not in ("euler", "ddim") or config.eta or config.levels == "sat"):
        raise ValueError(
            f"sampler {config.kind!r}, eta = {config.eta}, levels = {config.levels!r}: rectified flow needs 'euler' or "
            "'ddim', eta = 0, levels = 'schedule'."
        )
    for name in ("steps_offset", "final_step_clean", "step_to") if schedule.continuous else ():
        value, default = getattr(config, name), getattr(SamplerConfig(), name)
        if value != default:
            raise ValueError(f"sampler {name} = {value!r}: rectified flow does not read it; leave {default!r}.")
    if config.kind == "euler" and not schedule.continuous:
        raise ValueError(f"sampler 'euler': needs rectified_flow, not {schedule.kind!r}; choose 'ddim'.")


def first_step(steps: int, strength: float) -> int:
    """The step that a sampler of `steps` steps begins with for a clip that is changed by `strength` in 0..1.

    The last `int(steps * strength)` steps run, as in diffusers: 1 is all of them, from pure noise.

    Raises:
      ValueError: a strength outside of 0..1, or one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength = {strength}: must be above 0 and at most 1; 1 starts from pure noise.")
    left = int(steps * strength)
    if not left:
        raise ValueError(
            f"strength = {strength} of {steps} steps leaves none: take at least {1 / steps:.3g}, or more steps."
        )
    return steps - left


def coefficients(
    config: SamplerConfig,
    schedule: Schedule,
    prediction: Prediction,
    guidance: GuidanceConfig | None = None,
    *,
    first: int = 0,
) -> Coefficients:
    """The table of a sampler.

    Args:
      first: index of the first step that runs, see `first_step`; the table has the steps from there on.

    Raises:
      ValueError: a sampler that does not support the schedule, or a prediction that does not determine the clean
        sample at some timestep.
    """
    config.validate()
    check_schedule(config, schedule.config)
    levels = Grid(*(None if column is None else column[first:] for column in grid(config, schedule)))
    if prediction == "epsilon" and (levels.alpha <= 0).any():
        raise ValueError("prediction 'epsilon': the first timestep is pure noise; train 'v' or drop zero_terminal.")
    scales = guidance_scales(guidance or GuidanceConfig(kind="none"), levels.timesteps)
    if config.kind in ("dpm_solver_sde", "dpm_solver"):
        # With strides that do not add up to 1000, the last step ends at a noisy sample and is an ordinary step.
        ends = config.step_to == "next" or int(levels.timesteps[-1]) < TIMESTEPS // config.steps
        factors = _dpm_solver_factors(levels, ends=ends, stochastic=config.kind == "dpm_solver_sde")
    else:
        factors = _ddim_factors(levels, config.eta)
    read = (levels.alpha, levels.sigma) if levels.read_alpha is None else (levels.read_alpha, levels.read_sigma)
    table = Coefficients(levels.timesteps, scales, *clean_factors(*read, prediction), *factors)
    assert all(np.isfinite(column).all() for column in table), f"sampler table with infinities: {config}"
    return table


def partly_noised(
    clean: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    *,
    sampler: SamplerConfig,
    schedule: Schedule,
    first: int,
) -> Float[Array, "B ..."]:
    """Clean samples with noise as at the start of step `first` of a sampler, float32."""
    levels = grid(sampler, schedule)
    alpha, sigma = np.float32(levels.alpha[first]), np.float32(levels.sigma[first])
    return alpha * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def _ddim_factors(levels: Grid, eta: float) -> tuple[np.ndarray, ...]:
    """Song et al. 2021, eq. 12, with (noisy - alpha clean) / sigma for the noise. For rectified flow it is Euler."""
    _, alpha, sigma, next_alpha, next_sigma, *_ = levels
    ratio = (next_sigma / sigma) ** 2 * (1.0 - (alpha / np.maximum(next_alpha, 1e-12)) ** 2)
    std = eta * np.sqrt(np.maximum(ratio, 0.0)) if eta else np.zeros_like(alpha)
    direction = np.sqrt(np.maximum(next_sigma**2 - std**2, 0.0))
    noisy = direction / sigma
    return noisy, next_alpha - alpha * noisy, np.zeros_like(alpha), std


def _dpm_solver_factors(levels: Grid, *, ends: bool, stochastic: bool) -> tuple[np.ndarray, ...]:
    """DPM-Solver++(2M) and its SDE (Lu et al. 2022), as in CogVideoX.

    First order on the first step and, with `ends`, on the last.

    With step sizes h = log-SNR differences, exp(-h) is a ratio of levels and needs no logarithm of zero.
    """
    _, alpha, sigma, next_alpha, next_sigma, *_ = levels
    with np.errstate(divide="ignore"):
        log_snr, next_log_snr = np.log(alpha / sigma), np.log(next_alpha / np.maximum(next_sigma, 1e-300))
    decay = (alpha * next_sigma) / (sigma * next_alpha)  # exp(-h), 0 when either end is pure
    noisy = next_sigma / sigma * (decay if stochastic else 1.0)
    clean = next_alpha * (1.0 - (decay**2 if stochastic else decay))
    noise = next_sigma * np.sqrt(1.0 - decay**2) * (1.0 if stochastic else 0.0)
    blend = np.zeros_like(alpha)  # 1 / (2 r), the weight of the previous estimate; 0 after a step of infinite size
    for k in range(1, len(alpha) - ends):
        blend[k] = 0.5 * (next_log_snr[k] - log_snr[k]) / (log_snr[k] - log_snr[k - 1])
    return noisy, clean * (1.0 + blend), -clean * blend, noise


def sample(
    denoise: Denoise,
    noise: Float[Array, "B ..."],
    *,
    schedule: Schedule,
    sampler: SamplerConfig,
    prediction: Prediction,
    guidance: GuidanceConfig | None = None,
    key: Key[Array, ""] | None = None,
    slots: Int[Array, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """Run a sampler. Pure; trace it under `jax.jit`.

    Args:
      denoise: `(noisy float32 [B ...], timesteps float32 [B], scale float32 scalar) -> prediction`; made by
        `jvgen.diffusion.guidance.guided` or `unguided`.
      noise: standard normal start (`slot_normal`).
      schedule, prediction: what the network was trained with.
      sampler: method and steps.
      guidance: scale passed to `denoise` at each step; None passes 1.
      key: for samplers that add noise (`SamplerConfig.needs_key`).
      slots: indices of the samples in a larger set, so that each has its own noise; default 0..B-1.

    Returns:
      Clean samples, float32.
    """
    return trajectory(
        denoise,
        noise,
        schedule=schedule,
        sampler=sampler,
        prediction=prediction,
        guidance=guidance,
        key=key,
        slots=slots,
    ).result


class Trajectory(NamedTuple):
    """What a sampler made.

    Attributes:
      result: clean samples, float32.
      kept: the result of every step, if asked for.
      finite_steps: per row of the batch the steps, from the first, whose result is finite, int32 `B`. NaN and infinity
        stay in a row to the end.
      steps: of the sampler.
    """

    result: Float[Array, "B ..."]
    kept: Any
    finite_steps: Int[Array, "B"]
    steps: int


def trajectory(
    denoise: Denoise,
    noise: Float[Array, "B ..."],
    *,
    schedule: Schedule,
    sampler: SamplerConfig,
    prediction: Prediction,
    guidance: GuidanceConfig | None = None,
    key: Key[Array, ""] | None = None,
    slots: Int[Array, "B"] | None = None,
    keep: bool = False,
    first: int = 0,
) -> Trajectory:
    """As `sample`, with the number of finite steps; with `keep` also the result of every step, `S B ...`.

    With `first`, `noise` is the input of that step (`partly_noised`), and the steps before it are left out.
    """
    if sampler.needs_key and key is None:
        raise ValueError(f"sampler {sampler.kind!r} with eta = {sampler.eta} adds noise: give `key`.")
    rows = table_rows(coefficients(sampler, schedule, prediction, guidance, first=first))

    def step(carry: tuple[Array, Array], row: dict[str, Array]) -> tuple[tuple[Array, Array], Array | None]:
        fresh = step_noise(key, row["step"], noise.shape, slots) if sampler.needs_key else None
        arrived, clean = advance(denoise, row, *carry, fresh)
        return (arrived, clean), (arrived if keep else None)

    return run_steps(step, noise, rows)


def run_steps(
    step: Callable[[tuple[Array, Array], dict[str, Array]], tuple[tuple[Array, Array], Any]],
    noise: Float[Array, "B ..."],
    rows: dict[str, Array],
) -> Trajectory:
    """Scan a sampler's step over its rows.

    Args:
      step: `((noisy, previous estimate), row) -> ((noisy, estimate), what to keep)`.
      noise: start.
      rows: columns over steps, see `table_rows`.
    """

    def counted(carry: tuple[tuple[Array, Array], Array], row: dict[str, Array]) -> tuple[tuple, Any]:
        state, finite_steps = carry
        state, kept = step(state, row)
        return (state, finite_steps + rows_are_finite(state[0]).astype(jnp.int32)), kept

    start = noise.astype(jnp.float32)
    none = jnp.zeros(start.shape[:1], jnp.int32)
    ((result, _), finite_steps), kept = jax.lax.scan(counted, ((start, jnp.zeros_like(start)), none), rows)
    return Trajectory(result, kept, finite_steps, len(rows["timesteps"]))


def table_rows(table: Coefficients) -> dict[str, Array]:
    """The table as float32 columns for `lax.scan`, with the index of each step as "step"."""
    rows = {name: jnp.asarray(column.astype(np.float32)) for name, column in table._asdict().items()}
    return {**rows, "step": jnp.arange(len(table.timesteps))}


def advance(
    denoise: Denoise,
    row: dict[str, Array],
    noisy: Float[Array, "B ..."],
    previous: Float[Array, "B ..."],
    fresh: Float[Array, "B ..."] | None,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """One step of a sampler, for `trajectory` and for Python loops.

    Args:
      denoise: see `sample`.
      row: scalars, one row of `table_rows`.
      noisy: input of the step, float32.
      previous: the estimate of the clean sample in the previous step; zeros at the first step.
      fresh: `step_noise` of this step; None for samplers that add no noise.

    Returns:
      The result of the step, and its estimate of the clean sample.
    """
    timesteps = jnp.broadcast_to(row["timesteps"], noisy.shape[:1])
    predicted = denoise(noisy, timesteps, row["guidance"]).astype(jnp.float32)
    clean = row["clean_of_noisy"] * noisy + row["clean_of_prediction"] * predicted
    arrived = row["noisy"] * noisy + row["clean"] * clean + row["previous_clean"] * previous
    return (arrived if fresh is None else arrived + row["noise"] * fresh), clean


def step_noise(
    key: Key[Array, ""], step: Int[Array, ""], shape: tuple[int, ...], slots: Int[Array, "B"] | None = None
) -> Float[Array, "B ..."]:
    """The noise that a stochastic sampler adds at a step."""
    return slot_normal(jax.random.fold_in(key, step), shape, slots)
