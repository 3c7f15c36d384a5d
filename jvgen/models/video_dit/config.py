"""Configuration of the CogVideoX denoiser and of RepVideo's aggregation in it, and the published sizes."""

import dataclasses
import enum

from jvgen.config import Config
from jvgen.nn.attention import AttentionKernel
from jvgen.nn.rope import RotaryGrid
from jvgen.nn.sequence_parallel import SequenceParallel
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Count, Epsilon, Frames, Layers, Pixels, Positive, Scale, Width


class Positions(enum.Enum):
    """Kinds of position encoding."""

    SINCOS = "sincos"  # sines and cosines added to the tokens (CogVideoX-2B)
    ROTARY = "rotary"  # queries and keys rotated (CogVideoX-5B, 1.5)
    ROTARY_AND_LEARNED = "rotary_and_learned"  # and a learned table added to the tokens (CogVideoX-5B image to video)


class GateKind(enum.Enum):
    """Kinds of gate, the weight of the mean of earlier layers against the tokens."""

    SCALAR = "scalar"  # one unbounded number per layer, as released
    SIGMOID = "sigmoid"  # one number per layer, through a sigmoid
    CHANNEL = "channel"  # one unbounded number per layer and channel


@dataclasses.dataclass(frozen=True, kw_only=True)
class AggregationConfig(Config):
    """RepVideo's aggregation (Si et al. 2025, arXiv 2501.08994): layers read a gated mean of earlier layers.

    Gates have the learning rate and the weight decay of matrices, as in the released training code, which excludes
    norms and biases only. At the released rate of 1e-5 the decay is negligible beside Adam's steps.

    Attributes:
      period: the mean restarts after every layer whose index (from 0) is a multiple of this.
      gate: kind of gate.
      initial: initial value of the gates (after the sigmoid): 0 is the network without aggregation, 1 reads only means.
      memory_saving: use the backward pass of `aggregation_memory.py`, which stores no more than a network without
        aggregation; false for the plain scan of `aggregation.py`, which gives the same numbers.
    """

    period: Layers = 6
    gate: GateKind = GateKind.SCALAR
    initial: Scale = 0.5
    memory_saving: bool = True

    def validate(self) -> None:
        if self.gate is GateKind.SIGMOID and not 0 < self.initial < 1:
            raise ValueError(f"initial = {self.initial}: must lie between 0 and 1 for a sigmoid gate, for example 0.5.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoDiTConfig(Config):
    """The CogVideoX transformer (Yang et al. 2024, arXiv 2408.06072): text and video rows in one sequence.

    Attributes:
      layers: transformer blocks.
      heads: attention heads.
      head_width: channels of a head; heads x head_width is the width of the network.
      in_channels: channels of the latent clip (for image to video, twice those of the VAE).
      out_channels: channels of the prediction.
      patch: rows and columns of a patch.
      temporal_patch: frames of a patch; None for patches of single frames (CogVideoX 1.0).
      text_width: channels of the text embeddings.
      text_length: maximum rows of text in a sequence; published weights are used with exactly this many.
      condition_width: channels of the timestep embedding.
      offset_width: channels of a second such embedding (the "ofs" of 1.5 image to video), which must equal
        condition_width; None for none.
      feed_forward_ratio: hidden width of the feed-forward blocks / width.
      positions: see `Positions`.
      rotary_grid: how rotary positions of other resolutions relate to the base grid.
      sample_height, sample_width, sample_frames: the latent clip that the network is trained for. With SINCOS positions
        they are only written to exported files; with ROTARY they are the base grid.
      spatial_scale, temporal_scale: sin-cos positions in space and time are divided by these.
      column_scale: the divisor of the columns' positions, if it is not that of the rows; none for spatial_scale.
      temporal_compression: frames per latent frame, for exported files only.
      norm_epsilon: of the norms over the width.
      query_key_epsilon: of the norms of queries and keys.
      output_norm_epsilon: of the last norm: 1e-5 in diffusers, 1e-6 in the released training code.
      zero_init: initialize modulations and the output layer with zeros (adaLN-zero), so that every block is initially
        the identity. The released code defines this and does not use it; it speeds up training from scratch.
      aggregation: RepVideo's gates between layers; none for CogVideoX.
      token_multiple: the sequence is padded to a multiple of this, and attention ignores the padding.
      remat: what is stored for the backward pass.
      unroll: run the layers in a Python loop and not in a scan.
      attention: kernel of the attention.
      sequence_parallel: how devices along the mesh axis `seq`, which share the tokens of a clip, attend to all of them.
    """

    layers: Layers = 30
    heads: Count = 30
    head_width: Width = 64
    in_channels: Width = 16
    out_channels: Width = 16
    patch: Pixels = 2
    temporal_patch: Frames | None = None
    text_width: Width = 4096
    text_length: Width = 226
    condition_width: Width = 512
    offset_width: Width | None = None
    feed_forward_ratio: Count = 4
    positions: Positions = Positions.SINCOS
    rotary_grid: RotaryGrid = RotaryGrid.LINSPACE
    sample_height: Pixels = 60
    sample_width: Pixels = 90
    sample_frames: Frames = 13
    spatial_scale: Positive = 1.875
    column_scale: Positive | None = None
    temporal_scale: Positive = 1.0
    temporal_compression: Frames = 4
    norm_epsilon: Epsilon = 1e-5
    query_key_epsilon: Epsilon = 1e-6
    output_norm_epsilon: Epsilon = 1e-5
    zero_init: bool = True
    aggregation: AggregationConfig | None = None
    token_multiple: Width = 1
    remat: Remat = Remat.NONE
    unroll: bool = False
    attention: AttentionKernel = AttentionKernel.AUTO
    sequence_parallel: SequenceParallel = SequenceParallel.AUTO

    @property
    def plain(self) -> "VideoDiTConfig":
        """Configuration of the transformer alone, as published weights have it: this one."""
        return self

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_width

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return (self.temporal_patch or 1, self.patch, self.patch)

    @property
    def base_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of the clip that the network is trained for."""
        return self.sample_height // self.patch, self.sample_width // self.patch

    def check_grid(self, grid: tuple[int, int, int]) -> None:
        """Raise `ValueError` for a clip of these frames, rows and columns of tokens without learned positions."""
        if self.positions is not Positions.ROTARY_AND_LEARNED:
            return
        if grid[1:] != self.base_grid or grid[0] > self.sample_frames:
            raise ValueError(
                f"a grid of {grid} tokens: learned positions are for at most {self.sample_frames} frames of exactly "
                f"{self.base_grid[0]}x{self.base_grid[1]}; use that resolution, or rotary positions alone."
            )

    def validate(self) -> None:
        if self.column_scale is not None and self.positions is not Positions.SINCOS:
            raise ValueError(
                f"column_scale = {self.column_scale}: positions = {self.positions.value} have no scale; leave it none, "
                "or set positions to sincos."
            )
        if self.positions is Positions.SINCOS and self.width % 16:
            raise ValueError(
                f"heads x head_width = {self.heads} x {self.head_width} = {self.width}: sin-cos positions need a "
                "multiple of 16; change heads or head_width."
            )
        if self.positions is not Positions.SINCOS and self.head_width % 16:
            raise ValueError(f"head_width = {self.head_width}: rotary positions need a multiple of 16.")
        if self.positions is Positions.ROTARY_AND_LEARNED and self.temporal_patch is not None:
            raise ValueError("positions = rotary_and_learned: learned positions need temporal_patch = none.")
        if self.width % 2:
            raise ValueError(f"heads x head_width = {self.width}: the timestep embedding needs an even width.")
        if self.aggregation is not None and self.remat is Remat.OFFLOAD:
            raise ValueError(
                "remat = offload: not supported with aggregation, which stores tokens; use full or save_attention."
            )
        if self.offset_width is not None and self.offset_width != self.condition_width:
            raise ValueError(
                f"offset_width = {self.offset_width}: it is added to the timestep embedding, so it must equal "
                f"condition_width = {self.condition_width}; make them equal, or set offset_width to none."
            )


def cogvideox_2b() -> VideoDiTConfig:
    """CogVideoX-2B: 1,693,783,872 parameters, 480x720, 49 frames at 8 fps."""
    return VideoDiTConfig()


def repvideo_2b() -> VideoDiTConfig:
    """RepVideo: CogVideoX-2B with 30 gates, and the last norm as in the released training code."""
    return cogvideox_2b().replace(aggregation=AggregationConfig(), output_norm_epsilon=1e-6)


def cogvideox_5b() -> VideoDiTConfig:
    """CogVideoX-5B: 5,570,283,072 parameters, 480x720, 49 frames at 8 fps."""
    return VideoDiTConfig(layers=42, heads=48, positions=Positions.ROTARY)


def cogvideox_5b_image_to_video() -> VideoDiTConfig:
    """CogVideoX-5B-I2V: as 5B with the latents of the first frame as extra channels, and learned positions."""
    return cogvideox_5b().replace(in_channels=32, positions=Positions.ROTARY_AND_LEARNED)


def cogvideox1_5_5b() -> VideoDiTConfig:
    """CogVideoX1.5-5B: 5,570,676,352 parameters, patches of two frames, 768x1360, 81 frames at 16 fps."""
    return cogvideox_5b().replace(
        temporal_patch=2,
        text_length=224,
        rotary_grid=RotaryGrid.SLICE,
        sample_height=300,
        sample_width=300,
        sample_frames=21,
    )


def cogvideox1_5_5b_image_to_video() -> VideoDiTConfig:
    """CogVideoX1.5-5B-I2V: as 1.5 with the latents of the first frame as extra channels, and the offset embedding."""
    return cogvideox1_5_5b().replace(in_channels=32, offset_width=512)
