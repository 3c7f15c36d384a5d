"""FLOPs of one forward pass of the DINOv2 encoder, by component."""

from jvgen.models.dinov2.config import Dinov2Config


def forward_flops(config: Dinov2Config, height: int, width: int) -> dict[str, float]:
    """FLOPs of all matrix products for one image of `height` x `width` pixels."""
    patches = (height // config.patch) * (width // config.patch)
    length, matrices = patches + 1, 3 if config.gated else 2
    return {
        "patches": float(2 * patches * 3 * config.patch**2 * config.width),
        "projections": float(config.layers * 2 * length * 4 * config.width**2),
        "attention": float(config.layers * 2 * length * length * 2 * config.width),
        "feed_forward": float(config.layers * 2 * length * matrices * config.width * config.hidden),
    }
