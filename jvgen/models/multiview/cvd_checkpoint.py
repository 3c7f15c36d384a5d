"""The module tree of the released CVD checkpoint: twenty synchronization modules of three widths.

They belong in Stable Diffusion's U-Net, which is not part of jvgen. `CVDCheckpoint` reads, holds and writes their
weights (`torch_map.cvd_checkpoint_map`); each module can be run, the tree as a whole cannot.
"""

import dataclasses

from flax import nnx

from jvgen.config import Config
from jvgen.models.multiview.synchronization import CrossViewSynchronization
from jvgen.value_rules import Count, Layers, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class CVDCheckpointConfig(Config):
    """Number and widths of the modules.

    Attributes:
      channels: of the U-Net's levels, from the input down.
      layers: modules per level of the down path; the up path has one more per level, the middle none.
      heads: of each attention.
      sublayers: attentions per block of a module.
      depth: transformer blocks per module.
      groups: of the group norms.
    """

    channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    layers: Layers = 2
    heads: Count = 8
    sublayers: Layers = 2
    depth: Layers = 1
    groups: Count = 32

    @property
    def sides(self) -> tuple[str, str]:
        """The two paths of the U-Net, as named in the checkpoint."""
        return ("down", "up")

    def widths(self, side: str) -> tuple[int, ...]:
        """Channels of the levels, in the order of a path."""
        return self.channels if side == "down" else self.channels[::-1]

    def modules(self, side: str) -> int:
        """Modules per level of a path."""
        return self.layers + (side == "up")


class CVDCheckpoint(nnx.Module):
    """`down` and `up`: lists of levels, each a list of `CrossViewSynchronization` modules. Has no forward pass."""

    def __init__(self, config: CVDCheckpointConfig, *, rngs: nnx.Rngs):
        self.config = config
        sync = {name: getattr(config, name) for name in ("heads", "sublayers", "depth", "groups")}
        for side in config.sides:
            levels = [
                nnx.List([CrossViewSynchronization(width, **sync, rngs=rngs) for _ in range(config.modules(side))])
                for width in config.widths(side)
            ]
            setattr(self, side, nnx.List(levels))
