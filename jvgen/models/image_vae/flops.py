"""FLOPs of the autoencoder's matrix products and convolutions, computed from its configuration."""

from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.conv import convolution_flops


def encode(config: ImageVAEConfig, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of encoding one image, by component; a multiplication and an addition count as two."""
    widths = config.block_channels
    latent = 2 * config.latent_channels
    size = (height, width)
    total = _conv(config.channels, widths[0], size)
    for index, features in enumerate(widths):
        total += _level(widths[max(index - 1, 0)], features, config.layers_per_block, size)
        if index < len(widths) - 1:
            size = (size[0] // 2, size[1] // 2)
            total += _conv(features, features, size)
    total += 2 * _residual(widths[-1], widths[-1], size) + _conv(widths[-1], latent, size)
    if config.quant_convolutions:
        total += _pointwise(latent, latent, size)
    return {"encoder convolutions": total, **_attention("encoder attention", config, size)}


def decode(config: ImageVAEConfig, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of decoding one image, by component; height and width are those of its latent."""
    widths = config.block_channels[::-1]
    latent = config.latent_channels
    size = (height, width)
    total = _conv(latent, widths[0], size) + 2 * _residual(widths[0], widths[0], size)
    if config.quant_convolutions:
        total += _pointwise(latent, latent, size)
    attention = _attention("decoder attention", config, size)
    for index, features in enumerate(widths):
        total += _level(widths[max(index - 1, 0)], features, config.layers_per_block + 1, size)
        if index < len(widths) - 1:
            size = (2 * size[0], 2 * size[1])
            total += _conv(features, features, size)
    return {"decoder convolutions": total + _conv(widths[-1], config.channels, size), **attention}


def reconstruct(config: ImageVAEConfig, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of encoding and decoding one image, by component."""
    return {**encode(config, height, width), **decode(config, *config.latent_size(height, width))}


def _conv(features_in: int, features_out: int, size: tuple[int, int]) -> float:
    return convolution_flops((3, 3, features_in, features_out), size)


def _pointwise(features_in: int, features_out: int, size: tuple[int, int]) -> float:
    return convolution_flops((features_in, features_out), size)


def _residual(features_in: int, features_out: int, size: tuple[int, int]) -> float:
    total = _conv(features_in, features_out, size) + _conv(features_out, features_out, size)
    return total + (0.0 if features_in == features_out else _pointwise(features_in, features_out, size))


def _level(features_in: int, features_out: int, layers: int, size: tuple[int, int]) -> float:
    return _residual(features_in, features_out, size) + (layers - 1) * _residual(features_out, features_out, size)


def _attention(name: str, config: ImageVAEConfig, size: tuple[int, int]) -> dict[str, float]:
    if not config.mid_attention:
        return {}
    tokens, features = size[0] * size[1], config.block_channels[-1]
    return {name: 4 * _pointwise(features, features, size) + 4.0 * tokens**2 * features}
