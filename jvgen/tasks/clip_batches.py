"""Arrays of an example of single clips: shapes and dtypes, how they are made of a decoded example, frames of tokens."""

from typing import Any

import jax
import numpy as np

from jvgen.data.stream.config import BucketConfig
from jvgen.parallel import axes
from jvgen.tasks.given_frames import of_clip, require_pixels
from jvgen.tasks.task import ArraySpec, Batch
from jvgen.tasks.text_to_video_config import TextToVideoFields

# Frames beside cached latents that an image encoder reads, one per latent frame.
ALIGNED = "aligned"


def fields(config: TextToVideoFields, bucket: BucketConfig) -> dict[str, ArraySpec]:
    """The arrays of one example, but the caption: "video", or "latents" with the pixels that are needed beside them.

    Raises:
      ValueError: a size that the networks cannot take.
    """
    frames, height, width = config.latent_shape(bucket.frames, bucket.height, bucket.width)
    names = (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)

    def pixels(frames: int) -> ArraySpec:
        return ArraySpec((frames, bucket.height, bucket.width, 3), np.dtype(np.uint8), names)

    if config.latents == "pixels":
        return {"video": pixels(bucket.frames)}
    shape = (frames, height, width, 2 * config.denoiser.out_channels)
    found = {"latents": ArraySpec(shape, np.dtype(np.float32), names)}
    if config.given_frames:
        found["given"] = pixels(config.given_frames)
    if config.alignment is not None:
        found[ALIGNED] = pixels(frames)
    return found


def prepare(config: TextToVideoFields, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `fields` of one decoded example.

    Raises:
      ValueError: an example without the pixels or latents that the task trains on.
    """
    if config.latents == "pixels":
        if "video" not in example:
            raise ValueError("task.latents = 'pixels', but the data set holds cached latents only: set it to 'data'.")
        return {"video": example["video"]}
    if "latents" not in example:
        raise ValueError(
            "task.latents = 'data', but the data set holds pixels: cache latents with `jvgen data build latents`, "
            "or set task.latents = 'pixels'."
        )
    found = {"latents": example["latents"]}
    if config.given_frames:
        found["given"] = of_clip(require_pixels(example), config.condition, axis=0)
    if config.alignment is not None:
        video = require_pixels(example, "task.alignment: the image encoder reads")
        found[ALIGNED] = video[:: config.temporal_compression]
    return found


def latent_pixels(config: TextToVideoFields, batch: Batch) -> jax.Array:
    """For each latent frame the last recorded frame that it stands for, uint8 `B F H W 3`."""
    return batch[ALIGNED] if ALIGNED in batch else batch["video"][:, :: config.temporal_compression]
