"""Epipolar attention with all scores and the whole bias in memory. The oracle of every other kernel."""

import jax
import jax.numpy as jnp

from jvgen.precision import product_precision


def line_distances(lines: jax.Array, points: jax.Array) -> jax.Array:
    """|line . point| of lines `B L 3` and points `K 3`, `B L K`, elementwise in float32."""
    a, b, c = (lines[..., i, None] for i in range(3))
    return jnp.abs(a * points[:, 0] + b * points[:, 1] + c * points[:, 2])


def tile_bias(lines: jax.Array, points: jax.Array, width: jax.Array, slope: jax.Array) -> jax.Array:
    """-slope max(0, |line . point| - width), float32 `B L K`.

    Args:
      lines: `B L 3`, unit lines; zeros for queries without a line, which have no bias.
      points: `K 3`.
      width, slope: `B`.
    """
    beyond = line_distances(lines, points) - width[:, None, None]
    return -slope[:, None, None] * jnp.maximum(beyond, 0.0)


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
) -> jax.Array:
    """softmax(scale * query key^T + bias) value, with the bias of `tile_bias` in all heads.

    Args:
      query: `B L N D`.
      key, value: `B K N D`.
      lines, points, width, slope: see `tile_bias`; treated as constants by differentiation.
      scale: factor on the scores.

    Returns:
      `B L N D` in the dtype of `query`. Scores, softmax and weighted sum are float32.
    """
    lines, points, width, slope = jax.lax.stop_gradient((lines, points, width, slope))
    precision = product_precision(query.dtype)
    scores = scale * jnp.einsum("blnd,bknd->bnlk", query, key, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + tile_bias(lines, points, width, slope)[:, None], axis=-1)
    # In the precision of the inputs: bfloat16 values are worth no float32 passes.
    output = jnp.einsum(
        "bnlk,bknd->blnd", weights, value.astype(jnp.float32), precision=precision, preferred_element_type=jnp.float32
    )
    return output.astype(query.dtype)
