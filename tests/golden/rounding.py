"""How far float32 results may lie apart: bounds that follow from the arithmetic of the case at hand.

Two programs that compute one formula in float32 differ because they round at different places. A result of a network
is compared within what rounding does to it, measured on the case itself: every number that goes in is moved by one
unit in the last place, which is what one rounding does to it, and the result moves. A program rounds once at every
operation, and sums of n products have n of them, so `SAFETY` times that is allowed; a wrong constant, a transposed
matrix or a missing term moves results by thousands. Where a case says how far the authors' own float32 run is from
their float64 run, that is added.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
SAFETY = 8.0
DRAWS = 2


def measured(function: Callable[..., Any], *arguments: Any, draws: int = DRAWS) -> tuple[Any, Any]:
    """Results, and the largest change of each when the numbers that go in move by one unit in the last place.

    Args:
      function: of the arguments, compiled or not; its results are a tree of arrays.
      arguments: trees of arrays; what is not floating-point stays as it is.
      draws: of the signs.

    Returns:
      The results, and a tree of floats like them.
    """
    results = function(*arguments)
    still = _in_float64(results)
    moves = jax.tree.map(lambda _: 0.0, still)
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        moved = _in_float64(function(*jax.tree.map(lambda leaf, rng=rng: _moved(leaf, rng), arguments)))
        moves = jax.tree.map(lambda old, a, b: max(old, float(np.abs(b - a).max(initial=0))), moves, still, moved)
    return results, moves


def _in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _moved(leaf: Any, rng: np.random.Generator) -> Any:
    array = np.asarray(leaf)
    if not np.issubdtype(array.dtype, np.floating):
        return leaf
    signs = rng.integers(0, 2, array.shape) * 2 - 1
    return (array * (1 + EPSILON * signs)).astype(array.dtype)


def compare(
    case: Any,
    function: Callable[..., dict[str, Any]],
    *arguments: Any,
    draws: int = DRAWS,
    safety: float = SAFETY,
) -> dict[str, Any]:
    """Compare everything that a function returns with the tensors of the same names that the case has.

    Where the case keeps every n-th row and column only (`NAME.subN`), with those.

    Returns:
      What the function returned.
    """
    found, moves = measured(function, *arguments, draws=draws)
    for name, array in found.items():
        keys = [key for key in case.io if key == name or key.startswith(f"{name}.sub")]
        for key in keys:
            step = int(key.rpartition(".sub")[2]) if key != name else 1
            ours = np.asarray(array)[..., ::step, ::step] if step > 1 else array
            off = floor(case.config, name)
            within_rounding(ours, case.io[key], moves[name], key, theirs_off=off, safety=safety)
    return found


def floor(config: Mapping[str, Any], name: str) -> float:
    """How far the authors' float32 result is from their float64 one, where the case says so."""
    return float(config.get("float64_rerun_max_abs_diff", {}).get(name) or 0.0)


def within_rounding(
    ours: Any, theirs: Any, moves: float, what: str, *, theirs_off: float = 0.0, safety: float = SAFETY
) -> None:
    """Every number is at most what rounding explains from theirs.

    Args:
      ours, theirs: arrays of one shape.
      moves: how far ours move, see `measured`.
      what: name of the comparison.
      theirs_off: see `floor`; ours may be off by as much.
      safety: see the top of this file.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    # Sums of many numbers are rounded although moves of their terms cancel.
    largest = float(np.abs(theirs).max(initial=0))
    allowed = safety * max(moves, 2 * EPSILON * largest) + 2 * theirs_off
    off = np.abs(ours - theirs).max(initial=0)
    assert off <= allowed, f"{what}: off by {off:.3g}, rounding explains {allowed:.3g} of numbers up to {largest:.3g}"
