"""The configuration of Stable Diffusion's autoencoder, with the published sizes."""

import dataclasses
from typing import Any, ClassVar

from jvgen.config import Config
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Count, Layers, Pixels, Positive, Width

NORM_EPSILON = 1e-6  # of every group norm in every published model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageVAEConfig(Config):
    """AutoencoderKL of latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

    Attributes:
      channels: channels of an image.
      latent_channels: channels of a latent.
      block_channels: width of each level, finest first; each level but the last halves height and width.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      groups: groups of every group norm; divides every width.
      mid_attention: one head of self-attention over all pixels at the coarsest level.
      quant_convolutions: a pointwise convolution after the encoder and before the decoder (Stable Diffusion 1 and 2).
      scaling_factor, shift_factor: diffusion sees `(latent - shift_factor) * scaling_factor`.
      sample_size: side in pixels of the images that it was trained on; only written to exported files.
      remat: what the backward pass keeps of each residual block.
    """

    channels: Width = 3
    latent_channels: Width = 4
    block_channels: tuple[Width, ...] = (128, 256, 512, 512)
    layers_per_block: Layers = 2
    groups: Count = 32
    mid_attention: bool = True
    quant_convolutions: bool = True
    scaling_factor: Positive = 0.18215
    shift_factor: float = 0.0
    sample_size: Pixels = 512
    remat: Remat = Remat.NONE

    dropped_fields: ClassVar[frozenset[str]] = frozenset({"rounded_norms"})

    @classmethod
    def sd15(cls) -> "ImageVAEConfig":
        """The autoencoder of Stable Diffusion 1.x: 8x8 pixels to one latent of 4 channels."""
        return cls()

    @classmethod
    def sd21(cls) -> "ImageVAEConfig":
        """The autoencoder of Stable Diffusion 2.1: that of 1.x, trained on larger images."""
        return cls(sample_size=768)

    @classmethod
    def sd3(cls) -> "ImageVAEConfig":
        """The autoencoder of Stable Diffusion 3 and 3.5: 16 channels and no quantization convolutions."""
        return cls(
            latent_channels=16, quant_convolutions=False, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024
        )

    @classmethod
    def tiny(cls) -> "ImageVAEConfig":
        """Small enough to train on a CPU: 4x4 pixels to one latent of 4 channels, 0.6 million parameters."""
        return cls(
            block_channels=(16, 32, 64),
            layers_per_block=1,
            groups=8,
            mid_attention=False,
            quant_convolutions=False,
            scaling_factor=1.0,
            sample_size=32,
        )

    @property
    def downsampling(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_channels) - 1)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latent of an image."""
        return height // self.downsampling, width // self.downsampling

    def validate(self) -> None:
        check_sizes(self)


def check_sizes(config: Any) -> None:
    """Raise `ValueError` for sizes that an autoencoder of images or clips cannot have."""
    if not config.block_channels:
        raise ValueError("block_channels is empty: give the width of at least one level.")
    for width in config.block_channels:
        if width % config.groups:
            raise ValueError(f"groups = {config.groups} does not divide {width}, one of block_channels.")
