"""Temporal consistency of clips: metrics on neighboring frames, traced or eager."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.evaluation.reconstruction import structural_similarity


def smoothness(clip: Float[Array, "*B F H W C"], *, data_range: float) -> Float[Array, "*B"]:
    """1 minus the mean absolute difference of neighboring frames, as a share of the range: 1 for a static clip.

    High for static or smooth clips, low for flickering ones ("temporal flickering" of VBench, without its selection of
    static scenes). Compare with the value of real clips: motion lowers it too.
    """
    _check(clip.shape[-4])
    return 1.0 - jnp.mean(jnp.abs(_differences(clip)), axis=(-4, -3, -2, -1)) / data_range


def adjacent_similarity(clip: Float[Array, "*B F H W C"], *, data_range: float) -> Float[Array, "*B"]:
    """Mean SSIM of neighboring frames: 1 for a static clip."""
    _check(clip.shape[-4])
    clip = clip.astype(jnp.float32)
    earlier, later = clip[..., :-1, :, :, :], clip[..., 1:, :, :, :]
    return jnp.mean(structural_similarity(earlier, later, data_range=data_range), axis=-1)


def motion_error(
    prediction: Float[Array, "*B F H W C"], target: Float[Array, "*B F H W C"], *, data_range: float
) -> Float[Array, "*B"]:
    """Mean absolute error of the frame differences, as a share of the range: 0 for equal motion.

    Invariant to a constant error, so it measures flicker and lost motion, not wrong colors.
    """
    _check(prediction.shape[-4])
    error = jnp.abs(_differences(prediction) - _differences(target))
    return jnp.mean(error, axis=(-4, -3, -2, -1)) / data_range


def _differences(clip: Array) -> Array:
    clip = clip.astype(jnp.float32)
    return clip[..., 1:, :, :, :] - clip[..., :-1, :, :, :]


def _check(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"a clip of {frames} frames has no neighboring frames; at least 2 are needed.")
