"""The convolutional halves of the tokenizer: encoder and decoder, plain or reading a context at some levels."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from jvgen.models.image_vae.config import NORM_EPSILON
from jvgen.models.image_vae.model import Downsample, Level, MidBlock, Upsample
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.models.ivideogpt.cross_attention import Condition, ContextAttention
from jvgen.nn.conv import Conv2d
from jvgen.nn.dropout import folded
from jvgen.nn.norm import GroupNorm
from jvgen.nn.stacked import run_block
from jvgen.parallel.axes import CONV_OUT


class Passed(NamedTuple):
    """What a half gives: its result, the maps that a context is read from, by level (-1 for a decoder's middle), and
    what the last convolution read."""

    result: jax.Array
    maps: dict[int, jax.Array]
    last: jax.Array


class _Half(nnx.Module):
    """What encoder and decoder share: convolution in, middle, norm and convolution out, and the sites of a context."""

    def __init__(
        self,
        config: CompressiveTokenizerConfig,
        *,
        widths: Sequence[int],
        channels: tuple[int, int],
        layers: int,
        resample: type[Downsample] | type[Upsample],
        sites: Sequence[tuple[int, int]],
        reads_context: bool,
        rngs: nnx.Rngs,
    ):
        self.config = config
        backbone = config.backbone(mid_attention=reads_context or config.context_mid_attention)
        last = len(widths) - 1
        self.conv_in = Conv2d(channels[0], widths[0], rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(index - 1, 0)],
                    width,
                    layers,
                    None if index == last else resample,
                    backbone,
                    rngs=rngs,
                )
                for index, width in enumerate(widths)
            ]
        )
        self.mid = MidBlock(backbone, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=config.groups, epsilon=NORM_EPSILON, axis=CONV_OUT)
        self.conv_out = Conv2d(widths[-1], channels[1], rngs=rngs)
        self.places = tuple(level for level, _ in sites)
        self.sites = nnx.List(
            [
                # The middle of a decoder is as wide as its first level.
                ContextAttention(widths[max(level, 0)], side, config, rngs=rngs)
                for level, side in (sites if reads_context else ())
            ]
        )

    def conditions(self, maps: dict[int, Float[Array, "B T H W C"]]) -> tuple[Condition, ...]:
        """What each site reads of the context frames' maps, once for any number of future frames."""
        return tuple(site.read(maps[level]) for level, site in zip(self.places, self.sites, strict=True))

    def _attend(
        self,
        level: int,
        hidden: jax.Array,
        conditions: tuple[Condition, ...] | None,
        keys: jax.Array | None,
    ) -> jax.Array:
        if conditions is None or level not in self.places:
            return hidden
        number = self.places.index(level)
        return run_block(self.sites[number], self.config.remat, hidden, conditions[number], folded(keys, number))

    def _passed(self, hidden: jax.Array, maps: dict[int, jax.Array]) -> Passed:
        last = jax.nn.silu(self.norm_out(hidden))
        return Passed(self.conv_out(last), maps, last)


class Encoder(_Half):
    """Frames `N H W 3` to latents `N h w z`; reads a context after some of its levels if `reads_context`."""

    def __init__(self, config: CompressiveTokenizerConfig, *, reads_context: bool, rngs: nnx.Rngs):
        super().__init__(
            config, widths=config.block_channels, channels=(config.channels, config.latent_channels),
            layers=config.layers_per_block, resample=Downsample, sites=config.encoder_sites(),
            reads_context=reads_context, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        frames: Float[Array, "N H W C"],
        conditions: tuple[Condition, ...] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Passed:
        hidden, maps = self.conv_in(frames), {}
        for index, level in enumerate(self.levels):
            hidden = level(hidden, self.config.remat)
            if index in self.places:
                maps[index] = hidden
            hidden = self._attend(index, hidden, conditions, keys)
        return self._passed(self.mid(hidden, self.config.remat), maps)


class Decoder(_Half):
    """Latents `N h w z` to frames `N H W 3`; reads a context in its middle and after some levels if `reads_context`."""

    def __init__(self, config: CompressiveTokenizerConfig, *, reads_context: bool, rngs: nnx.Rngs):
        super().__init__(
            config, widths=config.block_channels[::-1], channels=(config.latent_channels, config.channels),
            layers=config.layers_per_block + 1, resample=Upsample, sites=config.decoder_sites(),
            reads_context=reads_context, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        latents: Float[Array, "N h w z"],
        conditions: tuple[Condition, ...] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Passed:
        hidden = self.mid(self.conv_in(latents), self.config.remat)
        maps = {-1: hidden}
        hidden = self._attend(-1, hidden, conditions, keys)
        for index, level in enumerate(self.levels):
            hidden = level(hidden, self.config.remat)
            if index in self.places:
                maps[index] = hidden
            hidden = self._attend(index, hidden, conditions, keys)
        return self._passed(hidden, maps)
