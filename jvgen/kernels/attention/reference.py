"""Attention by its definition: float32 softmax over all scores at once. The oracle of every other kernel."""

import jax
import jax.numpy as jnp

from jvgen.precision import product_precision


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    valid_length: int | None = None,
    causal: bool = False,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * query key^T + bias) value.

    Args:
      query: `B L N D`.
      key, value: `B K N D`.
      scale: factor on the scores.
      valid_length: keys at or beyond it have no weight.
      causal: query i attends to keys 0..i; needs as many queries as keys.
      bias: added to the scores, broadcastable to `B N L K`.

    Returns:
      `B L N D` in the dtype of `query`. Scores, softmax and weighted sum are float32.
    """
    precision = product_precision(query.dtype)
    scores = scale * jnp.einsum("blnd,bknd->bnlk", query, key, precision=precision, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if valid_length is not None:
        scores = jnp.where(jnp.arange(key.shape[1]) < valid_length, scores, -jnp.inf)
    if causal:
        scores = jnp.where(jnp.tri(query.shape[1], key.shape[1], dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    # In the precision of the inputs: bfloat16 values are worth no float32 passes.
    output = jnp.einsum(
        "bnlk,bknd->blnd", weights, value.astype(jnp.float32), precision=precision, preferred_element_type=jnp.float32
    )
    return output.astype(query.dtype)
