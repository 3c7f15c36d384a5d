"""Which bucket makes the batch of a step, when buckets are in use for some of the steps only: in closed form."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.mixture import Quota


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Steps with the same buckets: the first of them, the buckets' numbers, and the batches that each gave before."""

    begins: int
    members: tuple[int, ...]
    quota: Quota
    before: tuple[int, ...]


class BucketTurns:
    """The bucket of any step and how many batches it gave before; shares hold within each stage.

    Args:
      buckets: batch shapes, each with the steps that it is in use in.
      always: take them all for every step (evaluation).
    """

    def __init__(self, buckets: Sequence[BucketConfig], *, always: bool = False):
        spans = [(0, None) if always else (bucket.begins, bucket.ends) for bucket in buckets]
        self._stages: list[_Stage] = []
        given = [0] * len(buckets)
        borders = sorted({border for span in spans for border in span if border is not None})
        for begins, ends in zip(borders, [*borders[1:], None], strict=True):
            members = tuple(
                n for n, (first, last) in enumerate(spans) if first <= begins and (last or begins + 1) > begins
            )
            if not members:
                continue
            quota = Quota([buckets[number].weight for number in members])
            self._stages.append(_Stage(begins, members, quota, tuple(given)))
            if ends is not None:
                for number, count in zip(members, quota.before(ends - begins), strict=True):
                    given[number] += int(count)
        self._begins = [stage.begins for stage in self._stages]

    def at(self, step: int) -> tuple[int, int]:
        """(number of the bucket, batches that it gave before the step)."""
        assert step >= 0, f"step {step} is negative"
        stage = self._stages[max(bisect.bisect_right(self._begins, step) - 1, 0)]
        member, before = stage.quota.at(np.array(step - stage.begins, np.int64))
        number = stage.members[int(member)]
        return number, stage.before[number] + int(before)


def check_stages(buckets: Sequence[BucketConfig], steps: int) -> None:
    """Raise `ValueError` unless every step of a run has a bucket."""
    step = 0
    while step < steps:
        reach = [steps if b.ends is None else b.ends for b in buckets if b.begins <= step and (b.ends or steps) > step]
        if not reach:
            known = ", ".join(f"{b.name} {b.begins}..{'end' if b.ends is None else b.ends}" for b in buckets)
            raise ValueError(f"no bucket is in use at step {step} of {steps}: they are {known}. Close the gap.")
        step = max(reach)
