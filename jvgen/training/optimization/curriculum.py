"""A curriculum: one run in stages, each with its batch shapes, batch sizes and learning rate.

    stages = (Stage(steps=..., buckets=(...), learning_rate=...), ...)
    Experiment(data=DataConfig(buckets=staged_buckets(stages), ...),
               optimizer=OptimizerConfig(..., **staged_rates(stages)),
               training=TrainingConfig(steps=total_steps(stages), ...))

What an experiment holds is the outcome: for each bucket the steps that it is in use in, and factors on the learning
rate. Both are functions of the step alone, so a run goes on from any step of any stage, with its weights, moments and
averages; nothing has to be told where it is. Noise follows the shapes where `TimestepConfig.shift_by` says so.
"""

import dataclasses
from collections.abc import Sequence

from jvgen.data.stream.config import BucketConfig
from jvgen.training.optimization.optimizer import RateStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run.

    Attributes:
      steps: how many.
      buckets: batch shapes, with their batch sizes and shares.
      learning_rate: peak of this stage.
      rise: steps in which the learning rate goes from the one before to this one.
    """

    steps: int
    buckets: tuple[BucketConfig, ...]
    learning_rate: float
    rise: int = 0


def total_steps(stages: Sequence[Stage]) -> int:
    """Length of the run."""
    return sum(stage.steps for stage in stages)


def staged_buckets(stages: Sequence[Stage]) -> tuple[BucketConfig, ...]:
    """The buckets of all stages, each with its steps. A shape of two stages is there twice and compiled once."""
    begins = 0
    buckets = []
    for stage in stages:
        buckets += [bucket.replace(start_step=begins, end_step=begins + stage.steps) for bucket in stage.buckets]
        begins += stage.steps
    return tuple(buckets)


def staged_rates(stages: Sequence[Stage]) -> dict[str, object]:
    """`learning_rate` and `stages` of an `OptimizerConfig`: the first stage's rate, and factors on it."""
    first = stages[0].learning_rate
    begins = stages[0].steps
    factors = []
    for stage in stages[1:]:
        factors.append(RateStage(begins=begins, factor=stage.learning_rate / first, rise=stage.rise))
        begins += stage.steps
    return {"learning_rate": first, "stages": tuple(factors)}
