"""How a clip hangs together in time: measures on neighbouring frames, traced or on the host."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.evaluation.reconstruction import structural_similarity


def smoothness(clip: Float[Array, "*B F H W C"], *, data_range: float) -> Float[Array, "*B"]:
    """1 minus the mean absolute difference of neighbouring frames, as a share of the range: 1 for a still clip.

    High for a still or smooth clip, low for a flickering one (the "temporal flickering" of VBench, without its
    selection of still scenes). Read it beside the value of real clips: motion lowers it too.
    """
    _check(clip.shape[-4])
    return 1.0 - jnp.mean(jnp.abs(_differences(clip)), axis=(-4, -3, -2, -1)) / data_range


def adjacent_similarity(clip: Float[Array, "*B F H W C"], *, data_range: float) -> Float[Array, "*B"]:
    """Mean SSIM of neighbouring frames: 1 for a still clip."""
    _check(clip.shape[-4])
    clip = clip.astype(jnp.float32)
    earlier, later = clip[..., :-1, :, :, :], clip[..., 1:, :, :, :]
    return jnp.mean(structural_similarity(earlier, later, data_range=data_range), axis=-1)


def motion_error(
    prediction: Float[Array, "*B F H W C"], target: Float[Array, "*B F H W C"], *, data_range: float
) -> Float[Array, "*B"]:
    """Mean absolute error of the frame differences, as a share of the range: 0 for a reconstruction that moves alike.

    Blind to a constant error, so it separates flicker and lost motion from wrong colours.
    """
    _check(prediction.shape[-4])
    error = jnp.abs(_differences(prediction) - _differences(target))
    return jnp.mean(error, axis=(-4, -3, -2, -1)) / data_range


def _differences(clip: Array) -> Array:
    clip = clip.astype(jnp.float32)
    return clip[..., 1:, :, :, :] - clip[..., :-1, :, :, :]


def _check(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"a clip of {frames} frame has no neighbouring frames; at least 2 are needed.")
