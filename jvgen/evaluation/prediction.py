"""Scores of predicted clips: best of several samples, by horizon, with and without context frames."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def best_of(scores: Float[Array, "B S F"], *, higher_is_better: bool) -> Float[Array, "B"]:
    """The best of S samples of each clip, by the mean over frames.

    The protocol of video prediction for an uncertain future (Babaeizadeh et al. 2018; 100 samples in iVideoGPT): each
    metric selects its own best sample. It rewards diverse samples.

    Args:
      scores: per frame of every sample.
      higher_is_better: PSNR and SSIM; not LPIPS.
    """
    by_sample = jnp.mean(scores, axis=-1)
    return jnp.max(by_sample, axis=-1) if higher_is_better else jnp.min(by_sample, axis=-1)


def by_horizon(scores: Float[Array, "B *S F"]) -> Float[Array, "F"]:
    """The mean score of each predicted frame, over clips and samples."""
    return jnp.mean(scores, axis=tuple(range(scores.ndim - 1)))


def with_context(future: Float[Array, "B S F"], context: Float[Array, "B T"]) -> Float[Array, "B S G"]:
    """Scores of whole clips as in iVideoGPT's published numbers: reconstructed context frames, then predictions.

    Args:
      future: scores of predicted frames, of every sample.
      context: scores of the reconstructed context frames, common to all samples.
    """
    shared = jnp.broadcast_to(context[:, None], (*future.shape[:2], context.shape[1]))
    return jnp.concatenate([shared, future], axis=-1)
