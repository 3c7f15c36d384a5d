"""Weighted round robin in closed form: which member is at position n of the sequence, and how often it came before."""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from jvgen.data.store.records import KINDS

# Longest period of an interleaved sequence. Weights whose exact ratio needs more are rounded to shares of 1/MAX_PERIOD.
MAX_PERIOD = 10_000


class Interleave:
    """An endless, balanced sequence of members: among the first n positions, member i has n * share_i, plus or minus
    less than one.

    The order within a period is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32,
    1980). It repeats, so any position is looked up in O(1).

    Attributes:
      shares: positions of each member per period.
      period: their sum.
    """

    def __init__(self, weights: Sequence[float]):
        self.shares = integer_shares(weights)
        self.period = sum(self.shares)
        self._member, self._before = _table(self.shares)

    def at(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The member at each position, and how many earlier positions it has: two int64 arrays shaped like
        `position`."""
        cycle, offset = np.divmod(np.asarray(position, np.int64), self.period)
        member = self._member[offset]
        return member, cycle * np.asarray(self.shares, np.int64)[member] + self._before[offset, member]

    def before(self, position: int) -> np.ndarray:
        """int64 (members,): how many of the first `position` positions each member has."""
        cycle, offset = divmod(int(position), self.period)
        return cycle * np.asarray(self.shares, np.int64) + self._before[offset]


class StagedInterleave:
    """Interleaved sequences one after the other: from some positions on, members have other weights.

    A member goes on counting where it was, so a position is still looked up in O(1).

    Args:
      stages: (first position, weights of the members), by position, the first one from 0 on; weight 0 for members that
        have no positions of a stage.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]):
        self._starts = np.array([start for start, _ in stages], np.int64)
        self._stages: list[tuple[np.ndarray, Interleave, np.ndarray]] = []
        before = np.zeros(len(stages[0][1]), np.int64)
        for (start, weights), end in zip(stages, [*(start for start, _ in stages[1:]), None], strict=True):
            members = np.flatnonzero(np.asarray(weights) > 0)
            order = Interleave([weights[member] for member in members])
            self._stages.append((members, order, before.copy()))
            if end is not None:
                before[members] += order.before(end - start)

    def at(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Interleave.at`."""
        position = np.asarray(position, np.int64)
        member, count = np.empty_like(position), np.empty_like(position)
        stage = np.searchsorted(self._starts, position, side="right") - 1
        for number in np.unique(stage).tolist():
            members, order, before = self._stages[number]
            here = stage == number
            local, earlier = order.at(position[here] - self._starts[number])
            member[here] = members[local]
            count[here] = before[members[local]] + earlier
        return member, count


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the ratio of the weights; rounded when they would add up to more than `MAX_PERIOD`.

    Raises:
      ValueError: a weight that is not positive and finite, or one that rounds to no share.
    """
    assert weights
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights {tuple(weights)}: {weight} is not positive and finite.")
    exact = [_fraction(weight) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    integers = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*integers)
    integers = [integer // divisor for integer in integers]
    total = sum(integers)
    if total <= MAX_PERIOD:
        return tuple(integers)
    rounded = [round(Fraction(integer, total) * MAX_PERIOD) for integer in integers]
    if min(rounded) == 0:
        smallest = weights[rounded.index(0)]
        raise ValueError(
            f"weights {tuple(weights)}: {smallest} is less than {0.5 / MAX_PERIOD:g} of their sum, too small a share "
            "to be sampled. Increase it, or leave it out."
        )
    return tuple(rounded)


def pool_weights(
    pools: Sequence[tuple[int, int]], source_weights: Sequence[float], kind_weights: Mapping[str, float]
) -> list[float]:
    """The weight of each pool (source, kind) of one bucket.

    A source's weight is divided evenly over the kinds that it has in this bucket, then multiplied by the weight of the
    kind. Without kind weights a source gets its share however many kinds it has; when every source has one kind, or
    all have the same kinds, the kinds are in the ratio of their weights.

    Args:
      pools: (source, index into KINDS) of every pool with rows.
      source_weights: one per source.
      kind_weights: by kind name; a missing kind counts 1.
    """
    kinds = {source: sum(other == source for other, _ in pools) for source, _ in pools}
    return [source_weights[source] * kind_weights.get(KINDS[kind], 1.0) / kinds[source] for source, kind in pools]


def check_kind_weights(kind_weights: Mapping[str, float]) -> None:
    """Raise ValueError for an unknown kind or a weight below 0; weight 0 excludes the kind."""
    for name, weight in kind_weights.items():
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"Did you mean {near[0]}?" if near else ""
            raise ValueError(f"kind_weights.{name}: no such kind; kinds are {', '.join(KINDS)}. {hint}".strip())
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"kind_weights.{name} = {weight}: must be 0 or more (0 excludes the kind).")


def _fraction(weight: float) -> Fraction:
    # 0.1 means one tenth and 0.3333333333333333 one third, not the nearest binary numbers.
    near = Fraction(weight).limit_denominator(MAX_PERIOD)
    return near if near and abs(float(near) - weight) <= 1e-12 * weight else Fraction(str(float(weight)))


@functools.lru_cache(maxsize=64)
def _table(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The member at each position of a period, and the positions (period + 1, members) that each has before it."""
    period, members = sum(shares), len(shares)
    member = np.zeros(period, np.int64)
    before = np.zeros((period + 1, members), np.int64)
    if members > 1:
        slack = 2 * members - 2
        count = [0] * members
        for position in range(period):
            # What each member is owed after this position, times `slack * period` to stay in integers.
            owed = [slack * ((position + 1) * share - period * had) for share, had in zip(shares, count, strict=True)]
            # Of the members that may have it without running ahead, the one that would fall behind first.
            chosen = min(
                (i for i in range(members) if owed[i] >= period),
                key=lambda i: (Fraction(slack * period - period - owed[i], shares[i]), i),
            )
            count[chosen] += 1
            member[position] = chosen
            before[position + 1] = count
    else:
        before[:, 0] = np.arange(period + 1)
    member.setflags(write=False)
    before.setflags(write=False)
    return member, before
