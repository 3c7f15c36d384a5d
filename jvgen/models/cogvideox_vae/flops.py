"""FLOPs of the autoencoder's convolutions, computed from its configuration."""

from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig, frame_chunks
from jvgen.nn.conv import convolution_flops

Shape = tuple[int, int, int]


def encode(config: CogVideoXVAEConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of encoding one clip; a multiplication and an addition count as two."""
    chunks = frame_chunks(frames, config.encode_chunk_frames)
    return {"encoder convolutions": sum(_encode(config, (b - a, height, width)) for a, b in chunks)}


def decode(config: CogVideoXVAEConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of decoding one clip; the arguments are those of its latents."""
    chunks = frame_chunks(frames, config.decode_chunk_frames)
    return {"decoder convolutions": sum(_decode(config, (b - a, height, width)) for a, b in chunks)}


def reconstruct(config: CogVideoXVAEConfig, frames: int, height: int, width: int) -> dict[str, float]:
    """Forward FLOPs of encoding and decoding one clip, by component."""
    return {
        **encode(config, frames, height, width),
        **decode(config, *config.latent_shape(frames, height, width)),
    }


def _encode(config: CogVideoXVAEConfig, shape: Shape) -> float:
    widths = config.block_channels
    total = _conv(config.channels, widths[0], shape)
    for index, features in enumerate(widths):
        total += _level(widths[max(index - 1, 0)], features, config.layers_per_block, shape)
        if index < len(widths) - 1:
            frames = shape[0] // 2 + shape[0] % 2 if index < config.temporal_levels else shape[0]
            shape = (frames, shape[1] // 2, shape[2] // 2)
            total += _each_frame(features, shape)
    return total + 2 * _residual(widths[-1], widths[-1], shape) + _conv(widths[-1], 2 * config.latent_channels, shape)


def _decode(config: CogVideoXVAEConfig, shape: Shape) -> float:
    widths, latent = config.block_channels[::-1], config.latent_channels
    small = shape
    total = _conv(latent, widths[0], shape) + 2 * _residual(widths[0], widths[0], shape, latent, small)
    for index, features in enumerate(widths):
        total += _level(widths[max(index - 1, 0)], features, config.layers_per_block + 1, shape, latent, small)
        if index < len(widths) - 1:
            frames = shape[0]
            if index < config.temporal_levels and frames > 1:
                frames = 2 * frames - frames % 2
            shape = (frames, 2 * shape[1], 2 * shape[2])
            total += _each_frame(features, shape)
    return total + _condition(widths[-1], latent, small) + _conv(widths[-1], config.channels, shape)


def _conv(features_in: int, features_out: int, shape: Shape) -> float:
    return convolution_flops((3, 3, 3, features_in, features_out), shape)


def _each_frame(features: int, shape: Shape) -> float:
    return convolution_flops((3, 3, features, features), shape)


def _condition(features: int, latent: int, small: Shape) -> float:
    return 2 * convolution_flops((latent, features), small)


def _residual(features_in: int, features_out: int, shape: Shape, latent: int = 0, small: Shape = (0, 0, 0)) -> float:
    total = _conv(features_in, features_out, shape) + _conv(features_out, features_out, shape)
    if features_in != features_out:
        total += convolution_flops((features_in, features_out), shape)
    return total + _condition(features_in, latent, small) + _condition(features_out, latent, small)


def _level(
    features_in: int, features_out: int, layers: int, shape: Shape, latent: int = 0, small: Shape = (0, 0, 0)
) -> float:
    first = _residual(features_in, features_out, shape, latent, small)
    return first + (layers - 1) * _residual(features_out, features_out, shape, latent, small)
