"""Metrics of a layer's tokens, traced: similarity of neighboring frames, and attention between groups of rows."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jvgen.precision import product_precision


def frame_similarity(features: Float[Array, "*B F P D"]) -> Float[Array, "*B F-1"]:
    """Cosine similarity of corresponding tokens in neighboring frames, averaged over positions; one number per pair.

    The metric of RepVideo's observation (arXiv 2501.08994, section 3): it falls with depth where features of frames
    diverge. 1 for a static clip.

    Args:
      features: tokens by frame and position.

    Raises:
      ValueError: a single frame.
    """
    if features.shape[-3] < 2:
        raise ValueError("features of 1 frame: similarity of neighboring frames needs at least 2.")
    exact = features.astype(jnp.float32)
    unit = exact / jnp.maximum(jnp.linalg.norm(exact, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.sum(unit[..., :-1, :, :] * unit[..., 1:, :, :], axis=-1)
    return jnp.mean(cosine, axis=-1)


def attention_between(
    query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], groups: np.ndarray, count: int
) -> Float[Array, "B N G G"]:
    """Attention from each group of rows to each group: averaged over query rows, summed over key rows.

    Every row of the result sums to 1. Heads are computed one at a time, so that only one head's scores are in memory.

    Args:
      query, key: inputs of attention.
      groups: int `[L]`, the group of each row, -1 for padding.
      count: number of groups, each with at least one row.
    """
    member = np.asarray(groups)[None] == np.arange(count)[:, None]
    assert member.any(axis=1).all(), "every group needs at least one row"
    average = jnp.asarray(member / member.sum(axis=1, keepdims=True), jnp.float32)
    total = jnp.asarray(member, jnp.float32)
    hidden = jnp.asarray(np.where(np.asarray(groups) < 0, -np.inf, 0.0), jnp.float32)
    scale = query.shape[-1] ** -0.5

    def head(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        precision = product_precision(query.dtype)
        scores = jnp.einsum("bld,bkd->blk", *rows, precision=precision, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores + hidden, axis=-1)
        return jnp.einsum("gl,blk,hk->bgh", average, weights, total, precision=precision)

    by_head = jax.lax.map(head, (rearrange(query, "b l n d -> n b l d"), rearrange(key, "b l n d -> n b l d")))
    return rearrange(by_head, "n b g h -> b n g h")
