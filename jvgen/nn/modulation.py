"""Adaptive layer norm: scales, shifts and gates computed from a conditioning vector, apart for text and video rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from jvgen.nn.linear import Initializer, Linear
from jvgen.nn.norm import LayerNorm
from jvgen.parallel import axes

DEFAULT_INIT = nnx.initializers.normal(0.02)


class Modulation(nnx.Module):
    """SiLU and one Linear from a conditioning vector to `parts` vectors: `B C -> parts x (B 1 features)`, float32.

    The product runs in `dtype` (it is a fifth of a block's parameters); what it gives is float32, because it meets
    normalised activations before they are rounded.

    Args:
      condition: width of the conditioning vector.
      features: width of each part.
      parts: number of vectors.
      kernel_init: zeros make every block start as the identity (adaLN-zero).
    """

    def __init__(
        self,
        condition: int,
        features: int,
        parts: int,
        *,
        kernel_init: Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        self.parts = parts
        self.projection = Linear(
            condition, parts * features, axes=(axes.CONDITION, axes.EMBED), kernel_init=kernel_init, rngs=rngs
        )

    def __call__(self, condition: Float[Array, "B C"], dtype: jnp.dtype) -> tuple[Float[Array, "B 1 D"], ...]:
        vectors = self.projection(jax.nn.silu(condition).astype(dtype)).astype(jnp.float32)
        return tuple(rearrange(vectors, "b (p d) -> p b 1 d", p=self.parts))


class RowModulation(NamedTuple):
    """Shift, scale and gate of every row of a sequence, float32, `B L D` or what broadcasts to it."""

    shift: Float[Array, "B L D"]
    scale: Float[Array, "B L D"]
    gate: Float[Array, "B L D"]


def by_modality(is_video: Bool[Array, "L"], video: jax.Array, text: jax.Array) -> Float[Array, "B L D"]:
    """Rows of `video` (`B 1 D`) where the mask holds, rows of `text` elsewhere.

    A select by row, and not two slices: it fuses into what reads it and needs no communication when the sequence is
    split over devices.
    """

    def select(is_video: jax.Array, video: jax.Array, text: jax.Array) -> jax.Array:
        return jnp.where(is_video[None, :, None], video, text)

    # Its gradient would keep the mask of every row and channel, not of every row.
    return jax.checkpoint(select, prevent_cse=False)(is_video, video, text)


class TextVideoModulation(nnx.Module):
    """Shift, scale and gate for the video rows and again for the text rows (six vectors, in the order of diffusers)."""

    def __init__(self, condition: int, features: int, *, kernel_init: Initializer = DEFAULT_INIT, rngs: nnx.Rngs):
        self.vectors = Modulation(condition, features, 6, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, condition: Float[Array, "B C"], is_video: Bool[Array, "L"], dtype: jnp.dtype) -> RowModulation:
        video_and_text = self.vectors(condition, dtype)
        rows = (
            by_modality(is_video, video, text)
            for video, text in zip(video_and_text[:3], video_and_text[3:], strict=True)
        )
        return RowModulation(*rows)


def modulated_norm(
    norm: LayerNorm, x: Float[Array, "B L D"], shift: Float[Array, "B #L D"], scale: Float[Array, "B #L D"]
) -> Float[Array, "B L D"]:
    """`norm(x) * (1 + scale) + shift` in float32, rounded once to the dtype of `x`.

    The backward pass starts from `x` again: storing what is between costs more memory and more time than computing it.
    """

    def compute(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        return (norm(x.astype(jnp.float32)) * (1.0 + scale) + shift).astype(x.dtype)

    return jax.checkpoint(compute, prevent_cse=False)(x, shift, scale)


def gated_residual(
    x: Float[Array, "B L D"], update: Float[Array, "B L D"], gate: Float[Array, "B #L D"]
) -> Float[Array, "B L D"]:
    """`x + gate * update`, added in float32 and rounded once to the dtype of `x`."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
