"""Rules of numbers and patterns, declared in the annotation of a config field or as the type of a flag.

`steps: Annotated[int, Bounds(at_least=1)] = 10` declares a rule. The usual ones have names: `heads: Count = 8`,
`channels: tuple[Width, ...]`, `share: dict[str, Weight]`. A number without a rule is finite and within `CEILING`.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

# Limits of numbers whose annotation declares none: int32 holds every int, and a larger float is a mistake of units.
CEILING = {int: 2**31 - 1, float: 1e9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a number; NaN and infinity are never within them.

    Attributes:
      at_least, above: lower limit, itself allowed or not; -`CEILING` without either.
      at_most, below: upper limit, itself allowed or not; `CEILING` without either.
      fix: ends the message: what to write instead, such as "0 turns it off".
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    fix: str = ""

    def problem(self, value: float) -> str | None:
        """What is wrong with a number, as "must be at least 1."; None if nothing is."""
        rule = self._broken(value)
        return None if rule is None else f"{rule}; {self.fix}." if self.fix else f"{rule}."

    def _broken(self, value: float) -> str | None:
        if not math.isfinite(value):
            return "expected a finite number"
        ceiling = CEILING[int if isinstance(value, int) else float]
        if self.above is not None and value <= self.above:
            return f"must be above {_short(self.above)}" if self.above else "must be positive"
        low = self.at_least if self.at_least is not None else -ceiling
        if value < low:
            return f"must be at least {_short(low)}"
        if self.below is not None and value >= self.below:
            return f"must be below {_short(self.below)}"
        high = self.at_most if self.at_most is not None else ceiling
        return f"must be at most {_short(high)}" if value > high else None


@dataclasses.dataclass(frozen=True)
class RegularExpression:
    """A text that must compile as a regular expression."""

    def problem(self, value: str) -> str | None:
        """What is wrong with a pattern, and at which character; None if nothing is."""
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            return f"not a regular expression ({error or type(error).__name__}); escape special characters with \\."
        return None


Count = Annotated[int, Bounds(at_least=1, at_most=1_000_000)]
CountOrZero = Annotated[int, Bounds(at_least=0, at_most=1_000_000)]
Records = Annotated[int, Bounds(at_least=0, at_most=10**9)]
Layers = Annotated[int, Bounds(at_least=1, at_most=1000)]
Width = Annotated[int, Bounds(at_least=1, at_most=2**20)]  # channels, tokens, codes
Frames = Annotated[int, Bounds(at_least=1, at_most=100_000)]
Pixels = Annotated[int, Bounds(at_least=1, at_most=2**14)]
Step = Annotated[int, Bounds(at_least=0, at_most=10**9)]  # a step, or a number of steps with 0 for off
Steps = Annotated[int, Bounds(at_least=1, at_most=10**9)]
Seed = Annotated[int, Bounds(at_least=0, at_most=2**31 - 1)]
Workers = Annotated[int, Bounds(at_least=1, at_most=1024)]  # threads or processes
Positive = Annotated[float, Bounds(above=0)]
Weight = Annotated[float, Bounds(at_least=0)]
Scale = Annotated[float, Bounds(at_least=-1000, at_most=1000)]
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]
BelowOne = Annotated[float, Bounds(at_least=0, below=1)]
Epsilon = Annotated[float, Bounds(above=0, at_most=1)]
Seconds = Annotated[float, Bounds(above=0, at_most=10**7)]
FrameRate = Annotated[float, Bounds(above=0, at_most=1000)]
Quality = Annotated[int, Bounds(at_least=0, at_most=51)]  # constant rate factor (CRF) of H.264
Pattern = Annotated[str, RegularExpression()]


def problems(value: Any, hint: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """(path, value, problem) of every number and pattern in a value, also in nested tuples and dicts.

    Args:
      hint: annotation with its rules (`typing.get_type_hints(..., include_extras=True)`).
      path: of the value; items of tuples and dicts are named below it.
    """
    yield from _problems(value, hint, path, None)


def _problems(value: Any, hint: Any, path: str, inherited: Any) -> Iterator[tuple[str, Any, str]]:
    if isinstance(value, bool) or value is None:
        return
    rule, hint = _rule(value, hint)
    rule = rule or inherited
    if isinstance(value, (int, float)):
        problem = (rule if isinstance(rule, Bounds) else Bounds()).problem(value)
    elif isinstance(value, str):
        problem = rule.problem(value) if isinstance(rule, RegularExpression) else None
    else:
        arguments = typing.get_args(hint)
        if isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                every = len(arguments) == 2 and arguments[1] is Ellipsis
                item_hint = arguments[0] if every else arguments[index] if index < len(arguments) else Any
                yield from _problems(item, item_hint, f"{path}.{index}", rule)
        elif isinstance(value, dict):
            key_hint, item_hint = arguments if len(arguments) == 2 else (Any, Any)
            for key, item in value.items():
                yield from _problems(key, key_hint, path, None)
                yield from _problems(item, item_hint, f"{path}.{key}", rule)
        return
    if problem is not None:
        yield path, value, problem


def _rule(value: Any, hint: Any) -> tuple[Any, Any]:
    """The rule that an annotation declares for a value, and the annotation of the value itself."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    found = None, hint
    for option in options:
        rules = getattr(option, "__metadata__", ())
        plain = typing.get_args(option)[0] if rules else option
        kind = typing.get_origin(plain) or plain
        kinds = (int, float) if kind is float else kind
        if isinstance(kind, type) and isinstance(value, kinds):
            rule = next((rule for rule in rules if isinstance(rule, (Bounds, RegularExpression))), None)
            found = rule, plain
    return found


@functools.cache
def declared(owner: type) -> dict[str, Any]:
    """Annotation with its rules of every field of a class."""
    return typing.get_type_hints(owner, include_extras=True)


def _short(number: float) -> str:
    return str(int(number)) if number == int(number) and abs(number) < 2**53 else f"{number:g}"
