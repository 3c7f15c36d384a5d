"""FLOPs of the discriminator's convolutions, computed from its configuration."""

from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.nn.conv import convolution_flops


def forward(config: ClipDiscriminatorConfig, frames: int, height: int, width: int) -> float:
    """Forward FLOPs of one clip; a multiplication and an addition count as two."""
    widths = config.widths
    size = ((frames - 1) // 2 + 1, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    total = convolution_flops((3, 3, 3, config.channels, widths[0]), size)
    for index, features in enumerate(widths[1:]):
        before = widths[index]
        total += convolution_flops((3, 3, 3, before, features), size)
        if index < config.halvings:
            size = ((size[0] + 1) // 2, size[1] // 2, size[2] // 2)
        total += convolution_flops((3, 3, 3, features, features), size)
        total += 0.0 if before == features else convolution_flops((before, features), size)
    return total + convolution_flops((3, 3, 3, widths[-1], 1), size)
