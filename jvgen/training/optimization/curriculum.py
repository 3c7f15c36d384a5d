"""A curriculum: one run in stages, each with its own batch shapes, batch sizes and learning rate.

    stages = (Stage(steps=..., buckets=(...), learning_rate=...), ...)
    Experiment(data=DataConfig(buckets=staged_buckets(stages), ...),
               optimizer=OptimizerConfig(..., **staged_learning_rate(stages)),
               training=TrainingConfig(steps=total_steps(stages), ...))

An experiment holds the result only: for each bucket the steps in which it is used, and scales on the learning rate.
Both are functions of the step, so a run resumes at any step of any stage without further state. Noise schedules follow
the batch shapes where `TimestepConfig.shift_by` is set.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jvgen.data.stream.config import BucketConfig
from jvgen.training.optimization.optimizer import LRStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run.

    Attributes:
      steps: length of the stage.
      buckets: batch shapes, with their batch sizes and weights.
      learning_rate: peak learning rate of this stage.
      warmup_steps: steps over which the learning rate changes from that of the stage before.
    """

    steps: int
    buckets: tuple[BucketConfig, ...]
    learning_rate: float
    warmup_steps: int = 0


def total_steps(stages: Sequence[Stage]) -> int:
    """Length of the run."""
    return sum(stage.steps for stage in stages)


def staged_buckets(stages: Sequence[Stage]) -> tuple[BucketConfig, ...]:
    """The buckets of all stages, each with its steps. A shape that two stages use is listed twice and compiled once."""
    start = 0
    buckets = []
    for stage in stages:
        buckets += [bucket.replace(start_step=start, end_step=start + stage.steps) for bucket in stage.buckets]
        start += stage.steps
    return tuple(buckets)


def staged_learning_rate(stages: Sequence[Stage]) -> dict[str, Any]:
    """`learning_rate` and `stages` of an `OptimizerConfig`: the first stage's peak, and the others relative to it."""
    first = stages[0].learning_rate
    start = stages[0].steps
    scales = []
    for stage in stages[1:]:
        scales.append(LRStage(start_step=start, scale=stage.learning_rate / first, warmup_steps=stage.warmup_steps))
        start += stage.steps
    return {"learning_rate": first, "stages": tuple(scales)}
