"""What a CV-VAE is made of: the two published networks, and the causal one that this library trains."""

import dataclasses
from typing import Literal

from jvgen.config import Config
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.conv import Border
from jvgen.nn.conv3d import InTime
from jvgen.nn.stacked import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class CVVAEConfig(Config):
    """CV-VAE (Zhao et al. 2024, https://arxiv.org/abs/2405.20279): Stable Diffusion's autoencoder, grown into time.

    The published networks are `sd21()` and `sd3()`; they differ in the fields from `norm_epsilon` to
    `temporal_attention`. `causal()` is this library's own: no layer sees a later frame and norms are of each frame, so
    that clips of any length can be coded part by part, and an inflated image autoencoder is reproduced on clips too.

    Attributes:
      channels: channels of a frame.
      latent_channels: channels of a latent.
      block_channels: width of each level, finest first; each level but the last halves height and width.
      layers_per_block: residual blocks a level in the encoder; the decoder has one more.
      groups: groups of every group norm; divides every width.
      mid_attention: one head of self-attention over all pixels of a frame at the coarsest level.
      quant_convolutions: a pointwise convolution after the encoder and before the decoder, as in Stable Diffusion 1
        and 2. The published networks have none.
      time_levels_down: levels of the encoder, from the finest, that also halve the number of frames at their end.
      time_levels_up: levels of the decoder, from the coarsest, that also double it.
      norm_epsilon: of every group norm.
      norm_over: statistics of group norms are over a whole clip (and so later frames are seen), or over each frame.
      border: what convolutions over time see beyond the sides of a frame.
      downsample_sides: strided convolutions see one row and column more "after" the frame (bottom and right, as Stable
        Diffusion's do), or one "around" it.
      decoder_time: what the decoder's convolutions see beyond the ends of a clip. The encoder's are causal always.
      upsample_time: the same of the decoder's convolutions after upsampling.
      second_convolution: of residual blocks: of each "frame" (2-D) or of the "clip" (3-D; the paper's larger network).
      temporal_attention: attention along time of each latent pixel in the middle of the decoder. "replacing": its
        values are what the attention over pixels returned, which reaches the output on no other way (published,
        z = 4). "added": causal, added to the result, and zero at the start.
      temporal_window: latent frames that "added" sees, its own among them.
      frames_between: what an inflated decoder makes of the frames between those of two latents, before it is trained:
        "held", copies of the newer one's, or "blended" with the older one's. Only `inflate` reads it.
      scaling_factor, shift_factor: what diffusion sees is `(latent - shift_factor) * scaling_factor`.
      tile_frames: long clips are coded in chunks of this many frames and the one before; None for whole clips.
      tile_size: large frames are coded in tiles of this many pixels a side, blended where they overlap; None for none.
      tile_overlap: share of a tile that overlaps the next.
      sample_size: side in pixels of the frames that it was trained on; only written to exported files.
      remat: what the backward pass keeps of each block.
    """

    channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    mid_attention: bool = True
    quant_convolutions: bool = False
    time_levels_down: tuple[int, ...] = (0, 2)
    time_levels_up: tuple[int, ...] = (0, 2)
    norm_epsilon: float = 1e-6
    norm_over: Literal["clip", "frame"] = "frame"
    border: Border = "zeros"
    downsample_sides: Literal["after", "around"] = "after"
    decoder_time: InTime = "causal"
    upsample_time: InTime = "causal"
    second_convolution: Literal["frame", "clip"] = "frame"
    temporal_attention: Literal["none", "replacing", "added"] = "none"
    temporal_window: int = 8
    frames_between: Literal["held", "blended"] = "held"
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    tile_frames: int | None = 16
    tile_size: int | None = 576
    tile_overlap: float = 0.2222
    sample_size: int = 256
    remat: Remat = Remat.NONE

    @classmethod
    def sd21(cls) -> "CVVAEConfig":
        """The published network for Stable Diffusion 1 and 2: 4x8x8 pixels to a latent of 4 channels."""
        return cls(
            norm_epsilon=1e-5,
            norm_over="clip",
            decoder_time="zeros",
            upsample_time="repeat",
            temporal_attention="replacing",
        )

    @classmethod
    def sd3(cls) -> "CVVAEConfig":
        """The published network for Stable Diffusion 3: 16 channels; it differs from `sd21` in every border."""
        return cls(
            latent_channels=16,
            norm_over="clip",
            border="repeat",
            downsample_sides="around",
            decoder_time="repeat",
            upsample_time="repeat",
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

    @property
    def downsampling(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def temporal_downsampling(self) -> int:
        """Frames of a latent frame, beyond the first."""
        return 2 ** len(self.time_levels_down)

    @property
    def streams(self) -> bool:
        """Whether a clip coded part by part is the same as the clip coded whole."""
        causal = self.decoder_time == self.upsample_time == "causal"
        return causal and self.norm_over == "frame" and self.temporal_attention != "replacing"

    @property
    def class_name(self) -> str:
        """The PyTorch class whose network this is: one of the published two, or "CVVAE" for what neither can be."""
        levels, base = len(self.block_channels) - 1, self.block_channels[0]
        every_other = tuple(range(0, levels, 2))
        mirrored = tuple(levels - 1 - level for level in reversed(every_other))
        if self.time_levels_down == every_other:
            regular = self.groups == 32 and self.mid_attention and not any(w % base for w in self.block_channels)
            if self._is_like(CVVAEConfig.sd21()) and regular and self.time_levels_up == mirrored:
                return "CVVAEModel"
            if self._is_like(CVVAEConfig.sd3()) and self.time_levels_up == every_other:
                return "CVVAESD3Model"
        return "CVVAE"

    def _is_like(self, other: "CVVAEConfig") -> bool:
        return all(getattr(self, field) == getattr(other, field) for field in ARCHITECTURE)

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
        """Raise `ValueError` for clips that latents cannot stand for as a whole."""
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
        if not self.block_channels:
            raise ValueError("block_channels is empty: give the width of at least one level.")
        for name in ("channels", "latent_channels", "layers_per_block", "groups", "temporal_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        for width in self.block_channels:
            if width < 1 or width % self.groups:
                raise ValueError(f"groups = {self.groups} does not divide {width}, one of block_channels.")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor = {self.scaling_factor} must be positive.")
        levels = len(self.block_channels) - 1
        for name in ("time_levels_down", "time_levels_up"):
            value = getattr(self, name)
            if len(set(value)) < len(value) or not all(0 <= level < levels for level in value):
                raise ValueError(f"{name} = {value}: different levels from 0 to {levels - 1}, as block_channels has.")
        if len(self.time_levels_down) != len(self.time_levels_up):
            raise ValueError(
                f"time_levels_down = {self.time_levels_down} and time_levels_up = {self.time_levels_up}: as many of "
                "one as of the other."
            )
        if self.upsample_time == "zeros":
            raise ValueError("upsample_time = 'zeros': no network has that; use 'causal' or 'repeat'.")
        if self.temporal_attention != "none" and not self.mid_attention:
            raise ValueError(f"temporal_attention = {self.temporal_attention!r}: needs mid_attention = true.")
        if self.temporal_attention == "added" and self.decoder_time != "causal":
            raise ValueError("temporal_attention = 'added': is causal; needs decoder_time = 'causal'.")
        if self.tile_frames is not None and (self.tile_frames < 1 or self.tile_frames % self.temporal_downsampling):
            raise ValueError(
                f"tile_frames = {self.tile_frames}: must be a multiple of {self.temporal_downsampling}, or none."
            )
        if self.tile_size is not None and (self.tile_size < 1 or self.tile_size % self.downsampling):
            raise ValueError(f"tile_size = {self.tile_size}: must be a multiple of {self.downsampling}, or none.")
        if not 0 <= self.tile_overlap <= 0.5:
            raise ValueError(f"tile_overlap = {self.tile_overlap}: a share of a tile from 0 to 0.5.")


# Fields that a video autoencoder takes over from the image autoencoder that it grows out of.
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

# Fields that tell the published networks from each other and from others.
ARCHITECTURE = (
    "quant_convolutions",
    "norm_epsilon",
    "norm_over",
    "border",
    "downsample_sides",
    "decoder_time",
    "upsample_time",
    "temporal_attention",
)
