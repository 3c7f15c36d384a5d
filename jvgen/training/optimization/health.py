"""Which steps are healthy (finite, without a spike of the gradient norm) and which are skipped, decided on device."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from jvgen.data.stream.config import BucketConfig
from jvgen.training.config import TrainingConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

# The standard deviation counts as at least this share of the mean: otherwise, with very even norms, every small
# fluctuation would be a spike.
MIN_RELATIVE_STD = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormStatistics:
    """Running statistics of the gradient norm of one objective in the steps of one bucket.

    Attributes:
      mean, variance: float32, of norms that are clipped at the limit of a spike.
      count: int32, steps in the statistics.
      spikes: int32, consecutive spikes.
    """

    mean: jax.Array
    variance: jax.Array
    count: jax.Array
    spikes: jax.Array

    @classmethod
    def start(cls) -> "NormStatistics":
        """No steps yet."""
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return cls(mean=zero, variance=zero, count=none, spikes=none)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """Counts of updates and skipped steps, and the statistics of the spike guard.

    Attributes:
      count: int32, number of updates made (steps that were not skipped).
      consecutive, skipped: int32, consecutive skipped steps and all skipped steps.
      spikes: int32, those of the skipped steps that were finite.
      norms: statistics by bucket (see `bucket_key`) and objective; empty if the guard is off.
    """

    count: jax.Array
    consecutive: jax.Array
    skipped: jax.Array
    spikes: jax.Array
    norms: dict[str, dict[str, NormStatistics]]

    @classmethod
    def start(cls, objectives: Iterable[str] = (), buckets: Iterable[str] = ()) -> "Health":
        """The state before the first step; without buckets there is no spike guard."""
        none = jnp.zeros((), jnp.int32)
        norms = {bucket: {name: NormStatistics.start() for name in sorted(objectives)} for bucket in sorted(buckets)}
        return cls(count=none, consecutive=none, skipped=none, spikes=none, norms=norms)


def bucket_key(bucket: BucketConfig) -> str:
    """The name of a bucket's statistics; buckets that share a compiled step share it."""
    return f"{bucket.name}x{bucket.batch_size}"


def one_per_step(buckets: Iterable[BucketConfig]) -> tuple[BucketConfig, ...]:
    """The first bucket of every compiled step: stages often repeat a batch shape."""
    first: dict[str, BucketConfig] = {}
    for bucket in buckets:
        first.setdefault(bucket_key(bucket), bucket)
    return tuple(first.values())


def stage_starts(buckets: Iterable[BucketConfig], optimizers: Iterable[OptimizerConfig]) -> tuple[int, ...]:
    """The steps after the first at which the batch shapes or the scale of a learning rate change."""
    steps = {step for bucket in buckets for step in (bucket.start_step, bucket.end_step) if step}
    return tuple(sorted(steps | {stage.start_step for config in optimizers for stage in config.stages}))


def check_step(
    config: TrainingConfig,
    health: Health,
    losses: Mapping[str, jax.Array],
    norms: Mapping[str, jax.Array],
    *,
    bucket: str | None = None,
    new_stage: jax.Array | bool = False,
    activity: Mapping[str, tuple[jax.Array, int]] | None = None,
) -> tuple[jax.Array, Health]:
    """Whether a step is healthy, and counts and statistics after it.

    A step is skipped if a loss or a gradient norm is not finite. With the spike guard (`config.spike_sigma` above 0)
    it is also skipped if a norm exceeds the mean of its objective in its bucket by more than spike_sigma standard
    deviations, unless `config.spike_patience` steps before it were skipped as spikes, of this bucket or of the run:
    then the norm has a new level, the step is taken, and the statistics start again. Spikes enter the statistics
    clipped at the limit, so that these follow norms that grow or spread.

    Args:
      losses, norms: by objective; 0 for inactive ones.
      bucket: key of the step's bucket in `health.norms`.
      new_stage: whether a stage of the curriculum starts with this step: all statistics start again.
      activity: of objectives that are not active in every step, whether it was active in this one, and the period.

    Returns:
      Boolean scalar, and the new state.
    """
    finite = jnp.bool_(True)
    for name, norm in norms.items():
        finite &= jnp.isfinite(losses[name]) & jnp.isfinite(norm)
    healthy, statistics = finite, health.norms
    if config.spike_sigma:
        if new_stage is not False:
            statistics = jax.tree.map(lambda leaf: jnp.where(new_stage, jnp.zeros_like(leaf), leaf), statistics)
        of_bucket = {}
        for name, norm in norms.items():
            active = finite & (activity or {}).get(name, (jnp.bool_(True), 1))[0]
            spike, of_bucket[name] = _observe(config, statistics[bucket][name], norm, active, health.consecutive)
            healthy &= ~spike
        statistics = {**statistics, bucket: of_bucket}
    skipped = (~healthy).astype(jnp.int32)
    return healthy, Health(
        count=health.count + 1 - skipped,
        consecutive=(health.consecutive + 1) * skipped,
        skipped=health.skipped + skipped,
        spikes=health.spikes + (finite & ~healthy).astype(jnp.int32),
        norms=statistics,
    )


def _observe(
    config: TrainingConfig, old: NormStatistics, norm: jax.Array, active: jax.Array, consecutive: jax.Array
) -> tuple[jax.Array, NormStatistics]:
    """Whether a norm is a spike, and the statistics with it; an inactive one changes nothing."""
    patience = min(config.spike_patience, config.max_consecutive_skips)
    # Without a step in the statistics there is no limit.
    warm = old.count >= max(config.spike_warmup, 1)
    std = jnp.maximum(jnp.sqrt(old.variance), MIN_RELATIVE_STD * old.mean)
    limit = old.mean + config.spike_sigma * std
    over = active & warm & (norm > limit)
    new_level = over & ((old.spikes >= patience) | (consecutive >= patience))
    spike = over & ~new_level
    start = NormStatistics.start()
    old = jax.tree.map(lambda fresh, leaf: jnp.where(new_level, fresh, leaf), start, old)
    # A plain average at the start that turns into an exponential one.
    rate = jnp.maximum(1 - config.spike_decay, 1 / (old.count.astype(jnp.float32) + 1))
    difference = jnp.where(spike, limit, norm) - old.mean
    new = NormStatistics(
        mean=old.mean + rate * difference,
        variance=(1 - rate) * (old.variance + rate * jnp.square(difference)),
        count=old.count + 1,
        spikes=jnp.where(spike, old.spikes + 1, 0),
    )
    return spike, jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)
