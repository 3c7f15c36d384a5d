"""Frames that a clip is conditioned on (image to video): which they are, their latents, and how training draws them."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.diffusion.objective import slot_keys, slot_normal
from jvgen.models.video_dit.config import VideoDiTConfig

# "first_frame" as CogVideoX's image-to-video networks; "first_and_last" to make what lies between two frames.
Condition = Literal["none", "first_frame", "first_and_last"]
PLACES: dict[str, tuple[int, ...]] = {"none": (), "first_frame": (0,), "first_and_last": (0, -1)}

# What the offset embedding of CogVideoX1.5's image-to-video network is trained and sampled with.
OFFSET = 2.0

# Purposes folded into the key of a step, besides those of jvgen.tasks.text_to_video; old numbers never change.
NOISE_KEY = 32
NOISE_LEVEL_KEY = 33
DROPOUT_KEY = 34
FRAME_POSTERIOR_KEY = 35
VIDEO_POSTERIOR_KEY = 36


class GivenPixels(NamedTuple):
    """Pixels that clips are made from, uint8 in [0, 255]; None for what is not given.

    Attributes:
      frames: frames that clips are conditioned on, `B K H W 3`, or `B V K H W 3` for views.
      video: whole clips `B F H W 3` that sampling starts from, partly noised.
    """

    frames: jax.Array | None = None
    video: jax.Array | None = None


def check_condition(condition: Condition, denoiser: VideoDiTConfig, where: str) -> None:
    """Raise `ValueError`, which starts with `where`, for a denoiser whose inputs are not those of a condition."""
    channels, predicted = denoiser.in_channels, denoiser.out_channels
    image_to_video = "an image-to-video network, which takes the latents of given frames beside the noise"
    if condition == "none" and channels != predicted:
        raise ValueError(
            f"{where}: in_channels = {channels}, out_channels = {predicted}: {image_to_video}. Set task.condition = "
            "first_frame (and in_channels to twice out_channels); for text to video both must be equal."
        )
    if condition != "none" and channels != 2 * predicted:
        raise ValueError(
            f"{where}: in_channels = {channels}, out_channels = {predicted}: no channels for the given frames of "
            f"condition = {condition!r}; it needs in_channels = {2 * predicted}, as {image_to_video}. Set condition = "
            "'none' for text to video."
        )
    if condition == "none" and denoiser.offset_width is not None:
        raise ValueError(
            f"{where}: offset_width = {denoiser.offset_width}: only image-to-video networks have an offset embedding; "
            "set it to none, or set task.condition = first_frame."
        )


def check_given(condition: Condition, given: int) -> None:
    """Raise `ValueError` unless `given` images are what clips of this condition are made from."""
    needed = len(PLACES[condition])
    if given == needed:
        return
    if needed == 0:
        raise ValueError(
            "--image: these weights make clips from text alone (condition = 'none'); leave --image out, or give "
            "weights of an image-to-video network."
        )
    flags = "--image FILE" if needed == 1 else "--image FILE and --last-image FILE"
    problem = (
        "--last-image: only the first frame is given to them; leave it out" if given > needed else "none are given"
    )
    if 0 < given < needed:
        problem = "the last frame is missing"
    raise ValueError(f"these weights make clips from images (condition = {condition!r}), {problem}: give {flags}.")


def of_clip(video: np.ndarray | jax.Array, condition: Condition, axis: int) -> np.ndarray | jax.Array:
    """The frames of clips that they are conditioned on; `axis` is that of the frames."""
    return video.take(np.asarray(PLACES[condition]), axis=axis)


def require_pixels(
    example: dict[str, Any], why: str = "task.condition: the given frames are encoded from"
) -> np.ndarray:
    """The clip's pixels.

    Args:
      why: the field that needs them, and what reads them, for the message.

    Raises:
      ValueError: an example of cached latents without them.
    """
    if "video" not in example:
        raise ValueError(
            f"{why} pixels, but the data set holds cached latents only; build it with `jvgen "
            "data build latents --keep-clips`, or set task.latents = 'pixels'."
        )
    return example["video"]


def noised(frames: jax.Array, key: jax.Array, slots: jax.Array, *, mean: float | None, std: float) -> jax.Array:
    """Frames `B K H W 3` in [-1, 1] with noise, as CogVideoX trains image to video.

    Its standard deviation is drawn once per clip; the logarithm has the given mean and standard deviation. A mean of
    None adds no noise.
    """
    if mean is None:
        return frames
    shape = (frames.shape[0], *(1,) * (frames.ndim - 1))
    level = jnp.exp(mean + std * slot_normal(jax.random.fold_in(key, NOISE_LEVEL_KEY), shape, slots))
    noise = slot_normal(jax.random.fold_in(key, NOISE_KEY), frames.shape, slots)
    return frames + (level * noise).astype(frames.dtype)


def dropped(latents: jax.Array, key: jax.Array, slots: jax.Array, fraction: float) -> jax.Array:
    """Latents `B ...` with zeros for random slots."""
    keys = slot_keys(jax.random.fold_in(key, DROPOUT_KEY), slots)
    drop = jax.vmap(lambda k: jax.random.bernoulli(k, fraction))(keys)
    return jnp.where(drop.reshape(-1, *(1,) * (latents.ndim - 1)), 0.0, latents)


def placed(latents: jax.Array, condition: Condition, frames: int) -> jax.Array:
    """Latents `B K H W C` of the given frames at their places among `frames` latent frames, zeros at the others.

    With the padding of CogVideoX1.5 the first place is that of the padding, as published.
    """
    clip = jnp.zeros((latents.shape[0], frames, *latents.shape[2:]), latents.dtype)
    return clip.at[:, np.asarray(PLACES[condition])].set(latents)


def one_by_one(frames: jax.Array) -> jax.Array:
    """Frames `B K ...` as clips of one frame, `(B K) 1 ...`: each is encoded for itself."""
    return rearrange(frames, "b k ... -> (b k) 1 ...")
