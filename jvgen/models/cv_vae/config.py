"""The configuration of a CV-VAE: the two published networks, and the causal one that this library trains."""

import dataclasses
from typing import Annotated, Any, Literal

from jvgen.config import Config
from jvgen.models.cv_vae.flat_fields import group_fields, is_flat
from jvgen.models.image_vae.config import ImageVAEConfig, check_sizes
from jvgen.nn.conv import Border
from jvgen.nn.conv3d import InTime
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Bounds, Count, CountOrZero, Epsilon, Frames, Layers, Pixels, Positive, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipNormConfig(Config):
    """Group norms of a network over clips.

    Attributes:
      over_clip: statistics over all frames of a clip, so that every frame depends on later ones (published); otherwise
        over each frame.
      epsilon: added to the variance.
    """

    over_clip: bool = False
    epsilon: Epsilon = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPaddingConfig(Config):
    """What convolutions read beyond a clip. The encoder is causal in every network.

    Attributes:
      border: beyond the sides of a frame: "zeros", or "repeat" for copies of the pixels at the edge.
      downsample_around: strided convolutions read one more row and column on both sides of a frame; otherwise only
        below and to the right of it, as Stable Diffusion's do.
      decoder_time: beyond the ends of a clip in the decoder; see `jvgen.nn.conv3d.InTime`.
      upsample_time: the same for the decoder's convolutions after upsampling.
    """

    border: Border = "zeros"
    downsample_around: bool = False
    decoder_time: InTime = "causal"
    upsample_time: InTime = "causal"

    def validate(self) -> None:
        if self.upsample_time == "zeros":
            raise ValueError("upsample_time = 'zeros': no network has that; use 'causal' or 'repeat'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalAttentionConfig(Config):
    """Attention of each latent pixel along time, in the middle of the decoder.

    Attributes:
      kind: "none"; "clip": over the whole clip, with the output of the spatial attention as its input, which reaches
        the decoder in no other way (published, z = 4); "causal": over the latest `window` frames, added to the result
        of the spatial attention, and zero before training.
      window: latent frames that "causal" reads, its own among them.
    """

    kind: Literal["none", "clip", "causal"] = "none"
    window: Frames = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CVVAEConfig(Config):
    """CV-VAE (Zhao et al. 2024, https://arxiv.org/abs/2405.20279): Stable Diffusion's autoencoder, extended to clips.

    The published networks are `sd21()` and `sd3()`; they differ in `norm`, `padding` and `temporal_attention`.
    `causal()` is this library's own: no layer reads a later frame and norms are over each frame, so that clips of any
    length can be coded in chunks, and an inflated image autoencoder is reproduced on clips too.

    Attributes:
      channels: channels of a frame.
      latent_channels: channels of a latent.
      block_channels: width of each level, finest first; each level but the last halves height and width.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      groups: groups of every group norm; divides every width.
      mid_attention: one head of self-attention over all pixels of a frame at the coarsest level.
      quant_convolutions: a pointwise convolution after the encoder and before the decoder, as in Stable Diffusion 1
        and 2. The published networks have none.
      time_levels_down: levels of the encoder, counted from the finest, that also halve the number of frames.
      time_levels_up: levels of the decoder, counted from the coarsest, that also double it.
      norm: of the residual blocks and before the last convolutions.
      padding: of the convolutions.
      temporal_attention: of the decoder; needs `mid_attention`.
      full_3d: the second convolution of a residual block is over clips too (the paper's larger network), not over each
        frame.
      blend_frames: an inflated decoder starts with the frames between those of two latents blended from both; otherwise
        with copies of the later one. Only `inflate` reads it.
      scaling_factor, shift_factor: diffusion sees `(latent - shift_factor) * scaling_factor`.
      tile_frames: long clips are coded in chunks of this many frames and the one before; None for whole clips.
      tile_size: large frames are coded in tiles of this many pixels a side, blended where they overlap; None for whole
        frames.
      tile_overlap: share of a tile that overlaps the next.
      sample_size: side in pixels of the frames that it was trained on; only written to exported files.
      remat: what the backward pass keeps of each block.
    """

    channels: Width = 3
    latent_channels: Width = 4
    block_channels: tuple[Width, ...] = (128, 256, 512, 512)
    layers_per_block: Layers = 2
    groups: Count = 32
    mid_attention: bool = True
    quant_convolutions: bool = False
    time_levels_down: tuple[CountOrZero, ...] = (0, 2)
    time_levels_up: tuple[CountOrZero, ...] = (0, 2)
    norm: ClipNormConfig = ClipNormConfig()
    padding: ClipPaddingConfig = ClipPaddingConfig()
    temporal_attention: TemporalAttentionConfig = TemporalAttentionConfig()
    full_3d: bool = False
    blend_frames: bool = False
    scaling_factor: Positive = 0.18215
    shift_factor: float = 0.0
    tile_frames: Frames | None = 16
    tile_size: Pixels | None = 576
    tile_overlap: Annotated[float, Bounds(at_least=0, at_most=0.5)] = 0.2222
    sample_size: Pixels = 256
    remat: Remat = Remat.NONE

    @classmethod
    def sd21(cls) -> "CVVAEConfig":
        """The published network for Stable Diffusion 1 and 2: 4x8x8 pixels to a latent of 4 channels."""
        return cls(
            norm=ClipNormConfig(over_clip=True, epsilon=1e-5),
            padding=ClipPaddingConfig(decoder_time="zeros", upsample_time="repeat"),
            temporal_attention=TemporalAttentionConfig(kind="clip"),
        )

    @classmethod
    def sd3(cls) -> "CVVAEConfig":
        """The published network for Stable Diffusion 3: 16 channels, every padding other than that of `sd21`."""
        return cls(
            latent_channels=16,
            norm=ClipNormConfig(over_clip=True),
            padding=ClipPaddingConfig(
                border="repeat", downsample_around=True, decoder_time="repeat", upsample_time="repeat"
            ),
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )

    @classmethod
    def causal(cls, image: ImageVAEConfig | None = None) -> "CVVAEConfig":
        """The causal network with the sizes of an image autoencoder (default Stable Diffusion 2.1's), to inflate it."""
        image = ImageVAEConfig.sd21() if image is None else image
        levels = len(image.block_channels) - 1
        down = (0, 2) if levels > 2 else tuple(range(levels))
        return cls(
            **{name: getattr(image, name) for name in SHARED},
            time_levels_down=down,
            time_levels_up=tuple(levels - 1 - level for level in reversed(down)),
            tile_frames=None,
            tile_size=None,
        )

    @classmethod
    def upgrade(cls, saved: dict[str, Any]) -> dict[str, Any]:
        if is_flat(saved):
            saved = group_fields(saved)
            for name, kind in GROUPS.items():
                if name in saved:
                    saved[name] = {"class": kind.__name__, **saved[name]}
        return super().upgrade(saved)

    @property
    def downsampling(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def temporal_downsampling(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** len(self.time_levels_down)

    @property
    def is_causal(self) -> bool:
        """Whether no layer reads later frames: a clip coded in chunks is then the same as the clip coded whole."""
        causal = self.padding.decoder_time == self.padding.upsample_time == "causal"
        return causal and not self.norm.over_clip and self.temporal_attention.kind != "clip"

    @property
    def class_name(self) -> str:
        """The PyTorch class that has this network: one of the published two, or "CVVAE" if neither has it."""
        levels, base = len(self.block_channels) - 1, self.block_channels[0]
        every_other = tuple(range(0, levels, 2))
        mirrored = tuple(levels - 1 - level for level in reversed(every_other))
        if self.time_levels_down == every_other:
            regular = self.groups == 32 and self.mid_attention and not any(w % base for w in self.block_channels)
            if self._has_layers_of(CVVAEConfig.sd21()) and regular and self.time_levels_up == mirrored:
                return "CVVAEModel"
            if self._has_layers_of(CVVAEConfig.sd3()) and self.time_levels_up == every_other:
                return "CVVAESD3Model"
        return "CVVAE"

    def _has_layers_of(self, other: "CVVAEConfig") -> bool:
        def layers(config: CVVAEConfig) -> tuple[Any, ...]:
            return config.quant_convolutions, config.norm, config.padding, config.temporal_attention.kind

        return layers(self) == layers(other)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latent of a frame."""
        return height // self.downsampling, width // self.downsampling

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip."""
        return (frames - 1) // self.temporal_downsampling + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames of a decoded clip."""
        return (latent_frames - 1) * self.temporal_downsampling + 1

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raise `ValueError` for a clip whose latents do not decode to the same number of frames and pixels."""
        group, side = self.temporal_downsampling, self.downsampling
        if frames < 1 or (frames - 1) % group:
            nearest = max(frames - 1, 0) // group * group + 1
            raise ValueError(
                f"frames = {frames}: must be {group}n + 1, because the first frame has a latent of its own and every "
                f"{group} others share one; take {nearest} or {nearest + group}."
            )
        for name, size in (("height", height), ("width", width)):
            if size < side or size % side:
                raise ValueError(f"{name} = {size}: must be a multiple of {side}; take {max(size // side, 1) * side}.")

    def validate(self) -> None:
        check_sizes(self)
        levels = len(self.block_channels) - 1
        for name in ("time_levels_down", "time_levels_up"):
            value = getattr(self, name)
            if len(set(value)) < len(value) or not all(level < levels for level in value):
                raise ValueError(f"{name} = {value}: different levels from 0 to {levels - 1}, as block_channels has.")
        if len(self.time_levels_down) != len(self.time_levels_up):
            raise ValueError(
                f"time_levels_down = {self.time_levels_down} and time_levels_up = {self.time_levels_up}: must have "
                "equal lengths."
            )
        # Also of networks that are built without `validate_tree`.
        self.padding.validate()
        kind = self.temporal_attention.kind
        if kind != "none" and not self.mid_attention:
            raise ValueError(f"temporal_attention.kind = {kind!r}: needs mid_attention = true.")
        if kind == "causal" and self.padding.decoder_time != "causal":
            raise ValueError("temporal_attention.kind = 'causal': needs padding.decoder_time = 'causal'.")
        if self.tile_frames is not None and self.tile_frames % self.temporal_downsampling:
            raise ValueError(
                f"tile_frames = {self.tile_frames}: must be a multiple of {self.temporal_downsampling}, or none."
            )
        if self.tile_size is not None and self.tile_size % self.downsampling:
            raise ValueError(f"tile_size = {self.tile_size}: must be a multiple of {self.downsampling}, or none.")


# Fields that are groups of fields, and their classes.
GROUPS: dict[str, type[Config]] = {
    "norm": ClipNormConfig,
    "padding": ClipPaddingConfig,
    "temporal_attention": TemporalAttentionConfig,
}

# Fields that a video autoencoder takes from the image autoencoder that it is inflated from.
SHARED = (
    "channels",
    "latent_channels",
    "block_channels",
    "layers_per_block",
    "groups",
    "mid_attention",
    "quant_convolutions",
    "scaling_factor",
    "shift_factor",
    "remat",
)
