"""Mixing by quotas: which member of a weighted mixture is the n-th, and how often it came before, in closed form."""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from jvgen.data.store.records import KINDS

# The longest period of a mixture. Weights whose exact ratio needs more are rounded to shares of about 1/PERIOD.
PERIOD = 10_000


class Quota:
    """A never-ending, balanced sequence of members: after any n turns, member i has had n * share_i turns, less than
    one more or less.

    The order within a period is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32,
    1980); it repeats, so that any turn is looked up in O(1).

    Attributes:
      shares: integer turns of each member in a period.
      period: their sum.
    """

    def __init__(self, weights: Sequence[float]):
        self.shares = integer_shares(weights)
        self.period = sum(self.shares)
        self._member, self._before = _table(self.shares)

    def at(self, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn the n-th is, and how many turns that member had before: two int64 arrays shaped like `turn`."""
        cycle, place = np.divmod(np.asarray(turn, np.int64), self.period)
        member = self._member[place]
        return member, cycle * np.asarray(self.shares, np.int64)[member] + self._before[place, member]

    def before(self, turn: int) -> np.ndarray:
        """int64 (members,): how many of the first `turn` turns each member had."""
        cycle, place = divmod(int(turn), self.period)
        return cycle * np.asarray(self.shares, np.int64) + self._before[place]


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the ratio of the weights; rounded when they would add up to more than `PERIOD`.

    Raises:
      ValueError: a weight that is not positive and finite, or one too small beside the others to get a turn.
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
    if total <= PERIOD:
        return tuple(integers)
    rounded = [round(Fraction(integer, total) * PERIOD) for integer in integers]
    if min(rounded) == 0:
        smallest = weights[rounded.index(0)]
        raise ValueError(
            f"weights {tuple(weights)}: {smallest} is less than {0.5 / PERIOD:g} of their sum, too little to be given "
            "turns. Raise it, or leave it out."
        )
    return tuple(rounded)


def pool_weights(
    pools: Sequence[tuple[int, int]], source_weights: Sequence[float], kind_weights: Mapping[str, float]
) -> list[float]:
    """The weight of each pool (source, kind) of one bucket.

    A source's weight is divided evenly over the kinds that it has in this bucket, then multiplied by the weight of the
    kind: so without kind weights a source gets its share however many kinds it holds, and when every source has one
    kind, or all have the same, kinds are in the ratio of their weights.

    Args:
      pools: (source, index into KINDS) of every pool with rows.
      source_weights: one for each source.
      kind_weights: by kind name; a missing kind counts 1.
    """
    held = {source: sum(other == source for other, _ in pools) for source, _ in pools}
    return [source_weights[source] * kind_weights.get(KINDS[kind], 1.0) / held[source] for source, kind in pools]


def check_kind_weights(kind_weights: Mapping[str, float]) -> None:
    """Raise ValueError for the name of no kind or a weight below 0; 0 leaves the kind out."""
    for name, weight in kind_weights.items():
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"Did you mean {near[0]}?" if near else ""
            raise ValueError(f"kind_weights.{name}: no such kind; kinds are {', '.join(KINDS)}. {hint}".strip())
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"kind_weights.{name} = {weight}: must be 0 or more (0 leaves the kind out).")


def _fraction(weight: float) -> Fraction:
    # 0.1 means one tenth and 0.3333333333333333 one third, not the nearest binary numbers.
    near = Fraction(weight).limit_denominator(PERIOD)
    return near if near and abs(float(near) - weight) <= 1e-12 * weight else Fraction(str(float(weight)))


@functools.lru_cache(maxsize=64)
def _table(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The member of each turn of a period, and the turns (period + 1, members) that each had before it."""
    period, members = sum(shares), len(shares)
    member = np.zeros(period, np.int64)
    before = np.zeros((period + 1, members), np.int64)
    if members > 1:
        slack = 2 * members - 2
        given = [0] * members
        for turn in range(period):
            # Times `slack * period`: what each member is owed after this turn, in integers.
            owed = [slack * ((turn + 1) * share - period * had) for share, had in zip(shares, given, strict=True)]
            # Of those who may have it without running ahead, the one who would fall behind first.
            chosen = min(
                (i for i in range(members) if owed[i] >= period),
                key=lambda i: (Fraction(slack * period - period - owed[i], shares[i]), i),
            )
            given[chosen] += 1
            member[turn] = chosen
            before[turn + 1] = given
    else:
        before[:, 0] = np.arange(period + 1)
    member.setflags(write=False)
    before.setflags(write=False)
    return member, before
