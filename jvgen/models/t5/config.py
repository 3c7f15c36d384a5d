"""Configuration of the T5 v1.1 encoder."""

import dataclasses

from jvgen.config import Config
from jvgen.nn.stacked import Remat
from jvgen.value_rules import Count, Epsilon, Layers, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """The encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683, and its v1.1 release with gated GELU).

    Attributes:
      vocabulary: tokens.
      width: channels of an embedding.
      layers: transformer blocks.
      heads, head_width: of the attention; their product may differ from the width.
      hidden: width of the gated feed-forward blocks.
      buckets: number of relative position buckets, half of them for keys before the query.
      max_distance: distances from this on share one bucket.
      norm_epsilon: of the root-mean-square norms.
      remat: what is stored for the backward pass.
      unroll: run the layers in a Python loop and not in a scan.
    """

    vocabulary: Width = 32128
    width: Width = 512
    layers: Layers = 8
    heads: Count = 6
    head_width: Width = 64
    hidden: Width = 1024
    buckets: Count = 32
    max_distance: Count = 128
    norm_epsilon: Epsilon = 1e-6
    remat: Remat = Remat.NONE
    unroll: bool = False

    def validate(self) -> None:
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets = {self.buckets}: must be a multiple of 4 (two directions, near and far).")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"max_distance = {self.max_distance}: must be more than buckets / 4 = {self.buckets // 4}."
            )


def small() -> T5Config:
    """google/t5-v1_1-small."""
    return T5Config()


def xxl() -> T5Config:
    """google/t5-v1_1-xxl, the text encoder of CogVideoX and RepVideo: 4,762,310,656 parameters."""
    return T5Config(width=4096, layers=24, heads=64, hidden=10240)
