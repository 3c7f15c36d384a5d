"""Which steps are healthy (finite, without a spike of the gradient norm) and which are skipped, decided on device."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jvgen.training.config import TrainingConfig

# The standard deviation counts as at least this share of the mean: otherwise, with very even norms, every small
# fluctuation would be a spike.
MIN_RELATIVE_STD = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """Running statistics of the gradient norm of each objective, and counts of skipped steps.

    Attributes:
      mean, variance: float32 scalar by objective name, over the steps that were not skipped.
      count: int32, steps in the statistics, which is also the number of updates made.
      consecutive, skipped: int32, consecutive skipped steps and all skipped steps.
    """

    mean: dict[str, jax.Array]
    variance: dict[str, jax.Array]
    count: jax.Array
    consecutive: jax.Array
    skipped: jax.Array

    @classmethod
    def start(cls, objectives: tuple[str, ...]) -> "Health":
        """The statistics before the first step."""
        return cls(
            mean={name: jnp.zeros((), jnp.float32) for name in objectives},
            variance={name: jnp.zeros((), jnp.float32) for name in objectives},
            count=jnp.zeros((), jnp.int32),
            consecutive=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )


def is_healthy(
    config: TrainingConfig, health: Health, losses: dict[str, jax.Array], norms: dict[str, jax.Array]
) -> jax.Array:
    """Boolean scalar: all losses and gradient norms are finite, and no norm is a spike. Inactive objectives have 0."""
    healthy = jnp.bool_(True)
    for name, norm in norms.items():
        healthy &= jnp.isfinite(losses[name]) & jnp.isfinite(norm)
        if config.spike_sigma:
            std = jnp.maximum(jnp.sqrt(health.variance[name]), MIN_RELATIVE_STD * health.mean[name])
            limit = health.mean[name] + config.spike_sigma * std
            healthy &= (norm <= limit) | (health.count < config.spike_warmup)
    return healthy


def update(
    config: TrainingConfig,
    health: Health,
    norms: dict[str, jax.Array],
    healthy: jax.Array,
    activity: Mapping[str, tuple[jax.Array, int]] | None = None,
) -> Health:
    """Statistics and counts after one step; skipped steps do not enter the statistics.

    Args:
      activity: of objectives that are not active in every step, whether it was active in this one, and the period.
    """
    mean, variance = {}, {}
    for name, norm in norms.items():
        active, period = (activity or {}).get(name, (jnp.bool_(True), 1))
        n = (health.count // period).astype(jnp.float32)
        # A plain average at the start that turns into an exponential one.
        rate = jnp.maximum(1 - config.spike_decay, 1 / (n + 1))
        difference = norm - health.mean[name]
        mean[name] = jnp.where(healthy & active, health.mean[name] + rate * difference, health.mean[name])
        spread = (1 - rate) * (health.variance[name] + rate * jnp.square(difference))
        variance[name] = jnp.where(healthy & active, spread, health.variance[name])
    skipped = (~healthy).astype(jnp.int32)
    return Health(
        mean=mean,
        variance=variance,
        count=health.count + 1 - skipped,
        consecutive=(health.consecutive + 1) * skipped,
        skipped=health.skipped + skipped,
    )
