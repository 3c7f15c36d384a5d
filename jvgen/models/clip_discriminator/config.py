"""The configuration of the discriminator of clips."""

import dataclasses
from typing import Annotated

from jvgen.config import Config
from jvgen.value_rules import Bounds, Count, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipDiscriminatorConfig(Config):
    """The 3-D patch discriminator of CV-VAE's training.

    Attributes:
      channels: of a frame.
      width: of the first layer; the others are multiples of it.
      halvings: blocks that halve frames, height and width; the first layer does so too.
      groups: groups of every group norm; divides `width`.
    """

    channels: Width = 3
    width: Width = 64
    halvings: Annotated[int, Bounds(at_least=0, at_most=3)] = 2
    groups: Count = 32

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths after the first layer and after each block."""
        return tuple(self.width * min(2**level, 8) for level in range(self.halvings + 1)) + (8 * self.width,) * 2

    @property
    def reduction(self) -> int:
        """Pixels along a side of one output."""
        return 2 ** (self.halvings + 1)

    def validate(self) -> None:
        if self.width % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide width = {self.width}.")
