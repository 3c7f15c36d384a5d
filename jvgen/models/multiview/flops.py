"""Floating-point operations of one forward pass for one view, by component."""

import math

from jvgen.models.multiview.config import MultiViewDiTConfig
from jvgen.models.multiview.synchronization import SyncMode
from jvgen.models.video_dit import flops as video_dit_flops
from jvgen.nn.embeddings import token_grid


def forward_flops(
    config: MultiViewDiTConfig, shape: tuple[int, int, int], views: int, text: int | None = None
) -> dict[str, float]:
    """As `jvgen.models.video_dit.flops.forward_flops`, with "synchronization" and "rays".

    Args:
      config: of the network.
      shape: frames, height and width of the latent clip.
      views: views per example; JOINT modules attend to all of them.
      text: text tokens; the configured length if None.
    """
    parts = video_dit_flops.forward_flops(config.plain, shape, text)
    frames, rows, columns = token_grid(shape, config.patch_shape)
    tokens, width = frames * rows * columns, config.width
    if config.sync is not None:
        keys = rows * columns * (views if config.sync.mode is SyncMode.JOINT else 1)
        # Projections in and out; queries, keys, values and outputs, GEGLU's three matrices; scores and weighted sums.
        depth, sublayers = config.sync.depth, config.sync.sublayers
        matrices = 2 + depth * (4 * sublayers + 12)
        parts["synchronization"] = float(
            config.sync_layers * 2 * tokens * (matrices * width**2 + depth * sublayers * 2 * keys * width)
        )
    if config.rays:
        pixels = math.prod(config.patch_shape)
        parts["rays"] = float(2 * tokens * width * pixels * 6 * config.temporal_compression)
    return parts
