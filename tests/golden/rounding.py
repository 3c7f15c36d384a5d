"""How far float32 results may lie apart: bounds that follow from the arithmetic of the case at hand.

Two programs that compute one formula in float32 differ because they round at different places. A result of a network is
compared within what rounding does to it, measured on the case itself: every number that goes in is moved by one unit in
the last place, which is what one rounding does to it, and the result moves by its `spread`. A program rounds once at
every operation, and sums of n products have n of them, so `SAFETY` spreads are allowed; a wrong constant, a transposed
matrix or a missing term moves results by thousands. Where a case says how far the authors' own float32 run is from their
float64 run, that is added.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
SAFETY = 8.0
DRAWS = 2


def spread(function: Callable[..., Any], *arguments: Any) -> Any:
    """The largest change of each result when floating-point numbers in the arguments move by one unit in the last place.

    Args:
      function: of the arguments, compiled or not; its results are a tree of arrays.
      arguments: trees of arrays; what is not floating-point stays as it is.

    Returns:
      A tree of floats like the results.
    """
    still = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), function(*arguments))
    largest = jax.tree.map(lambda _: 0.0, still)
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        moved = function(*jax.tree.map(lambda leaf, rng=rng: _moved(leaf, rng), arguments))
        largest = jax.tree.map(lambda old, a, b: max(old, float(np.abs(b - a).max(initial=0))), largest, still, moved)
    return largest


def _moved(leaf: Any, rng: np.random.Generator) -> Any:
    array = np.asarray(leaf)
    if not np.issubdtype(array.dtype, np.floating):
        return leaf
    signs = rng.integers(0, 2, array.shape) * 2 - 1
    return (array * (1 + EPSILON * signs)).astype(array.dtype)


def floor(config: Mapping[str, Any], name: str) -> float:
    """How far the authors' float32 result is from their float64 one, where the case says so."""
    return float(config.get("float64_rerun_max_abs_diff", {}).get(name) or 0.0)


def within_rounding(ours: Any, theirs: Any, moves: float, what: str, *, theirs_off: float = 0.0) -> None:
    """Every number is at most what rounding explains from theirs.

    Args:
      ours, theirs: arrays of one shape.
      moves: the `spread` of ours.
      what: name of the comparison.
      theirs_off: see `floor`.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    # One rounding of the largest number is the least that can be asked for.
    allowed = SAFETY * max(moves, EPSILON * np.abs(theirs).max(initial=0)) + theirs_off
    off = np.abs(ours - theirs).max(initial=0)
    import os
    if os.environ.get("ROUNDING_LOG"):
        with open(os.environ["ROUNDING_LOG"], "a") as log:
          print(f"ROUNDING {what}: off {off:.2e} moves {moves:.2e} ratio {off / max(moves, 1e-30):.2f} theirs_off {theirs_off:.1e} eps*largest {EPSILON * np.abs(theirs).max(initial=0):.1e} ok {off <= allowed}", file=log)
    assert off <= allowed, f"{what}: off by {off:.3g}, rounding explains {allowed:.3g} (largest {np.abs(theirs).max():.3g})"
