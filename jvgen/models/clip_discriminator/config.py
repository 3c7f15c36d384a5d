"""The configuration of the discriminator of clips."""

import dataclasses

from jvgen.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipDiscriminatorConfig(Config):
    """The 3-D patch discriminator of CV-VAE's training.

    Attributes:
      channels: of a frame.
      width: of the first layer; the others are multiples of it.
      halvings: blocks that halve frames, height and width; the first layer does so too.
      groups: groups of every group norm; divides `width`.
    """

    channels: int = 3
    width: int = 64
    halvings: int = 2
    groups: int = 32

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths after the first layer and after each block."""
        return tuple(self.width * min(2**level, 8) for level in range(self.halvings + 1)) + (8 * self.width,) * 2

    @property
    def reduction(self) -> int:
        """Pixels along a side of one output."""
        return 2 ** (self.halvings + 1)

    def validate(self) -> None:
        for name in ("channels", "width", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if not 0 <= self.halvings <= 3:
            raise ValueError(f"halvings = {self.halvings}: 0 to 3.")
        if self.width % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide width = {self.width}.")
