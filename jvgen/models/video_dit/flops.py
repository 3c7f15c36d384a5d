"""FLOPs of one forward pass of the denoiser, by component."""

import math

from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.embeddings import token_grid


def forward_flops(config: VideoDiTConfig, shape: tuple[int, int, int], text: int | None = None) -> dict[str, float]:
    """FLOPs of all matrix products for one clip; a backward pass takes twice as many.

    Norms, softmax and other elementwise operations are not counted (about 1%). Padding is not counted.

    Args:
      config: of the network.
      shape: frames, height and width of the latent clip.
      text: rows of text; the configured length if None.

    Returns:
      "embedding", "projections" (queries, keys, values, output), "attention" (scores and weighted sums),
      "feed_forward", "modulation" and "head".
    """
    text = config.text_length if text is None else text
    video = math.prod(token_grid(shape, config.patch_shape))
    rows = text + video
    width, condition = config.width, config.condition_width
    pixels = math.prod(config.patch_shape)
    timestep = 2 * condition * (width + condition)
    offset = 0 if config.offset_width is None else 2 * condition * (config.offset_width + condition)
    return {
        "embedding": float(
            2 * width * (video * pixels * config.in_channels + text * config.text_width) + timestep + offset
        ),
        "projections": float(config.layers * 2 * rows * 4 * width**2),
        "attention": float(config.layers * 2 * rows * rows * 2 * width),
        "feed_forward": float(config.layers * 2 * rows * 2 * width**2 * config.feed_forward_ratio),
        "modulation": float(2 * condition * width * (12 * config.layers + 2)),
        "head": float(2 * video * width * pixels * config.out_channels),
    }
