"""The diagonal of attention among frames, with keys shifted by whole frames: for TPUs and for split sequences.

Shifted by whole frames, around the end, every row meets the key of its place in each frame. Nothing is regrouped, and
there are no matrix products over a few frames, which would leave the matrix units of a TPU idle.
"""

import jax
import jax.numpy as jnp

from jvgen.precision import product_precision


def summed_diagonal(
    query: jax.Array, key: jax.Array, *, frames: int, start: int, stop: int, first: int | jax.Array = 0
) -> jax.Array:
    """As `reference.summed_diagonal`, summed over the video rows among `query`.

    Args:
      query: `B L N D`, the rows of the sequence from `first` on.
      key: `B K N D`, the whole sequence.
      frames, start, stop: see `reference.summed_diagonal`.
      first: index of the first row of `query` in the sequence.
    """
    places, length = (stop - start) // frames, query.shape[1]
    video = key[:, start:stop]
    twice = jnp.concatenate([video, video], axis=1)
    twice = jnp.pad(twice, ((0, 0), (start, key.shape[1] - stop), (0, 0), (0, 0)))

    precision = product_precision(query.dtype)

    def scores(shift: int) -> jax.Array:
        keys = jax.lax.dynamic_slice_in_dim(twice, first + shift * places, length, axis=1)
        product = jnp.einsum("blnd,blnd->bln", query, keys, precision=precision, preferred_element_type=jnp.float32)
        return product * query.shape[-1] ** -0.5

    by_shift = jnp.stack([scores(shift) for shift in range(frames)])
    own = jnp.exp(by_shift[0] - jax.nn.logsumexp(by_shift, axis=0))
    row = first + jnp.arange(length)[:, None]
    return jnp.sum(jnp.where((row >= start) & (row < stop), own, 0.0), axis=1)
