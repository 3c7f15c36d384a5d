"""The synchronisation modules as they were released with CVD: twenty of three widths, for Stable Diffusion's U-Net.

The U-Net itself is not here: this network holds the released weights, tells what they are, and writes them back.
"""

import dataclasses

from flax import nnx

from jvgen.config import Config
from jvgen.models.multiview.sync import Synchronisation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedModulesConfig(Config):
    """Where the modules are.

    Attributes:
      channels: of the U-Net's levels on its way down.
      layers: modules a level on the way down; there is one more on the way up, and none in the middle.
      heads: of each attention.
      sublayers: attentions a module.
      groups: of the norms.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    heads: int = 8
    sublayers: int = 2
    groups: int = 32

    @property
    def sides(self) -> tuple[str, str]:
        """The two ways, as the released names have them."""
        return ("down", "up")

    def widths(self, side: str) -> tuple[int, ...]:
        """Channels of the levels, in the order of that way."""
        return self.channels if side == "down" else self.channels[::-1]

    def modules(self, side: str) -> int:
        """Modules a level."""
        return self.layers + (side == "up")


class ReleasedModules(nnx.Module):
    """`down` and `up`: lists of levels, each a list of `Synchronisation` modules."""

    def __init__(self, config: ReleasedModulesConfig, *, rngs: nnx.Rngs):
        self.config = config

        sync = {"heads": config.heads, "sublayers": config.sublayers, "groups": config.groups, "rngs": rngs}
        for side in config.sides:
            levels = [
                nnx.List([Synchronisation(width, **sync) for _ in range(config.modules(side))])
                for width in config.widths(side)
            ]
            setattr(self, side, nnx.List(levels))
