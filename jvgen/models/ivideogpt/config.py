"""Configurations of the two networks of iVideoGPT, with the released sizes."""

import dataclasses
from typing import ClassVar

from jvgen.config import Config
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.ivideogpt.layout import Layout
from jvgen.nn.stacked import Remat
from jvgen.value_rules import BelowOne, Count, CountOrZero, Epsilon, Frames, Layers, Pixels, Positive, Weight, Width

# Larger components of an action are refused as errors: recorded ones reach 25.
MAX_ACTION = 1e3
CROSS_HEADS = 4
CROSS_NORM_EPSILON = 1e-5  # 1e-6 in all other norms of the tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressiveTokenizerConfig(Config):
    """The compressive tokenizer (arXiv 2405.15223, section 3.1, appendix A.1).

    Attributes:
      resolution: height and width of a frame in pixels.
      channels: of a frame.
      block_channels: width of each level, finest first; each level but the last halves height and width.
      layers_per_block: residual blocks per level in the encoders; the decoders have one more.
      groups: of the backbone's group norms.
      latent_channels: channels of the latent grid.
      code_width: width of a codebook's vectors.
      context_codes, future_codes: entries of the two codebooks.
      context_frames: T0, leading frames that are coded alone; all later frames are coded given these.
      patch: side of the patch of latent cells that one token of a future frame covers.
      attention_side: cross-attention follows every level whose feature map has at most this side.
      attention_groups: groups of the cross-attention's norms; 32 in the released code, whatever the width.
      context_mid_attention: self-attention in the middle of the context pair (the prediction pair always has it).
      dropout: rate in training, of the cross-attention's weights and of its output.
      commitment: weight of the commitment term of the codebook loss.
      remat: what the backward pass keeps of each block.
    """

    resolution: Pixels = 64
    channels: Width = 3
    block_channels: tuple[Width, ...] = (128, 256, 512)
    layers_per_block: Layers = 2
    groups: Count = 32
    latent_channels: Width = 64
    code_width: Width = 64
    context_codes: Width = 8192
    future_codes: Width = 8192
    context_frames: Frames = 2
    patch: Pixels = 4
    attention_side: Pixels = 16
    attention_groups: Count = 32
    context_mid_attention: bool = False
    dropout: BelowOne = 0.1
    commitment: Weight = 1.0
    remat: Remat = Remat.NONE

    dropped_fields: ClassVar[frozenset[str]] = frozenset({"rounded_norms"})

    @classmethod
    def released_64(cls) -> "CompressiveTokenizerConfig":
        """The released tokenizer of 64x64 frames: 114,159,174 parameters."""
        return cls()

    @classmethod
    def released_256(cls) -> "CompressiveTokenizerConfig":
        """The released tokenizer of 256x256 frames: 310,472,774 parameters."""
        return cls(resolution=256, block_channels=(128, 256, 256, 512, 768), attention_side=32)

    @property
    def grid(self) -> int:
        """Side of the latent grid."""
        return self.resolution // 2 ** (len(self.block_channels) - 1)

    @property
    def context_tokens(self) -> int:
        """Tokens of a context frame."""
        return self.grid**2

    @property
    def future_tokens(self) -> int:
        """Tokens of a future frame."""
        return (self.grid // self.patch) ** 2

    def backbone(self, *, mid_attention: bool) -> ImageVAEConfig:
        """Configuration of the convolutional blocks, which are those of Stable Diffusion's autoencoder."""
        return ImageVAEConfig(
            channels=self.channels,
            latent_channels=self.latent_channels,
            block_channels=self.block_channels,
            layers_per_block=self.layers_per_block,
            groups=self.groups,
            mid_attention=mid_attention,
            quant_convolutions=False,
            remat=self.remat,
        )

    def encoder_sites(self) -> tuple[tuple[int, int], ...]:
        """(level, side) of every cross-attention of the prediction encoder."""
        last = len(self.block_channels) - 1
        sides = [self.resolution // 2 ** min(level + 1, last) for level in range(last + 1)]
        return tuple((level, side) for level, side in enumerate(sides) if side <= self.attention_side)

    def decoder_sites(self) -> tuple[tuple[int, int], ...]:
        """(level, side) of every cross-attention of the prediction decoder; level -1 is its middle."""
        last = len(self.block_channels) - 1
        sides = [self.grid * 2 ** min(level + 1, last) for level in range(last + 1)]
        after = tuple((level, side) for level, side in enumerate(sides) if side <= self.attention_side)
        return ((-1, self.grid), *after)

    def layout(self, frames: int) -> Layout:
        """The sequence of a clip of `frames` frames, context included.

        Raises:
          ValueError: no frame would be left to predict.
        """
        if frames <= self.context_frames:
            raise ValueError(
                f"{frames} frames with {self.context_frames} context frames: no frame to predict; give more frames."
            )
        return Layout(
            context_frames=self.context_frames,
            future_frames=frames - self.context_frames,
            context_tokens=self.context_tokens,
            future_tokens=self.future_tokens,
            context_codes=self.context_codes,
            future_codes=self.future_codes,
        )

    @property
    def vocabulary(self) -> int:
        """Number of ids of a transformer for this tokenizer: both codebooks and two slots."""
        return self.context_codes + self.future_codes + 2

    def validate(self) -> None:
        self.backbone(mid_attention=True).validate()
        step = 2 ** (len(self.block_channels) - 1)
        if self.resolution % step:
            raise ValueError(f"resolution = {self.resolution}: must be a multiple of {step} (block_channels).")
        if self.grid % self.patch:
            raise ValueError(f"patch = {self.patch}: must divide the side of the latent grid, {self.grid}.")
        if self.attention_side < self.grid:
            raise ValueError(
                f"attention_side = {self.attention_side}: must be at least the side of the latent grid, {self.grid}, "
                "or future frames would not attend to their context."
            )
        wide = self.block_channels[::-1]
        attended = {self.block_channels[level] for level, _ in self.encoder_sites()}
        attended |= {wide[max(level, 0)] for level, _ in self.decoder_sites()}
        for width in sorted(attended):
            if width % self.attention_groups or width % CROSS_HEADS:
                raise ValueError(
                    f"block_channels has {width} where frames attend to their context: make it a multiple of "
                    f"attention_groups = {self.attention_groups} and of {CROSS_HEADS}, the heads."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameTransformerConfig(Config):
    """A Llama over frame tokens with actions, and heads for rewards and actions (arXiv 2405.15223, 3.2, A.2).

    Attributes:
      vocabulary: number of ids, `CompressiveTokenizerConfig.vocabulary`.
      width: of the residual stream.
      layers, heads: of the transformer; the width of a head is width / heads.
      hidden: width of the gated feed-forward blocks.
      max_positions: longest sequence, in ids.
      action_width: components of an action; 0 for a model without actions.
      reward: predict a reward after each frame.
      action_reconstruction: reconstruct the action from the frame's hidden states.
      tokens_per_frame: ids of a context frame and of a future frame; with it a learned embedding of an id's place in
        its frame is added to the id's. Without, as published, ids are told apart by rotary positions alone.
      action_everywhere: add the action to all ids of its frame, not only, as published, to the slot that opens it.
      attention_dropout: rate in training, of the attention's weights.
      norm_epsilon, rope_theta: of the root-mean-square norms and of the rotary positions.
      remat: what the backward pass keeps of each layer.
      unroll: run the layers in a Python loop instead of a scan.
    """

    vocabulary: Width = 16386
    width: Width = 768
    layers: Layers = 12
    heads: Count = 12
    hidden: Width = 3072
    max_positions: Width = 1024
    action_width: CountOrZero = 0
    reward: bool = False
    action_reconstruction: bool = False
    tokens_per_frame: tuple[Count, Count] | None = None
    action_everywhere: bool = False
    attention_dropout: BelowOne = 0.1
    norm_epsilon: Epsilon = 1e-6
    rope_theta: Positive = 10000.0
    remat: Remat = Remat.NONE
    unroll: bool = False

    @classmethod
    def small(cls) -> "FrameTransformerConfig":
        """The released small transformer: 138,434,304 parameters without action and reward heads."""
        return cls()

    @classmethod
    def medium(cls) -> "FrameTransformerConfig":
        """The released medium transformer: 436,261,888 parameters without action and reward heads."""
        return cls(width=1024, layers=24, heads=16, hidden=4096)

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    def check_tokenizer(self, tokenizer: CompressiveTokenizerConfig, frames: int) -> None:
        """Raise `ValueError` unless the vocabulary is a tokenizer's and clips of `frames` frames fit max_positions."""
        if self.vocabulary != tokenizer.vocabulary:
            raise ValueError(
                f"transformer.vocabulary = {self.vocabulary}, but the tokenizer has {tokenizer.context_codes} + "
                f"{tokenizer.future_codes} codes and two slots: they do not belong together. Set it to "
                f"{tokenizer.vocabulary}, or give the tokenizer that the transformer was trained with."
            )
        layout = tokenizer.layout(frames)
        if self.tokens_per_frame not in (None, (layout.context_tokens, layout.future_tokens)):
            raise ValueError(
                f"transformer.tokens_per_frame = {self.tokens_per_frame}: the tokenizer gives "
                f"{layout.context_tokens} ids per context frame and {layout.future_tokens} per future frame; set it so."
            )
        length = layout.length
        if length > self.max_positions:
            raise ValueError(
                f"{frames} frames are {length} tokens, more than transformer.max_positions = {self.max_positions}: "
                "take fewer frames, or raise it."
            )

    def validate(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width = {self.width}: must be a multiple of 2 x heads = {2 * self.heads} (rotary positions pair the "
                "channels of a head)."
            )
        for name in ("action_reconstruction", "action_everywhere"):
            if getattr(self, name) and not self.action_width:
                raise ValueError(
                    f"action_width = 0, but {name} needs actions: set action_width to the number of their components, "
                    f"or {name} = false."
                )
