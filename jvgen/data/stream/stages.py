"""The bucket of each step, when buckets are active for some of the steps only: in closed form."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.mixture import Interleave


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A range of steps with the same active buckets.

    Attributes:
      start: its first step.
      buckets: indices of the active buckets.
      order: the order in which they are used.
      before: batches of each active bucket before the stage.
      totals: batches of every bucket before the stage.
    """

    start: int
    buckets: tuple[int, ...]
    order: Interleave
    before: tuple[int, ...]
    totals: tuple[int, ...]


class BucketSchedule:
    """The bucket of any step and the number of its batches before that step; weights hold within each stage.

    Args:
      buckets: batch shapes, each with the steps in which it is active.
      always: treat all of them as active at every step (evaluation).
    """

    def __init__(self, buckets: Sequence[BucketConfig], *, always: bool = False):
        spans = [(0, None) if always else (bucket.start_step, bucket.end_step) for bucket in buckets]
        self._stages: list[_Stage] = []
        count = [0] * len(buckets)
        borders = sorted({border for span in spans for border in span if border is not None})
        for start, end in zip(borders, [*borders[1:], None], strict=True):
            active = tuple(i for i, (first, last) in enumerate(spans) if first <= start and (last or start + 1) > start)
            if not active:
                continue
            order = Interleave([buckets[i].weight for i in active])
            self._stages.append(_Stage(start, active, order, tuple(count[i] for i in active), tuple(count)))
            if end is not None:
                for i, batches in zip(active, order.before(end - start), strict=True):
                    count[i] += int(batches)
        self._starts = [stage.start for stage in self._stages]

    def at(self, step: int) -> tuple[int, int]:
        """(index of the bucket, number of its batches before the step)."""
        assert step >= 0, f"step {step} is negative"
        stage = self._stages[max(bisect.bisect_right(self._starts, step) - 1, 0)]
        member, before = stage.order.at(np.array(step - stage.start, np.int64))
        return stage.buckets[int(member)], stage.before[int(member)] + int(before)

    def before(self, step: int) -> list[int]:
        """Number of batches of every bucket before a step."""
        stage = self._stages[max(bisect.bisect_right(self._starts, step) - 1, 0)]
        counts = list(stage.totals)
        for bucket, batches in zip(stage.buckets, stage.order.before(max(0, step - stage.start)), strict=True):
            counts[bucket] += int(batches)
        return counts


def check_stages(buckets: Sequence[BucketConfig], steps: int) -> None:
    """Raise `ValueError` unless every step of a run has a bucket."""
    step = 0
    while step < steps:
        active = [b for b in buckets if b.start_step <= step and (b.end_step or steps) > step]
        if not active:
            known = ", ".join(
                f"{b.name} {b.start_step}..{'end' if b.end_step is None else b.end_step}" for b in buckets
            )
            raise ValueError(f"no bucket is active at step {step} of {steps}; buckets: {known}. Close the gap.")
        step = max(steps if b.end_step is None else b.end_step for b in active)
