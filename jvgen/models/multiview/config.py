"""Configuration of the multi-view video transformer and of its synchronization modules."""

import dataclasses
from typing import Literal

from jvgen.config import Config
from jvgen.geometry.epipolar import EpipolarBias
from jvgen.models.multiview.synchronization import SyncMode
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.epipolar_attention import EpipolarKernel
from jvgen.value_rules import Count, CountOrZero, Layers, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncConfig(Config):
    """The synchronization modules between the blocks, in which frames of different views attend to each other.

    Attributes:
      every: number of blocks between modules; must divide `layers`.
      heads: attention heads; None for as many as the transformer has.
      sublayers: attentions per block of a module.
      depth: transformer blocks per module (1 in the paper and in its code).
      groups: of each module's group norm.
      mode: what the tokens of a frame attend to.
      bias: bias as a function of the distance from the epipolar line, with mode EPIPOLAR.
      band: half width of the band around a line, in pixels; with SOFT in units of a frame's largest distance over half
        of the shorter side (3 in the paper and in its code).
      decay: magnitude of the bias at twice that width.
      without_baseline: what frames attend to when two cameras have a common center and no epipolar lines: "pseudo"
        (near lines of a random direction through the corresponding point, as released) or "open" (the whole frame).
      kernel: implementation of attention along lines.
    """

    every: Layers = 5
    heads: Count | None = None
    sublayers: Layers = 2
    depth: Layers = 1
    groups: Count = 32
    mode: SyncMode = SyncMode.EPIPOLAR
    bias: EpipolarBias = EpipolarBias.SOFT
    band: Positive = 3.0
    decay: Positive = 3.0
    without_baseline: Literal["pseudo", "open"] = "pseudo"
    kernel: EpipolarKernel = EpipolarKernel.AUTO


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewDiTConfig(VideoDiTConfig):
    """A `VideoDiT` whose views attend to each other, with optional camera conditioning.

    Attributes:
      sync: the modules between the blocks; None for independent views.
      rays: add an embedding of the Plücker coordinates of the cameras' rays to the patches of the clip.
      adapter_rank: rank of a LoRA for the blocks' attention, 0 for none. It is active for one kind of data and absorbs
        what is specific to it, so that the other weights do not.
    """

    sync: SyncConfig | None = SyncConfig()
    rays: bool = True
    adapter_rank: CountOrZero = 0

    def validate(self) -> None:
        super().validate()
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
        """Number of synchronization modules."""
        return 0 if self.sync is None else self.layers // self.sync.every

    @property
    def plain(self) -> VideoDiTConfig:
        """Configuration of the single-view transformer, as published weights have it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(VideoDiTConfig)}
        return VideoDiTConfig(**fields)
