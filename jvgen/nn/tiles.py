"""Where two tiles of a picture or a clip overlap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def blend(
    before: Float[Array, "B F H W C"], after: Float[Array, "B F h w C"], extent: int, *, axis: int
) -> Float[Array, "B F h w C"]:
    """`after`, whose first `extent` elements along an axis come over linearly from the last ones of `before`.

    The first element is all of `before`. Tiles shorter than `extent` come over as far as they reach.
    """
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    shape = [extent if a == axis else 1 for a in range(after.ndim)]
    weight = (jnp.arange(extent, dtype=after.dtype) / extent).reshape(shape)
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    beginning = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([(1 - weight) * end + weight * beginning, rest], axis=axis)
