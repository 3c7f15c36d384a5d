"""Networks as small as they come, with random parameters, for tests of files of weights."""

from typing import Any

import numpy as np

from jvgen.config import Config
from jvgen.interop.formats import format_of
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.video_dit.config import AggregationConfig, VideoDiTConfig
from jvgen.nested import map_with_path

VAE = ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4)
# With gates, which are in a file of their own.
DENOISER = VideoDiTConfig(
    layers=1, heads=2, head_width=16, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=16,
    sample_height=4, sample_width=6, sample_frames=3, aggregation=AggregationConfig(),
)  # fmt: skip


def drawn(config: Config, seed: int = 0) -> dict[str, Any]:
    """Normal parameters of the network of a config, float32."""
    rng = np.random.default_rng(seed)
    shapes = format_of(config).network(config).shapes
    return map_with_path(lambda path, leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
