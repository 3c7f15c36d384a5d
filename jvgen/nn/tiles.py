"""Blending of overlapping tiles of an image or a clip."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def blend(
    before: Float[Array, "B F H W C"], after: Float[Array, "B F h w C"], extent: int, *, axis: int
) -> Float[Array, "B F h w C"]:
    """`after`, with its first `extent` elements along an axis blended linearly with the last ones of `before`.

    The first element is that of `before` alone. The extent is limited by the size of both tiles.
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
