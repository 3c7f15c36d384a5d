"""How the features of neighbouring frames agree, and where attention looks: measures on tokens, traced."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float


def frame_similarity(features: Float[Array, "*B F P D"]) -> Float[Array, "*B F-1"]:
    """Cosine between the tokens of each place in neighbouring frames, averaged over places; one number a pair.

    The measure of RepVideo's observation (arXiv 2501.08994, section 3): it falls with depth where layers let frames
    drift apart. 1 for a still clip.

    Args:
      features: tokens by frame and place.

    Raises:
      ValueError: a single frame, which has no neighbour.
    """
    if features.shape[-3] < 2:
        raise ValueError("features of 1 frame: neighbouring frames need at least 2.")
    exact = features.astype(jnp.float32)
    unit = exact / jnp.maximum(jnp.linalg.norm(exact, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.sum(unit[..., :-1, :, :] * unit[..., 1:, :, :], axis=-1)
    return jnp.mean(cosine, axis=-1)


def attention_between(
    query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], groups: np.ndarray, count: int
) -> Float[Array, "B N G G"]:
    """How much of its attention each group of rows gives to each group: rows of a group averaged, weights summed.

    Every row of the result adds up to 1. One head is computed at a time, so that only its scores are in memory.

    Args:
      query, key: as attention gets them.
      groups: int `[L]`, the group of each row, -1 for rows that neither look nor are looked at (padding).
      count: number of groups, each with at least one row.
    """
    member = np.asarray(groups)[None] == np.arange(count)[:, None]
    assert member.any(axis=1).all(), "a group without rows has no attention"
    average = jnp.asarray(member / member.sum(axis=1, keepdims=True), jnp.float32)
    total = jnp.asarray(member, jnp.float32)
    hidden = jnp.asarray(np.where(np.asarray(groups) < 0, -np.inf, 0.0), jnp.float32)
    scale = query.shape[-1] ** -0.5

    def head(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores = jnp.einsum("bld,bkd->blk", *rows, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores + hidden, axis=-1)
        return jnp.einsum("gl,blk,hk->bgh", average, weights, total)

    by_head = jax.lax.map(head, (rearrange(query, "b l n d -> n b l d"), rearrange(key, "b l n d -> n b l d")))
    return rearrange(by_head, "n b g h -> b n g h")
