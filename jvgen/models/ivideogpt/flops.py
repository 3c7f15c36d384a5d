"""FLOPs of iVideoGPT's networks by component, from their configurations alone; a multiply-add counts as two."""

from jvgen.models.image_vae import flops as autoencoder
from jvgen.models.ivideogpt.config import CROSS_HEADS, CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.layout import Layout

Parts = dict[str, float]


def tokenize(config: CompressiveTokenizerConfig, frames: int) -> Parts:
    """Forward FLOPs of tokenizing one clip, by component."""
    plain, attending = _backbones(config)
    side, context, future = config.resolution, config.context_frames, frames - config.context_frames
    parts = {
        "context encoder": context * sum(autoencoder.encode(plain, side, side).values()),
        "prediction encoder": future * sum(autoencoder.encode(attending, side, side).values()),
        "encoder cross-attention": _attend(config, config.encoder_sites(), config.block_channels, future),
    }
    codes = context * config.context_tokens * config.context_codes + future * config.future_tokens * config.future_codes
    return {**parts, "codebooks": 2.0 * codes * config.code_width}


def reconstruct(config: CompressiveTokenizerConfig, frames: int) -> Parts:
    """Forward FLOPs of tokenizing and decoding one clip, by component."""
    plain, attending = _backbones(config)
    context, future = config.context_frames, frames - config.context_frames
    return {
        **tokenize(config, frames),
        "context decoder": context * sum(autoencoder.decode(plain, config.grid, config.grid).values()),
        "prediction decoder": future * sum(autoencoder.decode(attending, config.grid, config.grid).values()),
        "decoder cross-attention": _attend(config, config.decoder_sites(), config.block_channels[::-1], future),
    }


def forward(config: FrameTransformerConfig, layout: Layout) -> Parts:
    """Forward FLOPs of one sequence, by component; scores are computed at target positions only."""
    length, width = layout.length, config.width
    targets = layout.length - layout.prompt_length - 1
    return {
        "projections": float(config.layers * 2 * length * 4 * width * width),
        # Half of the pairs: attention is causal.
        "attention": float(config.layers * 2 * length * length * width),
        "feed_forward": float(config.layers * 2 * length * 3 * width * config.hidden),
        "scores": float(2 * targets * width * config.vocabulary),
    }


def _backbones(config: CompressiveTokenizerConfig):
    return config.backbone(mid_attention=config.context_mid_attention), config.backbone(mid_attention=True)


def _attend(
    config: CompressiveTokenizerConfig, sites: tuple[tuple[int, int], ...], widths: tuple[int, ...], future: int
) -> float:
    total = 0.0
    for level, side in sites:
        width, own, context = widths[max(level, 0)], side * side * future, side * side * config.context_frames
        assert width % CROSS_HEADS == 0
        total += 2.0 * width * width * (2 * own + 2 * context) + 4.0 * own * context * width
    return total
