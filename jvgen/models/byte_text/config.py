"""Configuration of the byte-level text encoder."""

import dataclasses

from jvgen.config import Config
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Count, Epsilon, Layers, Width


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

    width: Width = 128
    layers: Layers = 2
    heads: Count = 4
    feed_forward_ratio: Count = 4
    norm_epsilon: Epsilon = 1e-5
    remat: Remat = Remat.NONE
    unroll: bool = False

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; choose a divisor.")
        if self.width % 2:
            raise ValueError(f"width = {self.width}: positions need an even width.")
