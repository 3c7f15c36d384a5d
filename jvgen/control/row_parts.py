"""A function over many rows, some of them at a time: rows decide how much memory a rollout takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange


def in_parts(function: Callable[[Any], Any], rows: Any, at_once: int | None = None, multiple_of: int = 1) -> Any:
    """What `function` gives for all rows, in one program. Pure.

    Args:
      function: from a tree of arrays with n rows to another; a row of the result depends on its own row alone.
      rows: tree of arrays with R rows.
      at_once: n, at most; all rows if None.
      multiple_of: n is a multiple of this, the number of devices that rows are split over.
    """
    count = len(jax.tree.leaves(rows)[0])
    at_once = min(count, at_once or count)
    at_once += -at_once % multiple_of
    parts = -(-count // at_once)
    # Rows that fill up the last part, or the devices, repeat the last one and are dropped.
    fill = parts * at_once - count
    if fill:
        rows = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], fill, axis=0)]), rows)
    if parts == 1:
        made = function(rows)
    else:
        by_part = jax.tree.map(lambda leaf: leaf.reshape(parts, at_once, *leaf.shape[1:]), rows)
        made = jax.tree.map(lambda leaf: rearrange(leaf, "p n ... -> (p n) ..."), jax.lax.map(function, by_part))
    return jax.tree.map(lambda leaf: leaf[:count], made)
