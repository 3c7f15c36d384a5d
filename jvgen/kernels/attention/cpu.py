"""Attention for CPUs: one head at a time, as two-dimensional matrix products, which are fast in XLA's CPU backend.

Batched products and softmax over a four-dimensional array take 2.5 times as long. Everything is computed in float32.
Both passes hold one block of one head's scores at a time; the backward pass recomputes them.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jvgen.precision import product_precision

QUERY_BLOCK = 512
KEY_BLOCK = 256


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    valid_length: int | None = None,
    causal: bool = False,
    residual_name: str | None = None,
) -> jax.Array:
    """softmax(scale * query key^T) value; shapes and dtypes as in `reference.attention`.

    Args:
      residual_name: `checkpoint_name` of the residuals that are expensive to recompute.
    """
    heads = query.shape[2]
    key, value = key[:, :valid_length], value[:, :valid_length]
    query_HLD, key_HKD, value_HKD = (
        rearrange(array.astype(jnp.float32), "B L N D -> (B N) L D") for array in (query, key, value)
    )
    output = _heads(residual_name, causal, query_HLD * scale, key_HKD, value_HKD)
    return rearrange(output, "(B N) L D -> B L N D", N=heads).astype(query.dtype)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=product_precision(left.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _heads(name: str | None, causal: bool, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _forward(name, causal, query, key, value)[0]


def _forward(
    name: str | None, causal: bool, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, tuple]:
    heads, length, width = query.shape
    blocks = -(-length // QUERY_BLOCK)
    rows = -(-length // blocks)
    padded = jnp.pad(query, ((0, 0), (0, blocks * rows - length), (0, 0)))

    def block(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        head = index // blocks
        rows_of_query = jax.lax.dynamic_slice(padded, (head, index % blocks * rows, 0), (1, rows, width))[0]
        scores = _product(rows_of_query, key[head].T)
        if causal:
            row = index % blocks * rows + jnp.arange(rows)
            scores = jnp.where(jnp.arange(key.shape[1]) <= row[:, None], scores, -jnp.inf)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return _product(weights, value[head]) / total, (largest + jnp.log(total))[:, 0]

    output, log_total = jax.lax.map(block, jnp.arange(heads * blocks))
    output = output.reshape(heads, blocks * rows, width)[:, :length]
    log_total = log_total.reshape(heads, blocks * rows)[:, :length]
    if name is not None:
        output, log_total = checkpoint_name(output, name), checkpoint_name(log_total, name)
    return output, (query, key, value, output, log_total)


def _backward(
    name: str | None, causal: bool, residuals: tuple, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, output, log_total = residuals
    length = key.shape[1]
    blocks = -(-length // KEY_BLOCK)
    rows = -(-length // blocks)
    padding = ((0, 0), (0, blocks * rows - length), (0, 0))
    key_blocks, value_blocks = (
        jnp.pad(array, padding).reshape(array.shape[0], blocks, rows, array.shape[-1]) for array in (key, value)
    )
    shared = jnp.sum(output * gradient, axis=-1)

    def head(arrays: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, gradient, log_total, shared, key_blocks, value_blocks = arrays

        # Keys are in rows everywhere: no product needs a large transposed operand.
        def block(query_gradient: jax.Array, key_and_value: tuple) -> tuple[jax.Array, tuple]:
            key, value, index = key_and_value
            # Weights are at most 1; the bound keeps those of padded keys finite.
            weights = jnp.exp(jnp.minimum(_product(key, query.T) - log_total, 0.0))
            if causal:
                column = index * rows + jnp.arange(rows)
                weights = jnp.where(column[:, None] <= jnp.arange(query.shape[0]), weights, 0.0)
            scores_gradient = weights * (_product(value, gradient.T) - shared)
            query_gradient += _product(key.T, scores_gradient)
            return query_gradient, (_product(scores_gradient, query), _product(weights, gradient))

        query_gradient, (key_gradient, value_gradient) = jax.lax.scan(
            block, jnp.zeros_like(query.T), (key_blocks, value_blocks, jnp.arange(blocks))
        )
        return query_gradient.T, key_gradient.reshape(-1, key.shape[-1]), value_gradient.reshape(-1, value.shape[-1])

    query_gradient, key_gradient, value_gradient = jax.lax.map(
        head, (query, gradient, log_total, shared, key_blocks, value_blocks)
    )
    return query_gradient, key_gradient[:, :length], value_gradient[:, :length]


_heads.defvjp(_forward, _backward)
