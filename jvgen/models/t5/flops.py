"""FLOPs of one forward pass of the T5 encoder, by component."""

from jvgen.models.t5.config import T5Config


def forward_flops(config: T5Config, length: int) -> dict[str, float]:
    """FLOPs of all matrix products for one caption of `length` tokens."""
    inner = config.heads * config.head_width
    return {
        "projections": float(config.layers * 2 * length * 4 * config.width * inner),
        "attention": float(config.layers * 2 * length * length * 2 * inner),
        "feed_forward": float(config.layers * 2 * length * 3 * config.width * config.hidden),
    }
