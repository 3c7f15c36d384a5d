"""Which steps are sound: finite, and without a spike of the gradient norm; decided and counted on the device."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jvgen.training.config import TrainingConfig

# The deviation counts as at least this share of the mean: very even norms would else call every ripple a spike.
LEAST_RELATIVE_DEVIATION = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """Running statistics of the gradient norm of each objective, and how many steps were skipped.

    Attributes:
      mean, variance: float32 scalar by objective name, over the steps that were not skipped.
      count: int32, steps in the statistics, which is also the number of updates made.
      consecutive, skipped: int32, steps skipped in a row and in all.
    """

    mean: dict[str, jax.Array]
    variance: dict[str, jax.Array]
    count: jax.Array
    consecutive: jax.Array
    skipped: jax.Array

    @classmethod
    def start(cls, objectives: tuple[str, ...]) -> "Health":
        """Statistics of no steps."""
        return cls(
            mean={name: jnp.zeros((), jnp.float32) for name in objectives},
            variance={name: jnp.zeros((), jnp.float32) for name in objectives},
            count=jnp.zeros((), jnp.int32),
            consecutive=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )


def is_sound(
    config: TrainingConfig, health: Health, losses: dict[str, jax.Array], norms: dict[str, jax.Array]
) -> jax.Array:
    """Boolean scalar: every loss and gradient norm is finite, and no norm is a spike. Players at rest have zeros."""
    sound = jnp.bool_(True)
    for name, norm in norms.items():
        sound &= jnp.isfinite(losses[name]) & jnp.isfinite(norm)
        if config.spike_sigma:
            deviation = jnp.maximum(jnp.sqrt(health.variance[name]), LEAST_RELATIVE_DEVIATION * health.mean[name])
            limit = health.mean[name] + config.spike_sigma * deviation
            sound &= (norm <= limit) | (health.count < config.spike_warmup)
    return sound


def update(
    config: TrainingConfig,
    health: Health,
    norms: dict[str, jax.Array],
    sound: jax.Array,
    turns: Mapping[str, tuple[jax.Array, int]] | None = None,
) -> Health:
    """Statistics and counts after one step; skipped steps do not enter the statistics.

    Args:
      turns: of objectives that take turns, whether it was theirs, and the period.
    """
    mean, variance = {}, {}
    for name, norm in norms.items():
        acted, period = (turns or {}).get(name, (jnp.bool_(True), 1))
        n = (health.count // period).astype(jnp.float32)
        # A plain average at the start that turns into an exponential one.
        rate = jnp.maximum(1 - config.spike_decay, 1 / (n + 1))
        difference = norm - health.mean[name]
        mean[name] = jnp.where(sound & acted, health.mean[name] + rate * difference, health.mean[name])
        spread = (1 - rate) * (health.variance[name] + rate * jnp.square(difference))
        variance[name] = jnp.where(sound & acted, spread, health.variance[name])
    bad = (~sound).astype(jnp.int32)
    return Health(
        mean=mean,
        variance=variance,
        count=health.count + 1 - bad,
        consecutive=(health.consecutive + 1) * bad,
        skipped=health.skipped + bad,
    )
