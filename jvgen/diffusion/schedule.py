"""Noise schedules: signal and noise levels by timestep, and conversions between kinds of prediction.

A noisy sample is `alpha(t) * clean + sigma(t) * noise`. Timesteps are raw float32 numbers on the scale of 1000 that the
network is conditioned on: whole numbers 0..999 for the discrete schedules, any number in [0, 1000] for rectified flow.
Tables are computed in float64 with numpy and looked up on the device in float32.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.value_rules import Bounds

TIMESTEPS = 1000

Prediction = Literal["epsilon", "v", "clean", "velocity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Noise schedule.

    Attributes:
      kind: "scaled_linear" (Stable Diffusion), "linear" (evenly spaced betas: AnimateDiff, CVD), "cogvideox" (the betas
        of scaled_linear, SNR shift, zero terminal SNR) or "rectified_flow" (alpha = 1 - t / 1000, sigma = t / 1000).
      beta_start, beta_end: first and last beta of the discrete schedules.
      snr_shift: alpha_bar / (s + (1 - s) alpha_bar); more noise for s > 1. None: 3 for cogvideox (CogVideoX-2B;
        5B and 1.5 have 1), 1 for the others.
      zero_terminal: rescale sqrt(alpha_bar) so that timestep 999 is pure noise. None: true for cogvideox only.
      flow_shift: of rectified flow: samplers visit s u / (1 + (s - 1) u) for evenly spaced u.
    """

    kind: Literal["scaled_linear", "linear", "cogvideox", "rectified_flow"] = "cogvideox"
    beta_start: Annotated[float, Bounds(above=0, below=1)] = 0.00085
    beta_end: Annotated[float, Bounds(above=0, below=1)] = 0.012
    snr_shift: Annotated[float, Bounds(above=0, at_most=1e6, fix="1 for no shift")] | None = None
    zero_terminal: bool | None = None
    flow_shift: Annotated[float, Bounds(above=0, at_most=1e6, fix="1 for no shift")] = 1.0

    def validate(self) -> None:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start = {self.beta_start}, beta_end = {self.beta_end}: must rise; exchange them.")
        if self.continuous and (self.snr_shift is not None or self.zero_terminal is not None):
            raise ValueError("rectified_flow has no snr_shift and no zero_terminal: leave them none, use flow_shift.")
        if not self.continuous and self.flow_shift != 1.0:
            raise ValueError(
                f"flow_shift = {self.flow_shift}: only rectified_flow reads it; {self.kind} has snr_shift."
            )

    @property
    def continuous(self) -> bool:
        """True for rectified flow: timesteps are any number in [0, 1000]."""
        return self.kind == "rectified_flow"

    @property
    def effective_snr_shift(self) -> float:
        """`snr_shift`, or what None stands for."""
        return self.snr_shift if self.snr_shift is not None else (3.0 if self.kind == "cogvideox" else 1.0)

    @property
    def ends_in_pure_noise(self) -> bool:
        """True if the last timestep has no signal: noise predicted there does not determine the clean sample."""
        return self.continuous or (self.zero_terminal if self.zero_terminal is not None else self.kind == "cogvideox")

    def build(self) -> "Schedule":
        """The schedule with its tables."""
        self.validate()
        return Schedule(self)


def alpha_bar_table(config: ScheduleConfig) -> np.ndarray:
    """Cumulative signal power of the 1000 discrete timesteps, float64, falling from nearly 1.

    The SNR shift comes before the zero-terminal rescale; the other order gives another table (section 2.3 of the
    CogVideoX paper, after Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed").
    """
    assert not config.continuous, "rectified flow has no table"
    shift = config.effective_snr_shift
    power = 1 if config.kind == "linear" else 2
    ends = (beta ** (1 / power) for beta in (config.beta_start, config.beta_end))
    betas = np.linspace(*ends, TIMESTEPS, dtype=np.float64) ** power
    alpha_bar = np.cumprod(1.0 - betas)
    alpha_bar = alpha_bar / (shift + (1.0 - shift) * alpha_bar)
    return zero_terminal_rescale(alpha_bar) if config.ends_in_pure_noise else alpha_bar


def zero_terminal_rescale(alpha_bar: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the last entry is 0 and the first is unchanged (Lin et al. 2024, alg. 1).

    Takes any falling list: the SAT code of CogVideoX applies it to the few steps of a sampler.
    """
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Signal and noise levels, forward noising, and conversions between kinds of prediction.

    All methods compute in float32 and are pure. `timesteps` is `B`, arrays are `B ...`.
    """

    config: ScheduleConfig

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """float64 table of the discrete schedules, by timestep."""
        return alpha_bar_table(self.config)

    def levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) in float64 with numpy, for coefficient tables."""
        if self.config.continuous:
            sigma = np.asarray(timesteps, np.float64) / TIMESTEPS
            return 1.0 - sigma, sigma
        power = self.alpha_bar[np.asarray(timesteps, np.int64)]
        return np.sqrt(power), np.sqrt(1.0 - power)

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        alpha, sigma = self.levels(np.arange(TIMESTEPS))
        return alpha.astype(np.float32), sigma.astype(np.float32)

    def alpha(self, timesteps: Float[Array, "B"]) -> Float[Array, "B"]:
        """Factor of the clean sample."""
        if self.config.continuous:
            return 1.0 - timesteps.astype(jnp.float32) / TIMESTEPS
        return jnp.asarray(self._tables[0])[timesteps.astype(jnp.int32)]

    def sigma(self, timesteps: Float[Array, "B"]) -> Float[Array, "B"]:
        """Factor of the noise."""
        if self.config.continuous:
            return timesteps.astype(jnp.float32) / TIMESTEPS
        return jnp.asarray(self._tables[1])[timesteps.astype(jnp.int32)]

    def add_noise(
        self, clean: Float[Array, "B ..."], noise: Float[Array, "B ..."], timesteps: Float[Array, "B"]
    ) -> Float[Array, "B ..."]:
        """`alpha * clean + sigma * noise`, float32."""
        alpha, sigma = self._broadcast(timesteps, clean.ndim)
        return alpha * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)

    def target(
        self,
        clean: Float[Array, "B ..."],
        noise: Float[Array, "B ..."],
        timesteps: Float[Array, "B"],
        kind: Prediction,
    ) -> Float[Array, "B ..."]:
        """Training target of this kind: noise, `alpha noise - sigma clean`, clean, or `noise - clean`."""
        clean, noise = clean.astype(jnp.float32), noise.astype(jnp.float32)
        if kind == "epsilon":
            return noise
        if kind == "clean":
            return clean
        if kind == "velocity":
            return noise - clean
        alpha, sigma = self._broadcast(timesteps, clean.ndim)
        return alpha * noise - sigma * clean

    def to_clean(
        self,
        prediction: Float[Array, "B ..."],
        noisy: Float[Array, "B ..."],
        timesteps: Float[Array, "B"],
        kind: Prediction,
    ) -> Float[Array, "B ..."]:
        """The clean sample that a prediction implies; for "epsilon" infinite at timesteps without signal."""
        of_noisy, of_prediction = clean_factors(*self._broadcast(timesteps, noisy.ndim), kind)
        return of_noisy * noisy.astype(jnp.float32) + of_prediction * prediction.astype(jnp.float32)

    def to_noise(
        self,
        prediction: Float[Array, "B ..."],
        noisy: Float[Array, "B ..."],
        timesteps: Float[Array, "B"],
        kind: Prediction,
    ) -> Float[Array, "B ..."]:
        """The noise that a prediction implies; for "clean" infinite at timesteps without noise."""
        of_noisy, of_prediction = noise_factors(*self._broadcast(timesteps, noisy.ndim), kind)
        return of_noisy * noisy.astype(jnp.float32) + of_prediction * prediction.astype(jnp.float32)

    def convert(
        self,
        prediction: Float[Array, "B ..."],
        noisy: Float[Array, "B ..."],
        timesteps: Float[Array, "B"],
        source: Prediction,
        destination: Prediction,
    ) -> Float[Array, "B ..."]:
        """Convert a prediction of kind `source` to kind `destination`."""
        if source == destination:
            return prediction.astype(jnp.float32)
        clean = self.to_clean(prediction, noisy, timesteps, source)
        noise = self.to_noise(prediction, noisy, timesteps, source)
        return self.target(clean, noise, timesteps, destination)

    def _broadcast(self, timesteps: Array, rank: int) -> tuple[Array, Array]:
        shape = (-1,) + (1,) * (rank - 1)
        return self.alpha(timesteps).reshape(shape), self.sigma(timesteps).reshape(shape)


def clean_factors(alpha, sigma, kind: Prediction):
    """(p, q) with clean = p * noisy + q * prediction; of numpy or jax arrays.

    Solves noisy = alpha clean + sigma noise together with the definition of the prediction, so it holds for
    variance-preserving schedules and for rectified flow.
    """
    if kind == "epsilon":
        return 1.0 / alpha, -sigma / alpha
    if kind == "clean":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    if kind == "velocity":
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    power = alpha**2 + sigma**2
    return alpha / power, -sigma / power


def noise_factors(alpha, sigma, kind: Prediction):
    """(p, q) with noise = p * noisy + q * prediction; of numpy or jax arrays."""
    if kind == "epsilon":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    if kind == "clean":
        return 1.0 / sigma, -alpha / sigma
    if kind == "velocity":
        return 1.0 / (alpha + sigma), alpha / (alpha + sigma)
    power = alpha**2 + sigma**2
    return sigma / power, alpha / power
