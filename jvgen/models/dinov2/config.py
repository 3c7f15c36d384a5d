"""Configuration of the DINOv2 image encoder."""

import dataclasses

from jvgen.config import Config
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Count, Epsilon, Layers, Pixels, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config(Config):
    """The vision transformer of DINOv2 (Oquab et al. 2023, arXiv 2304.07193).

    Attributes:
      width: channels of a token.
      layers: transformer blocks.
      heads: attention heads.
      hidden: width of the feed-forward blocks.
      gated: feed-forward blocks with a SwiGLU and three matrices (the giant network), instead of GELU and two.
      patch: height and width of a patch in pixels.
      side: height and width of the square images whose patches the learned positions are for; positions of other sizes
        are interpolated. 518 in the published networks.
      norm_epsilon: of the norms.
      remat: what is stored for the backward pass.
      unroll: run the layers in a Python loop and not in a scan.
    """

    width: Width = 768
    layers: Layers = 12
    heads: Count = 12
    hidden: Width = 3072
    gated: bool = False
    patch: Pixels = 14
    side: Pixels = 518
    norm_epsilon: Epsilon = 1e-6
    remat: Remat = Remat.NONE
    unroll: bool = False

    @property
    def positions(self) -> int:
        """Rows, and columns, of the table of learned positions."""
        return self.side // self.patch

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide width = {self.width}.")
        if self.side < self.patch:
            raise ValueError(f"side = {self.side}: must be at least patch = {self.patch}.")


def small() -> Dinov2Config:
    """facebook/dinov2-small: 22,056,192 parameters."""
    return Dinov2Config(width=384, heads=6, hidden=1536)


def base() -> Dinov2Config:
    """facebook/dinov2-base: 86,579,712 parameters."""
    return Dinov2Config()


def large() -> Dinov2Config:
    """facebook/dinov2-large: 304,367,616 parameters."""
    return Dinov2Config(width=1024, layers=24, heads=16, hidden=4096)


def giant() -> Dinov2Config:
    """facebook/dinov2-giant: 1,136,479,232 parameters."""
    return Dinov2Config(width=1536, layers=40, heads=24, hidden=4096, gated=True)
