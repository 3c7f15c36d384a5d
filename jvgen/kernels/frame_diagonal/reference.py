"""The diagonal of attention among frames, with tokens regrouped by place: one small matrix product per place."""

import jax
import jax.numpy as jnp
from einops import rearrange

from jvgen.precision import product_precision


def summed_diagonal(query: jax.Array, key: jax.Array, *, frames: int, start: int, stop: int) -> jax.Array:
    """Sum over places and frames f of softmax over frames g of (query_f . key_g / sqrt(D)), at g = f.

    Args:
      query, key: `B L N D`, the rows of a sequence. Rows start..stop-1 are `frames` frames of equally many places.
      frames: number of frames.
      start, stop: first row of the video, and the row after its last.

    Returns:
      `B N`, float32.
    """
    query, key = (rearrange(rows[:, start:stop], "b (f p) n d -> b f p n d", f=frames) for rows in (query, key))
    precision = product_precision(query.dtype)
    scores = jnp.einsum("bfpnd,bgpnd->bpnfg", query, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    own = jnp.diagonal(jax.nn.log_softmax(scores, axis=-1), axis1=-2, axis2=-1)
    return jnp.sum(jnp.exp(own), axis=(1, 3))
