"""FLOPs of one forward pass of the byte encoder, by component."""

from jvgen.models.byte_text.config import ByteTextConfig


def forward_flops(config: ByteTextConfig, length: int) -> dict[str, float]:
    """FLOPs of all matrix products for one caption of `length` tokens."""
    width = config.width
    return {
        "projections": float(config.layers * 2 * length * 4 * width**2),
        "attention": float(config.layers * 2 * length * length * 2 * width),
        "feed_forward": float(config.layers * 2 * length * 2 * width**2 * config.feed_forward_ratio),
    }
