"""FLOPs of the autoencoder's matrix products and convolutions, computed from its configuration."""

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.nn.conv import convolution_flops

Size = tuple[int, int, int]


def encode(config: CVVAEConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of encoding one clip, by component; a multiplication and an addition count as two."""
    widths = config.block_channels
    latent = 2 * config.latent_channels
    size = (frames, height, width)
    total = _conv(config.channels, widths[0], size)
    for index, features in enumerate(widths):
        total += _level(widths[max(index - 1, 0)], features, config.layers_per_block, size, config)
        if index < len(widths) - 1:
            halves = index in config.time_levels_down
            size = ((size[0] - 1) // 2 + 1 if halves else size[0], size[1] // 2, size[2] // 2)
            total += _conv(features, features, size)
    total += 2 * _residual(widths[-1], widths[-1], size, config) + _conv(widths[-1], latent, size)
    if config.quant_convolutions:
        total += _pointwise(latent, latent, size)
    return {"encoder convolutions": total, **_attention("encoder attention", config, size)}


def decode(config: CVVAEConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of decoding one clip, by component; frames, height and width are those of its latent."""
    widths = config.block_channels[::-1]
    latent = config.latent_channels
    size = (frames, height, width)
    total = _conv(latent, widths[0], size) + 2 * _residual(widths[0], widths[0], size, config)
    if config.quant_convolutions:
        total += _pointwise(latent, latent, size)
    attention = _attention("decoder attention", config, size)
    temporal = config.temporal_attention
    if temporal.kind != "none":
        tokens, features = height * width, widths[0]
        keys = frames if temporal.kind == "clip" else min(temporal.window, frames)
        attention["temporal attention"] = (
            4 * _pointwise(features, features, size) + 4.0 * tokens * frames * keys * features
        )
    for index, features in enumerate(widths):
        total += _level(widths[max(index - 1, 0)], features, config.layers_per_block + 1, size, config)
        if index < len(widths) - 1:
            doubles = index in config.time_levels_up
            size = (size[0], 2 * size[1], 2 * size[2])
            total += _conv(features, 2 * features if doubles else features, size)
            size = (2 * size[0] - 1 if doubles else size[0], *size[1:])
    return {"decoder convolutions": total + _conv(widths[-1], config.channels, size), **attention}


def reconstruct(config: CVVAEConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of encoding and decoding one clip, by component."""
    latent = (config.latent_frames(frames), *config.latent_size(height, width))
    return {**encode(config, frames, height, width), **decode(config, *latent)}


def _conv(features_in: int, features_out: int, size: Size) -> float:
    return convolution_flops((3, 3, 3, features_in, features_out), size)


def _pointwise(features_in: int, features_out: int, size: Size) -> float:
    return convolution_flops((features_in, features_out), size)


def _residual(features_in: int, features_out: int, size: Size, config: CVVAEConfig) -> float:
    taps = 3 if config.full_3d else 1
    total = _conv(features_in, features_out, size)
    total += convolution_flops((taps, 3, 3, features_out, features_out), size)
    return total + (0.0 if features_in == features_out else _pointwise(features_in, features_out, size))


def _level(features_in: int, features_out: int, layers: int, size: Size, config: CVVAEConfig) -> float:
    first = _residual(features_in, features_out, size, config)
    return first + (layers - 1) * _residual(features_out, features_out, size, config)


def _attention(name: str, config: CVVAEConfig, size: Size) -> dict[str, float]:
    if not config.mid_attention:
        return {}
    tokens, features = size[1] * size[2], config.block_channels[-1]
    return {name: 4 * _pointwise(features, features, size) + 4.0 * size[0] * tokens**2 * features}
