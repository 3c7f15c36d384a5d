"""Scores of predicted clips: the best of several samples, by horizon, with and without the frames that were given."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def best_of(scores: Float[Array, "B S F"], *, higher_is_better: bool) -> Float[Array, "B"]:
    """The best of S samples of each clip: frames are averaged first, then the best sample counts.

    This is how video prediction is scored by frame-wise measures when the future is uncertain (Babaeizadeh et al. 2018,
    and with 100 samples in iVideoGPT): each measure picks its own best sample. It is no property of one sample: a model
    that scatters more is given more tries to hit.

    Args:
      scores: one a frame, of every sample.
      higher_is_better: PSNR and SSIM; not LPIPS.
    """
    by_sample = jnp.mean(scores, axis=-1)
    return jnp.max(by_sample, axis=-1) if higher_is_better else jnp.min(by_sample, axis=-1)


def by_horizon(scores: Float[Array, "B *S F"]) -> Float[Array, "F"]:
    """The mean score of each predicted frame, over clips and samples."""
    return jnp.mean(scores, axis=tuple(range(scores.ndim - 1)))


def with_context(future: Float[Array, "B S F"], context: Float[Array, "B T"]) -> Float[Array, "B S G"]:
    """Scores of whole clips, as the published numbers of iVideoGPT count them: reconstructed context frames first.

    Args:
      future: scores of predicted frames, of every sample.
      context: scores of the reconstructed context frames, which all samples share.
    """
    shared = jnp.broadcast_to(context[:, None], (*future.shape[:2], context.shape[1]))
    return jnp.concatenate([shared, future], axis=-1)
