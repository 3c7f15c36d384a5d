"""The configuration of CogVideoX's autoencoder, with the published scales of its latents."""

import dataclasses
from typing import ClassVar

from jvgen.config import Config
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Count, Frames, Layers, Pixels, Positive, Width

NORM_EPSILON = 1e-6  # of every norm in the published model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CogVideoXVAEConfig(Config):
    """The causal autoencoder of CogVideoX (Yang et al. 2024, arXiv 2408.06072, section 2.1).

    Attributes:
      channels: channels of a frame.
      latent_channels: channels of a latent.
      block_channels: width of each level, finest first; each level but the last halves height and width.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      groups: groups of every group norm; divides every width.
      temporal_downsampling: frames per latent frame, a power of two; the finest levels halve the number of frames.
      encode_chunk_frames: frames that the encoder codes together; None for whole clips, as in training. Norms are
        over a chunk of frames, so the result depends on this number.
      decode_chunk_frames: latent frames that the decoder codes together, an even number; the result depends on it, too.
      scaling_factor: diffusion sees latents times this.
      sample_height, sample_width: size in pixels that the network was trained for; tiles are half of it.
      invert_scale_latents: CogVideoX1.5 image-to-video divides the latents of its first frame by scaling_factor; only
        written to exported files.
      remat: what the backward pass keeps of each residual block.
    """

    renamed_fields: ClassVar[dict[str, str]] = {
        "encode_batch": "encode_chunk_frames",
        "decode_batch": "decode_chunk_frames",
    }

    channels: Width = 3
    latent_channels: Width = 16
    block_channels: tuple[Width, ...] = (128, 256, 256, 512)
    layers_per_block: Layers = 3
    groups: Count = 32
    temporal_downsampling: Count = 4
    encode_chunk_frames: Frames | None = 8
    decode_chunk_frames: Frames = 2
    scaling_factor: Positive = 1.15258426
    sample_height: Pixels = 480
    sample_width: Pixels = 720
    invert_scale_latents: bool = False
    remat: Remat = Remat.NONE

    @classmethod
    def cogvideox_2b(cls) -> "CogVideoXVAEConfig":
        """Of CogVideoX-2B and RepVideo: 215,583,907 parameters."""
        return cls()

    @classmethod
    def cogvideox_5b(cls) -> "CogVideoXVAEConfig":
        """Of CogVideoX-5B and 1.5: the same weights, another scale."""
        return cls(scaling_factor=0.7)

    @classmethod
    def tiny(cls) -> "CogVideoXVAEConfig":
        """Small enough for tests, with all four levels."""
        return cls(
            latent_channels=4,
            block_channels=(8, 12, 12, 16),
            layers_per_block=1,
            groups=4,
            sample_height=96,
            sample_width=80,
        )

    @property
    def downsampling(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Levels that halve the number of frames."""
        return self.temporal_downsampling.bit_length() - 1

    @property
    def frame_step(self) -> int:
        """Clips of a multiple of this many frames and one more decode to their own length: their latent frames are odd
        in number. Of an even number the first is decoded to as many frames as the others."""
        return self.temporal_downsampling * (2 if self.temporal_levels else 1)

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raise `ValueError` for a clip whose latents do not decode to the same number of frames and pixels."""
        step = self.frame_step
        if frames < 1 or (frames - 1) % step:
            nearest = max(frames - 1, 0) // step * step + 1
            raise ValueError(
                f"frames = {frames}: CogVideoX's autoencoder takes {step}n + 1 frames, because it decodes other clips "
                f"to another length; take {nearest} or {nearest + step}."
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.downsampling:
                raise ValueError(f"{name} = {size}: must be a multiple of {self.downsampling} for this autoencoder.")

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip in pixels."""
        return (
            (frames - 1) // self.temporal_downsampling + 1,
            height // self.downsampling,
            width // self.downsampling,
        )

    def validate(self) -> None:
        if not self.block_channels:
            raise ValueError("block_channels is empty: give the width of at least one level.")
        for width in self.block_channels:
            if width % self.groups:
                raise ValueError(f"groups = {self.groups} does not divide {width}, one of block_channels.")
        times = self.temporal_downsampling
        if times != 1 << self.temporal_levels or self.temporal_levels >= len(self.block_channels):
            raise ValueError(
                f"temporal_downsampling = {times}: must be a power of two, at most {self.downsampling} with "
                f"{len(self.block_channels)} levels."
            )
        if self.temporal_levels and self.decode_chunk_frames % 2:
            raise ValueError(
                f"decode_chunk_frames = {self.decode_chunk_frames}: must be even, because of an odd number of latent "
                f"frames the first is decoded as that of a clip, to one frame; take {self.decode_chunk_frames + 1}."
            )
        if self.encode_chunk_frames is not None and self.encode_chunk_frames % times:
            raise ValueError(
                f"encode_chunk_frames = {self.encode_chunk_frames}: must be a multiple of temporal_downsampling = "
                f"{times}, or none for whole clips."
            )


def frame_chunks(frames: int, size: int | None) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of frames: all have `size` frames, and the first has the remainder as well."""
    first = frames if size is None or frames < size else size + frames % size
    starts = [0, *range(first, frames, size or frames)]
    return list(zip(starts, [*starts[1:], frames], strict=True))
