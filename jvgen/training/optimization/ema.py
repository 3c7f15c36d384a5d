"""Exponential moving averages (EMA) of the parameters: several decays, float32, sharded as the parameters are."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jvgen import nested
from jvgen.config import Config, ConfigError
from jvgen.nn.network import Parameters
from jvgen.training.optimization import parameter_paths
from jvgen.value_rules import Bounds, Pattern, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig(Config):
    """Which EMA parameters a run keeps.

    Attributes:
      decays: one EMA per decay; empty for none.
      parameters: regular expression of the parameters to average, matched from the start of their paths.
      warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that the random initialization is soon forgotten.
      every: updates of the parameters per update of the EMA, which then decays by the power of the decay: less memory
        traffic in the steps between.
    """

    decays: tuple[Annotated[float, Bounds(above=0, below=1, fix="for example 0.9999")], ...] = (0.9999,)
    parameters: Pattern = ".*"
    warmup: bool = True
    every: Steps = 1

    def validate(self) -> None:
        if len(set(self.decays)) != len(self.decays):
            raise ValueError(f"decays = {self.decays}: a decay is given twice.")


def name_of(decay: float) -> str:
    """Name of an EMA in the state, in checkpoints and on the command line: "0.9999"."""
    return repr(float(decay))


def select(config: EmaConfig, ema: float | str | None) -> str:
    """Name of the EMA of a run that `ema` selects, or "raw".

    Args:
      ema: a decay (0.9999 or "0.9999"); "raw"; None or "best" for the largest decay, "raw" if the run keeps no EMA.

    Raises:
      ConfigError: an EMA that the run does not keep.
    """
    kept = config.decays
    if ema in (None, "best"):
        return name_of(max(kept)) if kept else "raw"
    if ema == "raw":
        return "raw"
    try:
        decay = float(ema)
    except ValueError as error:
        raise ConfigError(f"ema = {ema!r}: expected a decay such as 0.9999, raw or best.") from error
    if decay not in kept:
        listed = ", ".join(name_of(d) for d in kept) or "none"
        raise ConfigError(f"ema = {ema}: this run keeps EMA with decay {listed}; use one of these, or raw.")
    return name_of(decay)


def init(config: EmaConfig, trained: Parameters) -> dict[str, Parameters]:
    """Initial EMA parameters: copies of the trained parameters that the config selects."""
    averaged, _ = nested.split(trained, lambda path: parameter_paths.matches(config.parameters, path))
    # Separate copies: one buffer must not be donated twice.
    return {name_of(decay): jax.tree.map(jnp.copy, averaged) for decay in config.decays}


def update(
    config: EmaConfig,
    ema: dict[str, Parameters],
    parameters: Parameters,
    count: jax.Array,
    healthy: jax.Array | bool = True,
) -> dict[str, Parameters]:
    """EMA parameters after one more update of the parameters, which a step that is not healthy does not make.

    Args:
      count: int32 scalar, number of updates before this one.
      healthy: whether the step counts; otherwise the result is `ema`.
    """

    def averaged() -> dict[str, Parameters]:
        return _averaged(config, ema, parameters, count)

    if config.every == 1:
        # A select, not a branch: XLA fuses it into the average, which reads the old value in any case.
        return jax.tree.map(lambda new, old: jnp.where(healthy, new, old), averaged(), ema)
    # A branch: in the other steps nothing is read.
    return jax.lax.cond(((count + 1) % config.every == 0) & healthy, averaged, lambda: ema)


def _averaged(
    config: EmaConfig, ema: dict[str, Parameters], parameters: Parameters, count: jax.Array
) -> dict[str, Parameters]:
    n = count.astype(jnp.float32)
    changed = {}
    for decay in config.decays:
        rate = jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n)) if config.warmup else jnp.float32(decay)
        if config.every > 1:
            rate = rate**config.every
        average = ema[name_of(decay)]
        # a + (1 - d)(p - a): exact when both are equal, which d a + (1 - d) p is not.
        changed[name_of(decay)] = jax.tree.map(
            lambda a, p, keep=1 - rate: a + keep * (p - a), average, nested.select(parameters, average)
        )
    return changed
