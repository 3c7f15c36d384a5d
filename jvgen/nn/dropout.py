"""Dropout with one key per sample: the mask of a sample does not depend on its index in the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jvgen.precision import product_precision


def folded(keys: Key[Array, "B"] | None, purpose: int | jax.Array) -> Key[Array, "B"] | None:
    """Keys of another purpose (a layer, a site); None stays None."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def dropout(x: Float[Array, "B ..."], keys: Key[Array, "B"] | None, rate: float) -> Float[Array, "B ..."]:
    """Set a fraction `rate` of the elements to zero and scale up the others; identity without keys."""
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    # Divided in float32: 0.9 in bfloat16 is 0.8984, by which all that is kept would be 0.17% too large.
    scaled = (x.astype(jnp.float32) / (1.0 - rate)).astype(x.dtype)
    return jnp.where(kept, scaled, jnp.zeros((), x.dtype))


def attention_with_dropout(
    query: Float[Array, "B L N D"],
    key: Float[Array, "B K N D"],
    value: Float[Array, "B K N D"],
    keys: Key[Array, "B"],
    rate: float,
    *,
    causal: bool = False,
) -> Float[Array, "B L N D"]:
    """softmax(query key^T / sqrt(D)) with dropout of its weights, times value.

    All weights are in memory at once: no fused kernel has masks with one key per sample.
    """
    precision = product_precision(query.dtype)
    scores = jnp.einsum("blnd,bknd->bnlk", query, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(query.shape[1], key.shape[1], dtype=bool), scores, -jnp.inf)
    weights = dropout(jax.nn.softmax(scores, axis=-1), keys, rate)
    return jnp.einsum("bnlk,bknd->blnd", weights.astype(value.dtype), value, precision=precision)
