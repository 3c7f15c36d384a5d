"""Configuration of the video transformer for several views, and of what makes them agree."""

import dataclasses
from typing import Literal

from jvgen.config import Config
from jvgen.geometry.epipolar import EpipolarBias
from jvgen.models.multiview.sync import SyncMode
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.epipolar_attention import EpipolarKernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncConfig(Config):
    """The modules between the blocks in which frames of different views look at each other.

    Attributes:
      every: a module comes after every so many blocks; divides their number.
      heads: of each attention; those of the transformer if none.
      sublayers: attentions a module.
      groups: of each module's first norm.
      mode: what the tokens of a frame look at.
      bias: how the distance from the epipolar line counts, with mode EPIPOLAR.
      band: half width of the band around a line, in pixels; with SOFT of a frame's largest distance over half of the
        shorter side (3 in the paper and in its code).
      decay: bias at twice that width.
      without_baseline: what frames of two views look at while their cameras stand at one place, where there are no
        lines: "pseudo" (near lines of a random direction through the place where they see the same, as released), or
        "open" (everything).
      kernel: of attention along lines.
    """

    every: int = 5
    heads: int | None = None
    sublayers: int = 2
    groups: int = 32
    mode: SyncMode = SyncMode.EPIPOLAR
    bias: EpipolarBias = EpipolarBias.SOFT
    band: float = 3.0
    decay: float = 3.0
    without_baseline: Literal["pseudo", "open"] = "pseudo"
    kernel: EpipolarKernel = EpipolarKernel.AUTO

    def validate(self) -> None:
        for name in ("every", "sublayers", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a number of at least 1.")
        if self.band <= 0 or self.decay <= 0:
            raise ValueError(f"band = {self.band}, decay = {self.decay}: both must be positive, as 3.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewDiTConfig(VideoDiTConfig):
    """A `VideoDiT` whose views look at each other, and that may be told its cameras.

    Attributes:
      sync: the modules between the blocks; none for views that never meet.
      rays: take Plücker coordinates of the cameras' rays, as patches added to those of the clip.
      adapter_rank: rank of matrices added to those of the blocks' attention where an adapter is switched on; 0 for
        none. It takes what is peculiar to one kind of data, so that the rest stays clean of it.
    """

    sync: SyncConfig | None = SyncConfig()
    rays: bool = True
    adapter_rank: int = 0

    def validate(self) -> None:
        super().validate()
        if self.adapter_rank < 0:
            raise ValueError(f"adapter_rank = {self.adapter_rank}: a rank, or 0 for no adapter.")
        if self.sync is None:
            return
        if self.layers % self.sync.every:
            fits = [n for n in range(1, self.layers + 1) if self.layers % n == 0]
            near = min(fits, key=lambda n: abs(n - self.sync.every))
            raise ValueError(f"sync.every = {self.sync.every}: must divide layers = {self.layers}; take {near}.")
        if self.width % self.sync.groups:
            raise ValueError(f"sync.groups = {self.sync.groups}: must divide heads x head_width = {self.width}.")
        if self.width % (self.sync.heads or self.heads):
            raise ValueError(f"sync.heads = {self.sync.heads}: must divide heads x head_width = {self.width}.")

    @property
    def sync_layers(self) -> int:
        """Synchronisation modules."""
        return 0 if self.sync is None else self.layers // self.sync.every

    @property
    def plain(self) -> VideoDiTConfig:
        """The transformer without what makes it see several views: what published weights are of."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(VideoDiTConfig)}
        return VideoDiTConfig(**fields)
