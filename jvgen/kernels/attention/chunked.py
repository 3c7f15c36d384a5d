"""Attention in blocks of queries and keys with a running softmax, on any backend: never all scores at once.

The recurrence is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.1), written in JAX.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jvgen.precision import product_precision

BLOCK = 512


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    valid_length: int | None = None,
    causal: bool = False,
    residual_name: str | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """softmax(scale * query key^T) value; shapes and dtypes as in `reference.attention`.

    Products are in the dtype of the inputs with float32 accumulation; the softmax is float32. Memory is that of
    `block` x `block` scores per head, in both passes.

    Args:
      residual_name: `checkpoint_name` of the residuals that are expensive to recompute.
      block: queries and keys per block.
    """
    length = query.shape[1]
    valid = key.shape[1] if valid_length is None else valid_length
    query_blocks = _split(query, block)
    key_blocks = _split(key[:, :valid], block)
    value_blocks = _split(value[:, :valid], block)
    output = _blocks(scale, valid, causal, residual_name, query_blocks, key_blocks, value_blocks)
    return rearrange(output, "I B N L D -> B (I L) N D")[:, :length]


def _split(array: jax.Array, block: int) -> jax.Array:
    """`B L N D` -> `I B N block D`, padded with zeros; blocks are equal and as small as possible."""
    length = array.shape[1]
    count = -(-length // block)
    size = -(-length // count)
    array = jnp.pad(array, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    return rearrange(array, "B (I L) N D -> I B N L D", I=count)


def _product(left: jax.Array, right: jax.Array, pattern: str) -> jax.Array:
    precision = product_precision(left.dtype)
    return jnp.einsum(pattern, left, right.astype(left.dtype), precision=precision, preferred_element_type=jnp.float32)


def _scores(
    scale: float, valid: int, causal: bool, query: jax.Array, key: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Scores of query block `row` and key block `column`."""
    scores = scale * _product(query, key, "bnld,bnkd->bnlk")
    size = key.shape[2]
    keys = column * size + jnp.arange(size)
    seen = keys < valid
    if causal:
        queries = row * query.shape[2] + jnp.arange(query.shape[2])
        seen = seen & (keys <= queries[:, None])
    return jnp.where(seen, scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _blocks(
    scale: float, valid: int, causal: bool, name: str | None, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    return _forward(scale, valid, causal, name, query, key, value)[0]


def _forward(
    scale: float, valid: int, causal: bool, name: str | None, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, tuple]:
    indices = jnp.arange(key.shape[0])

    def of_query(scanned: tuple) -> tuple[jax.Array, jax.Array]:
        query, row = scanned

        def of_key(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
            largest, total, output = carry
            key, value, index = scanned
            scores = _scores(scale, valid, causal, query, key, row, index)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_largest[..., None])
            decay = jnp.exp(largest - new_largest)
            total = total * decay + jnp.sum(weights, axis=-1)
            output = output * decay[..., None] + _product(weights.astype(value.dtype), value, "bnlk,bnkd->bnld")
            return (new_largest, total, output), None

        # The first block always holds a valid key that every query sees, so the running maximum is finite then.
        start = (
            jnp.full(query.shape[:-1], -jnp.inf, jnp.float32),
            jnp.zeros(query.shape[:-1], jnp.float32),
            jnp.zeros(query.shape, jnp.float32),
        )
        (largest, total, output), _ = jax.lax.scan(of_key, start, (key, value, indices))
        return (output / total[..., None]).astype(query.dtype), largest + jnp.log(total)

    output, log_total = jax.lax.map(of_query, (query, jnp.arange(query.shape[0])))
    if name is not None:
        output, log_total = checkpoint_name(output, name), checkpoint_name(log_total, name)
    return output, (query, key, value, output, log_total)


def _backward(
    scale: float, valid: int, causal: bool, name: str | None, residuals: tuple, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, output, log_total = residuals
    shared = jnp.sum(output.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)

    def of_key(query_gradient: jax.Array, scanned: tuple) -> tuple[jax.Array, tuple]:
        key, value, index = scanned

        def of_query(carry: tuple, scanned: tuple) -> tuple[tuple, jax.Array]:
            key_gradient, value_gradient = carry
            query, gradient, log_total, shared, query_gradient, row = scanned
            weights = jnp.exp(_scores(scale, valid, causal, query, key, row, index) - log_total[..., None])
            value_gradient += _product(gradient, weights, "bnld,bnlk->bnkd")
            scores_gradient = weights * (_product(gradient, value, "bnld,bnkd->bnlk") - shared[..., None])
            key_gradient += _product(query, scores_gradient, "bnld,bnlk->bnkd")
            query_gradient += _product(key, scores_gradient, "bnkd,bnlk->bnld")
            return (key_gradient, value_gradient), query_gradient

        start = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
        gradients, query_gradient = jax.lax.scan(
            of_query, start, (query, gradient, log_total, shared, query_gradient, jnp.arange(query.shape[0]))
        )
        return query_gradient, gradients

    query_gradient, (key_gradient, value_gradient) = jax.lax.scan(
        of_key, jnp.zeros(query.shape, jnp.float32), (key, value, jnp.arange(key.shape[0]))
    )
    return (
        (scale * query_gradient).astype(query.dtype),
        (scale * key_gradient).astype(key.dtype),
        value_gradient.astype(value.dtype),
    )


_blocks.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Attention to some keys at a time, as `jvgen.nn.sequence_parallel.Parts`; arrays are `I B N block D`."""

    scale: float
    block: int = BLOCK

    def queries(self, array: jax.Array) -> jax.Array:
        return _split(array, self.block)

    keys = queries

    def tokens(self, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return rearrange(array, "I B N L D -> B (I L) N D")[:, : shape[1]]

    def forward(self, valid: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple:
        output, (*_, log_total) = _forward(self.scale, valid, False, None, query, key, value)
        return output.astype(jnp.float32), log_total[..., None]

    def backward(self, valid, query, key, value, output, total, gradient) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _backward(self.scale, valid, False, None, (query, key, value, output, total[..., 0]), gradient)
