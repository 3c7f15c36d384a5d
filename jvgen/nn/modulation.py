"""Adaptive layer norm: shifts, scales and gates from a conditioning vector, separate for text and video rows."""

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

    The product is in `dtype` (it is a fifth of a block's parameters); its result is float32, because it is combined
    with normalized activations before they are rounded.

    Args:
      condition: width of the conditioning vector.
      features: width of each part.
      parts: number of vectors.
      kernel_init: with zeros every block is initially the identity (adaLN-zero).
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
    """Shift, scale and gate of every row of a sequence, float32, broadcastable to `B L D`."""

    shift: Float[Array, "B L D"]
    scale: Float[Array, "B L D"]
    gate: Float[Array, "B L D"]


def by_modality(is_video: Bool[Array, "L"], video: jax.Array, text: jax.Array) -> Float[Array, "B L D"]:
    """`video` (`B 1 D`) in rows where the mask is true, `text` in the others.

    A select per row instead of two slices: it fuses with its consumers, and needs no communication for a sharded
    sequence.
    """

    def select(is_video: jax.Array, video: jax.Array, text: jax.Array) -> jax.Array:
        return jnp.where(is_video[None, :, None], video, text)

    # Without this, its gradient would store a mask with channels.
    return jax.checkpoint(select, prevent_cse=False)(is_video, video, text)


class TextVideoModulation(nnx.Module):
    """Shift, scale and gate for the video rows, then for the text rows (six vectors, in the order of diffusers)."""

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

    The backward pass recomputes it from `x`: storing the intermediate arrays costs more memory, and more time.
    """

    def compute(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        return (norm(x.astype(jnp.float32)) * (1.0 + scale) + shift).astype(x.dtype)

    return jax.checkpoint(compute, prevent_cse=False)(x, shift, scale)


def gated_residual(
    x: Float[Array, "B L D"], update: Float[Array, "B L D"], gate: Float[Array, "B #L D"]
) -> Float[Array, "B L D"]:
    """`x + gate * update`, added in float32 and rounded once to the dtype of `x`."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
