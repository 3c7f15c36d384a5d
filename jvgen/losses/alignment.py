"""Alignment of hidden states with features of other frames too: CREPA (Hwang et al. 2025, arXiv 2506.09229)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class AlignmentLoss(NamedTuple):
    """One number per clip, float32 `B`: the loss, and the mean cosine with the features of the same frame."""

    loss: jax.Array
    similarity: jax.Array


def cross_frame_alignment(
    projected: Float[Array, "B F P C"], features: Float[Array, "B F P C"], *, distance: int, decay: float
) -> AlignmentLoss:
    """Minus the cosines of projected hidden states with features of their own frame and of frames nearby.

    For frame f, the cosine with frame k has the weight exp(-|k - f| / decay), as in equation 6 of the paper for the
    neighbors k = f - 1, f + 1. The sum over k is averaged over frames and patches, where the paper adds frames up.

    Args:
      projected: by frame and patch.
      features: of the frozen encoder; no gradients go there.
      distance: frames before and after a frame that its hidden states are aligned with; 0 for its own alone (REPA).
      decay: see above, in frames of `projected`.
    """
    made, wanted = _unit(projected), jax.lax.stop_gradient(_unit(features))
    frames = made.shape[1]
    similarity = _cosines(made, wanted)
    total = similarity
    for offset in range(1, min(distance, frames - 1) + 1):
        near = _cosines(made[:, offset:], wanted[:, :-offset]) + _cosines(made[:, :-offset], wanted[:, offset:])
        total += math.exp(-offset / decay) * near
    return AlignmentLoss(-total / frames, similarity / frames)


def _cosines(made: jax.Array, wanted: jax.Array) -> jax.Array:
    """Sum over frames of the mean over patches, `B`."""
    return jnp.sum(jnp.mean(jnp.sum(made * wanted, axis=-1), axis=-1), axis=1)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
