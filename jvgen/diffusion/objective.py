"""The diffusion objective: random timesteps and noise of a step, its weighted loss, the loss by timestep band.

Random draws belong to a slot (an index in the global batch): slot i gets the same timestep and noise for any batch
size, microbatch or mesh, because its key is `fold_in(key, i)`.
"""

import dataclasses
import functools
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jvgen.config import Config
from jvgen.diffusion.schedule import TIMESTEPS, Prediction, Schedule, ScheduleConfig, clean_factors
from jvgen.value_rules import Bounds

# Purposes folded into the key of a step: new ones get new numbers, old numbers never change.
TIMESTEP_KEY = 0
NOISE_KEY = 1
OFFSET_KEY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepConfig(Config):
    """Distribution of training timesteps.

    A number u in [0, 1) is drawn, shifted to s u / (1 + (s - 1) u) by the shift s, and scaled to 0..1000.

    Attributes:
      draws: "independent" for every sample, or "stratified" over the global batch: of N = 2^k samples there is one u in
        each of N equal intervals (with other numbers at most two), so that the loss of a step varies less. CogVideoX's
        "explicit uniform sampling" does so by ranks. The u of one sample has the same distribution in both.
      kind: distribution of u: "uniform", or "logit_normal" = sigmoid(mean + std z) (Esser et al. 2024, eq. 19).
      mean, std: of the normal distribution in "logit_normal".
      shift: s at the base size; 1 for none.
      shift_by: "nothing" (s = shift), "tokens" (s = shift sqrt(tokens / base_tokens), Esser et al. 2024, eq. 23), or
        "resolution_and_duration" (Open-Sora 2.0: s = shift l sqrt(frames), l linear in the tokens per frame, from 1 at
        base_tokens to 3 at 16 base_tokens, that is at four times the side).
      base_tokens: tokens (patches) of the size that needs no shift: of the whole clip for "tokens", of one frame
        for "resolution_and_duration".
    """

    draws: Literal["independent", "stratified"] = "independent"
    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: Annotated[float, Bounds(at_least=-100, at_most=100)] = 0.0
    std: Annotated[float, Bounds(above=0, at_most=100, fix="for example 1.0")] = 1.0
    shift: Annotated[float, Bounds(above=0, at_most=1e6, fix="1 for no shift")] = 1.0
    shift_by: Literal["nothing", "tokens", "resolution_and_duration"] = "nothing"
    base_tokens: Annotated[int, Bounds(at_least=1, fix="for example 256")] = 256

    renamed_fields: ClassVar[dict[str, str]] = {"deviation": "std"}

    def shift_of(self, frames: int, height: int, width: int) -> float:
        """The shift s of a clip of `frames` x `height` x `width` tokens (latent patches)."""
        if self.shift_by == "tokens":
            return self.shift * (frames * height * width / self.base_tokens) ** 0.5
        if self.shift_by == "resolution_and_duration":
            line = 1.0 + 2.0 * (height * width - self.base_tokens) / (15.0 * self.base_tokens)
            return self.shift * max(line, 1e-3) * frames**0.5
        return self.shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """What the network predicts and how its error is weighted.

    Attributes:
      target: "epsilon" (noise), "v" (alpha noise - sigma clean), "clean", or "velocity" (noise - clean).
      timesteps: distribution of the timesteps.
      weighting: "uniform"; "min_snr" (Hang et al. 2023: the error of the clean sample times min(SNR, gamma)); or
        "bell" (a Gaussian over the timestep, zero at the ends, as in Wan).
      gamma: of min_snr.
      bands: number of equal timestep bands that the loss is reported in.
    """

    target: Prediction = "v"
    timesteps: TimestepConfig = TimestepConfig()
    weighting: Literal["uniform", "min_snr", "bell"] = "uniform"
    gamma: Annotated[float, Bounds(above=0, fix="for example 5.0")] = 5.0
    bands: Annotated[int, Bounds(at_least=1, at_most=TIMESTEPS)] = 4

    def validate(self) -> None:
        if TIMESTEPS % self.bands:
            raise ValueError(f"bands = {self.bands}: must divide {TIMESTEPS}, for example 4, 5, 8 or 10.")

    def check_schedule(self, schedule: ScheduleConfig) -> None:
        """Raise `ValueError` if this target cannot be learned or sampled with a schedule."""
        if self.target == "epsilon" and schedule.ends_in_pure_noise:
            raise ValueError(
                f"target = 'epsilon': schedule {schedule.kind!r} ends in pure noise, where the noise does not"
                " determine the clean sample; choose target 'v' (or 'velocity'), or zero_terminal = false."
            )


def slot_keys(key: Key[Array, ""], slots: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key per slot: `fold_in(key, slot)`."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(slots)


def slot_normal(
    key: Key[Array, ""], shape: tuple[int, ...], slots: Int[Array, "B"] | None = None
) -> Float[Array, "B ..."]:
    """Standard normal float32 of `shape` = `(B, ...)`, drawn independently per slot.

    Args:
      key: of this step and purpose.
      shape: with the batch axis.
      slots: indices in the global batch; default 0..B-1.
    """
    keys = slot_keys(key, jnp.arange(shape[0]) if slots is None else slots)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))(keys)


def draw_noise(
    key: Key[Array, ""], shape: tuple[int, ...], slots: Int[Array, "B"] | None = None
) -> Float[Array, "B ..."]:
    """The noise of a training step; see `slot_normal`."""
    return slot_normal(jax.random.fold_in(key, NOISE_KEY), shape, slots)


def draw_timesteps(
    key: Key[Array, ""],
    batch_size: int,
    config: TimestepConfig,
    schedule: Schedule,
    *,
    size: tuple[int, int, int] | None = None,
    slots: Int[Array, "B"] | None = None,
    places: Int[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Random raw timesteps, float32: whole numbers for discrete schedules.

    Args:
      key: of this step.
      batch_size: B.
      config: the distribution.
      schedule: discrete schedules round down to 0..999.
      size: frames, height and width of the clip in tokens (latent patches); required if the shift depends on it.
      slots: indices in the global batch; default 0..B-1.
      places: of the samples among all of the global batch, without gaps, for stratified draws; default `slots`.
    """
    if size is None and config.shift_by != "nothing":
        raise ValueError(f"shift_by = {config.shift_by!r}: give `size`, the clip's frames, height and width in tokens.")
    shift = config.shift_of(*(size or (1, 1, 1)))
    slots = jnp.arange(batch_size) if slots is None else slots
    if config.draws == "stratified":
        offset = jax.random.uniform(jax.random.fold_in(key, OFFSET_KEY), (), jnp.float32)
        fraction = (_bit_reversed(slots if places is None else places) + offset) % 1.0
        if config.kind == "logit_normal":
            normal = jax.scipy.special.ndtri(jnp.clip(fraction, 1e-6, 1.0 - 1e-6))
            fraction = jax.nn.sigmoid(config.mean + config.std * normal)
    elif config.kind == "uniform":
        keys = slot_keys(jax.random.fold_in(key, TIMESTEP_KEY), slots)
        fraction = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(keys)
    else:
        keys = slot_keys(jax.random.fold_in(key, TIMESTEP_KEY), slots)
        normal = jax.vmap(lambda k: jax.random.normal(k, (), jnp.float32))(keys)
        fraction = jax.nn.sigmoid(config.mean + config.std * normal)
    fraction = shift * fraction / (1.0 + (shift - 1.0) * fraction)
    if schedule.config.continuous:
        return fraction * TIMESTEPS
    return jnp.clip(jnp.floor(fraction * TIMESTEPS), 0.0, TIMESTEPS - 1.0)


def _bit_reversed(numbers: Int[Array, "B"]) -> Float[Array, "B"]:
    """van der Corput's sequence in base 2: the first 2^k numbers give the multiples of 2^-k below 1, each once.

    A number's place depends on nothing else, so that no sample has to know how many there are.
    """
    numbers, found = numbers.astype(jnp.uint32), jnp.zeros(numbers.shape, jnp.float32)
    for bit in range(24):
        found = found + ((numbers >> bit) & 1).astype(jnp.float32) * 2.0 ** -(bit + 1)
    return found


def validation_timesteps(count: int, schedule: Schedule) -> np.ndarray:
    """`count` fixed raw timesteps, float32 (count,): the middles of equal bands, as 50, 150, ... 950 for 10."""
    middles = (np.arange(count, dtype=np.float32) + 0.5) * TIMESTEPS / count
    return middles if schedule.config.continuous else np.floor(middles)


def weight_table(config: ObjectiveConfig, schedule: Schedule) -> np.ndarray:
    """Loss weight of each of the 1000 timesteps, float64, mean 1 over the grid.

    The mean is over the grid, not over a batch: with a batch mean, a sample's weight would depend on its neighbors, and
    the effective learning rate on the batch size.
    """
    grid = np.arange(TIMESTEPS)
    if config.weighting == "uniform":
        return np.ones(TIMESTEPS)
    if config.weighting == "bell":
        bell = np.exp(-2.0 * ((grid + 0.5) / TIMESTEPS - 0.5) ** 2)
        weights = bell - bell.min()
    else:
        alpha, sigma = schedule.levels(grid + 0.5 if schedule.config.continuous else grid)
        clean_weight = np.minimum((alpha / sigma) ** 2, config.gamma)
        # A prediction's squared error is the clean sample's squared error over q squared, q = d clean / d prediction.
        _, slope = clean_factors(np.maximum(alpha, 1e-12), sigma, config.target)
        weights = clean_weight * slope**2
    return weights / weights.mean()


def loss_per_sample(
    prediction: Float[Array, "B ..."],
    clean: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    timesteps: Float[Array, "B"],
    config: ObjectiveConfig,
    schedule: Schedule,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Weighted and unweighted mean squared error of each sample, float32. The loss is the mean of the first."""
    target = schedule.target(clean, noise, timesteps, config.target)
    error = jnp.square(prediction.astype(jnp.float32) - target)
    error = jnp.mean(error, axis=tuple(range(1, error.ndim)))
    if config.weighting == "uniform":
        return error, error
    table = jnp.asarray(weight_table(config, schedule).astype(np.float32))
    index = jnp.clip(timesteps.astype(jnp.int32), 0, TIMESTEPS - 1)
    return error * table[index], error


def loss_by_band(
    losses: Float[Array, "B"], timesteps: Float[Array, "B"], bands: int
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """Sum and count of the losses in each of `bands` equal timestep bands, by name ("loss_t0000_0250").

    (total, count) pairs add up over microbatches, devices and steps; the quotient is the mean loss of the band.
    """
    width = TIMESTEPS // bands
    band = jnp.clip(jnp.floor(timesteps / width), 0.0, bands - 1.0)
    pairs = {}
    for index in range(bands):
        inside = (band == index).astype(jnp.float32)
        total = jnp.sum(jnp.where(band == index, losses.astype(jnp.float32), 0.0))
        pairs[f"loss_t{index * width:04d}_{(index + 1) * width:04d}"] = (total, jnp.sum(inside))
    return pairs
