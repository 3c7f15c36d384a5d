"""Configuration of the byte-level text encoder."""

import dataclasses

from jvgen.config import Config
from jvgen.nn.stacked import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTextConfig(Config):
    """A small transformer encoder over UTF-8 bytes, trained with the network that it conditions.

    Attributes:
      width: channels of an embedding.
      layers: transformer blocks.
      heads: attention heads of width / heads channels each.
      feed_forward_ratio: hidden width of the feed-forward blocks / width.
      norm_epsilon: of the layer norms.
      remat: what is stored for the backward pass.
      unroll: run the layers in a Python loop and not in a scan.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward_ratio: int = 4
    norm_epsilon: float = 1e-5
    remat: Remat = Remat.NONE
    unroll: bool = False

    def validate(self) -> None:
        for name in ("width", "layers", "heads", "feed_forward_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; choose a divisor.")
        if self.width % 2:
            raise ValueError(f"width = {self.width}: positions need an even width.")
