"""Exponential moving averages of the parameters: several decays, float32, placed as the parameters are."""

import dataclasses

import jax
import jax.numpy as jnp

from jvgen import nested
from jvgen.config import Config
from jvgen.nn.network import Parameters
from jvgen.training.optimization import parameter_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig(Config):
    """Which averages a run keeps.

    Attributes:
      decays: one average each; empty for none.
      parameters: regular expression, matched from the start of a parameter's path, of what is averaged.
      warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that the random start is soon forgotten.
    """

    decays: tuple[float, ...] = (0.9999,)
    parameters: str = ".*"
    warmup: bool = True

    def validate(self) -> None:
        for decay in self.decays:
            if not 0 < decay < 1:
                raise ValueError(f"decays = {self.decays}: each must lie between 0 and 1, for example 0.9999.")
        if len(set(self.decays)) != len(self.decays):
            raise ValueError(f"decays = {self.decays}: one of them is named twice.")


def name_of(decay: float) -> str:
    """The name of an average in the state, in checkpoints and on the command line: "0.9999"."""
    return repr(float(decay))


def init(config: EmaConfig, trained: Parameters) -> dict[str, Parameters]:
    """Averages at the start: copies of the trained parameters that the configuration names."""
    averaged, _ = nested.split(trained, lambda path: parameter_paths.matches(config.parameters, path))
    # A copy each: one buffer must not be donated twice.
    return {name_of(decay): jax.tree.map(jnp.copy, averaged) for decay in config.decays}


def update(
    config: EmaConfig, averages: dict[str, Parameters], parameters: Parameters, count: jax.Array
) -> dict[str, Parameters]:
    """Averages after one more update of the parameters.

    Args:
      count: int32 scalar, number of updates before this one.
    """
    n = count.astype(jnp.float32)
    changed = {}
    for decay in config.decays:
        rate = jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n)) if config.warmup else jnp.float32(decay)
        average = averages[name_of(decay)]
        # a + (1 - d)(p - a): exact when both are equal, which d a + (1 - d) p is not.
        changed[name_of(decay)] = jax.tree.map(
            lambda a, p, keep=1 - rate: a + keep * (p - a), average, nested.select(parameters, average)
        )
    return changed
