"""Batch sizes by which the steps of all buckets take about the same time.

    buckets = aspect_buckets(resolutions=(256, 480), frames=(1, 49), frames_per_second=8.0)
    DataConfig(buckets=buckets, tokens_per_step=1_000_000, batch_multiple=64, ...)

Processes wait for each other at every step, and a step's learning counts the same whatever its bucket: batches of few
tokens would waste both. Attention makes tokens of long clips cost more, so the same number of tokens in every batch is
not enough: what is balanced is FLOPs, of which `jvgen check` estimates the time of a step. FLOPs of attention may take
longer than those of the matrix products with their norms and copies: `data.attention_cost` says how much. By
`jvgen estimate` of RepVideo-2B on v5p (`docs/measured.md`) that is 1.05 where products are computed again, 1.31 where
they are kept, 1.16 with `flash_tpu`, 0.73 with it and heads of 128. Between single images and clips that spend 61% of
their FLOPs in attention, 1.31 makes 15% of a step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.tasks.task import Task, TaskConfig
from jvgen.training.telemetry.throughput import step_flops

E = TypeVar("E", bound=Any)  # `jvgen.training.experiment.Experiment`, which uses this module
# Steps may differ from their mean by this part.
TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step of a bucket takes.

    Attributes:
      bucket: with its batch size.
      tokens: of the batch; 0 for networks without tokens.
      relative: FLOPs, weighted by `attention_cost`, over the mean of all buckets.
    """

    bucket: BucketConfig
    tokens: int
    relative: float

    def __str__(self) -> str:
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        return f"{self.bucket.name} (batch {self.bucket.batch_size}{tokens}): {self.relative:.2f}"


def balanced_buckets(
    task: TaskConfig,
    buckets: Sequence[BucketConfig],
    *,
    tokens_per_step: int,
    multiple_of: int = 1,
    attention_cost: float = 1.0,
) -> tuple[BucketConfig, ...]:
    """The buckets with batch sizes by which all steps have the same FLOPs, within 10% of their mean.

    Args:
      task: whose network is trained.
      buckets: batch shapes; their batch sizes are replaced.
      tokens_per_step: tokens in a batch of the bucket whose examples have the most; the others follow from it.
      multiple_of: batch sizes are multiples of this: the devices that batches are divided over, times `accumulation`.
      attention_cost: time of a FLOP of attention, in those of other FLOPs.

    Raises:
      ConfigError: a task without tokens or FLOPs, or steps that cannot be that similar; the message says from how many
        tokens on they can.
    """
    built = task.build()
    tokens = [built.sequence_length(bucket) for bucket in buckets]
    costs = [_cost(built, bucket.replace(batch_size=1), attention_cost) for bucket in buckets]
    if not buckets or not all(tokens) or not all(costs):
        raise ConfigError(
            f"data.tokens_per_step: {type(task).__name__} does not say how many tokens and FLOPs an example has; write "
            "batch sizes into the buckets."
        )
    sizes = _sizes(tokens, costs, tokens_per_step, multiple_of)
    if _spread(sizes, costs) > TOLERANCE:
        smallest = max(tokens) * multiple_of
        larger = range((tokens_per_step // smallest + 1) * smallest, 1000 * smallest, smallest)
        fits = (n for n in larger if _spread(_sizes(tokens, costs, n, multiple_of), costs) <= TOLERANCE)
        enough = next(fits, None)
        mean = sum(size * cost for size, cost in zip(sizes, costs, strict=True)) / len(buckets)
        listed = "\n".join(
            f"  {bucket.name}: batch {size}, {size * cost / mean:.2f} of the mean"
            for bucket, size, cost in zip(buckets, sizes, costs, strict=True)
        )
        hint = f"Use tokens_per_step = {enough:,} or more" if enough else "Use fewer shapes"
        raise ConfigError(
            f"data.tokens_per_step = {tokens_per_step:,}: with batch sizes in multiples of {multiple_of} the steps "
            f"differ by more than {TOLERANCE:.0%} from their mean:\n{listed}\n{hint}, or a smaller multiple_of."
        )
    return tuple(bucket.replace(batch_size=size) for bucket, size in zip(buckets, sizes, strict=True))


def with_batch_sizes(experiment: E) -> E:
    """The experiment with the batch sizes that `data.tokens_per_step` asks for; the same one without it.

    Args:
      experiment: validated.

    Raises:
      ConfigError: see `balanced_buckets`, or a bucket that the task cannot take.
    """
    data = experiment.data
    if data.tokens_per_step is None:
        return experiment
    for number, bucket in enumerate(data.buckets):
        try:
            experiment.task.check_bucket(bucket)
        except ValueError as error:
            raise ConfigError(f"data.buckets.{number}: {error}") from error
    multiple = data.batch_multiple * experiment.training.accumulation
    buckets = balanced_buckets(
        experiment.task, data.buckets, tokens_per_step=data.tokens_per_step, multiple_of=multiple,
        attention_cost=data.attention_cost,
    )  # fmt: skip
    return experiment.replace(data=data.replace(buckets=buckets))


def described(task: Task, buckets: Sequence[BucketConfig], attention_cost: float = 1.0) -> str:
    """One line about the steps of the buckets."""
    costs = step_costs(task, tuple(dict.fromkeys(buckets)), attention_cost)
    if not costs:
        return "unknown: the FLOPs of the step are not known"
    relative = [cost.relative for cost in costs]
    by = "FLOPs" if attention_cost == 1 else f"FLOPs, those of attention times {attention_cost:g}"
    text = f"{min(relative):.2f} to {max(relative):.2f} of their mean by {by}: {'; '.join(map(str, costs))}"
    if max(relative) - 1 > TOLERANCE or 1 - min(relative) > TOLERANCE:
        text += "; data.tokens_per_step chooses batch sizes by which they are alike"
    return text


def step_costs(task: Task, buckets: Sequence[BucketConfig], attention_cost: float = 1.0) -> list[StepCost]:
    """What a step of each bucket takes, relative to their mean; empty if the task does not count its FLOPs."""
    flops = [_cost(task, bucket, attention_cost) for bucket in buckets]
    if not all(flops):
        return []
    mean = sum(flops) / len(flops)
    return [
        StepCost(bucket, task.sequence_length(bucket) * bucket.batch_size, cost / mean)
        for bucket, cost in zip(buckets, flops, strict=True)
    ]


def _cost(task: Task, bucket: BucketConfig, attention_cost: float) -> float:
    return sum(
        flops * (attention_cost if part == "attention" else 1.0) for part, flops in step_flops(task, bucket).items()
    )


def _sizes(tokens: Sequence[int], costs: Sequence[float], tokens_per_step: int, multiple_of: int) -> list[int]:
    longest = max(range(len(tokens)), key=tokens.__getitem__)
    budget = max(1, round(tokens_per_step / tokens[longest] / multiple_of)) * multiple_of * costs[longest]
    return [max(1, round(budget / cost / multiple_of)) * multiple_of for cost in costs]


def _spread(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The largest difference from the mean, as a part of it."""
    totals = [size * cost for size, cost in zip(sizes, costs, strict=True)]
    mean = sum(totals) / len(totals)
    return max(abs(total / mean - 1) for total in totals)
