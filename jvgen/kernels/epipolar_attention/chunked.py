"""Epipolar attention over blocks of queries, frame by frame, on any backend: scores and bias of one block at a time.

A frame has at most a few thousand keys, so each block of queries attends to all of them at once. The backward pass
recomputes the scores and the bias of each block.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from jvgen.kernels.epipolar_attention import reference

BLOCK = 256


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lines: jax.Array,
    points: jax.Array,
    width: jax.Array,
    slope: jax.Array,
    *,
    scale: float,
    block: int = BLOCK,
) -> jax.Array:
    """As `reference.attention`. Memory is that of the scores of `block` queries of one frame, in both passes."""
    length = query.shape[1]
    count = -(-length // block)
    size = -(-length // count)

    def blocks(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, count * size - length), *[(0, 0)] * (array.ndim - 2)))
        return rearrange(padded, "b (i l) ... -> b i l ...", i=count)

    def of_frame(frame: tuple) -> jax.Array:
        queries, key, value, lines, width, slope = frame

        @jax.checkpoint
        def of_block(some: tuple[jax.Array, jax.Array]) -> jax.Array:
            query, lines = some
            whole = (query, key, value, lines)
            made = reference.attention(*(a[None] for a in whole), points, width[None], slope[None], scale=scale)
            return made[0]

        return jax.lax.map(of_block, (queries, lines))

    made = jax.lax.map(of_frame, (blocks(query), key, value, blocks(lines), width, slope))
    return rearrange(made, "b i l n d -> b (i l) n d")[:, :length]
