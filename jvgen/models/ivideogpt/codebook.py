"""Vector quantization: latents to the nearest of a set of learned vectors, trained by gradients alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jvgen.parallel.axes import CODES


class Quantized(NamedTuple):
    """Quantized latents.

    Attributes:
      vectors: the nearest vectors, in the dtype of the latents; gradients pass straight through to the latents.
      ids: their indices, int32.
      loss: codebook term (moves the vectors) plus commitment term (moves the latents), mean squared distances, float32.
    """

    vectors: jax.Array
    ids: jax.Array
    loss: jax.Array


class Codebook(nnx.Module):
    """`count` vectors (van den Oord et al. 2017, arXiv 1711.00937), without EMA updates and without normalization.

    Args:
      count: number of vectors.
      width: of a vector.
      commitment: weight of the commitment term.
    """

    def __init__(self, count: int, width: int, *, commitment: float, rngs: nnx.Rngs):
        self.commitment = commitment
        table = jax.random.uniform(rngs.params(), (count, width), jnp.float32, -1.0 / count, 1.0 / count)
        self.table = nnx.Param(table, logical_axes=(CODES, None))

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The vectors of ids, float32; ids out of range give the first or the last vector."""
        return jnp.take(self.table[...], ids, axis=0, mode="clip")

    def nearest(self, latents: Float[Array, "*B D"]) -> Int[Array, "*B"]:
        """Index of the vector at the smallest Euclidean distance; computed in float32 on every device."""
        z, e = latents.astype(jnp.float32), self.table[...].astype(jnp.float32)
        # |z - e|^2 without |z|^2, which is the same for all vectors.
        dot = jnp.einsum("...d,kd->...k", z, e, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(jnp.sum(jnp.square(e), axis=-1) - 2.0 * dot, axis=-1).astype(jnp.int32)

    def quantize(self, latents: Float[Array, "*B D"]) -> Quantized:
        """Nearest vectors, with straight-through gradients and the codebook loss."""
        ids = self.nearest(latents)
        z, e = latents.astype(jnp.float32), self(ids).astype(jnp.float32)
        stop = jax.lax.stop_gradient
        loss = self.commitment * jnp.mean(jnp.square(stop(e) - z)) + jnp.mean(jnp.square(e - stop(z)))
        return Quantized((z + stop(e - z)).astype(latents.dtype), ids, loss)


def usage(ids: Int[Array, "*B"], count: int) -> Float[Array, "{count}"]:
    """How often each of `count` codes occurs, float32."""
    return jnp.zeros((count,), jnp.float32).at[ids.reshape(-1)].add(1.0)


def perplexity(counts: Float[Array, "K"]) -> Float[Array, ""]:
    """exp of the entropy of the codes' frequencies: the number of equally frequent codes with the same entropy."""
    share = counts / jnp.maximum(jnp.sum(counts), 1.0)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0)))
