"""The convolutional half of the tokenizer: encoder and decoder, with or without cross-attention to context frames."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from jvgen.models.image_vae.config import NORM_EPSILON
from jvgen.models.image_vae.model import Downsample, Level, MidBlock, Upsample
from jvgen.models.ivideogpt.config import CROSS_HEADS, CROSS_NORM_EPSILON, CompressiveTokenizerConfig
from jvgen.nn.attention import attention
from jvgen.nn.conv import Conv2d
from jvgen.nn.dropout import attention_with_dropout, dropout, folded
from jvgen.nn.linear import Linear
from jvgen.nn.norm import GroupNorm
from jvgen.nn.stacked import run_block
from jvgen.parallel.axes import CONV_IN, CONV_OUT


class Condition(NamedTuple):
    """Keys and values of the context frames at one cross-attention: `B K N D`, K = context frames x height x width."""

    key: jax.Array
    value: jax.Array


class ContextAttention(nnx.Module):
    """`silu(z + attention(z, context))`: the non-linearity is outside the residual sum.

    Learned positions are added after the norms and before the projections, so they are in the values too. The
    statistics of the context's norm are over all context frames together.

    Args:
      features: channels of both feature maps.
      side: height and width of both feature maps.
      config: context frames, groups of the norms, dropout rate (of the weights, and of the output projection).
    """

    def __init__(self, features: int, side: int, config: CompressiveTokenizerConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout

        def norm() -> GroupNorm:
            return GroupNorm(features, groups=config.attention_groups, epsilon=CROSS_NORM_EPSILON, axis=CONV_OUT)

        def projection() -> Linear:
            init = nnx.initializers.xavier_uniform()
            return Linear(features, features, axes=(CONV_IN, CONV_OUT), kernel_init=init, rngs=rngs)

        def positions(count: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((count, features), jnp.float32), logical_axes=(None, CONV_OUT))

        self.context_norm, self.query_norm = norm(), norm()
        self.context_positions = positions(config.context_frames * side * side)
        self.query_positions = positions(side * side)
        self.query, self.key, self.value, self.output = (projection() for _ in range(4))

    def condition(self, context: Float[Array, "B T H W C"]) -> Condition:
        """Keys and values of feature maps of the context frames."""
        tokens = rearrange(self.context_norm(context), "b t h w c -> b (t h w) c")
        tokens = tokens + self.context_positions[...].astype(tokens.dtype)
        return Condition(*(_heads(projection(tokens)) for projection in (self.key, self.value)))

    def __call__(
        self, maps: Float[Array, "N H W C"], condition: Condition, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "N H W C"]:
        """Maps of N = B x F future frames, the F frames of each of the B contexts adjacent."""
        batch, (_, height, width, _) = condition.key.shape[0], maps.shape
        tokens = rearrange(self.query_norm(maps), "n h w c -> n (h w) c")
        tokens = tokens + self.query_positions[...].astype(tokens.dtype)
        # Frames of one clip read the same context: their queries form one row.
        queries = _heads(self.query(rearrange(tokens, "(b f) l c -> b (f l) c", b=batch)))
        if keys is None or self.dropout_rate == 0.0:
            mixed = attention(queries, condition.key, condition.value)
        else:
            mixed = attention_with_dropout(queries, condition.key, condition.value, folded(keys, 0), self.dropout_rate)
        mixed = dropout(self.output(rearrange(mixed, "b l n d -> b l (n d)")), folded(keys, 1), self.dropout_rate)
        mixed = rearrange(mixed, "b (f h w) c -> (b f) h w c", h=height, w=width)
        return jax.nn.silu(maps + mixed)


class BackboneOutput(NamedTuple):
    """Output of an encoder or a decoder.

    Attributes:
      output: latents or frames.
      maps: feature maps that a context is read from, by level; -1 is the middle of a decoder.
      last: input of the last convolution.
    """

    output: jax.Array
    maps: dict[int, jax.Array]
    last: jax.Array


class _Backbone(nnx.Module):
    """The layers that encoder and decoder share, and the cross-attentions to a context (`sites`)."""

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
        self.site_levels = tuple(level for level, _ in sites)
        self.sites = nnx.List(
            [
                # The middle of a decoder is as wide as its first level.
                ContextAttention(widths[max(level, 0)], side, config, rngs=rngs)
                for level, side in (sites if reads_context else ())
            ]
        )

    def conditions(self, maps: dict[int, Float[Array, "B T H W C"]]) -> tuple[Condition, ...]:
        """Conditions of all cross-attentions from the context's feature maps, for any number of future frames."""
        return tuple(site.condition(maps[level]) for level, site in zip(self.site_levels, self.sites, strict=True))

    def _attend(
        self,
        level: int,
        hidden: jax.Array,
        conditions: tuple[Condition, ...] | None,
        keys: jax.Array | None,
    ) -> jax.Array:
        if conditions is None or level not in self.site_levels:
            return hidden
        number = self.site_levels.index(level)
        return run_block(self.sites[number], self.config.remat, hidden, conditions[number], folded(keys, number))

    def _output(self, hidden: jax.Array, maps: dict[int, jax.Array]) -> BackboneOutput:
        last = jax.nn.silu(self.norm_out(hidden))
        return BackboneOutput(self.conv_out(last), maps, last)


class Encoder(_Backbone):
    """Frames `N H W 3` to latents `N h w z`; with `reads_context`, cross-attention after some of its levels."""

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
    ) -> BackboneOutput:
        hidden, maps = self.conv_in(frames), {}
        for index, level in enumerate(self.levels):
            hidden = level(hidden, self.config.remat)
            if index in self.site_levels:
                maps[index] = hidden
            hidden = self._attend(index, hidden, conditions, keys)
        return self._output(self.mid(hidden, self.config.remat), maps)


class Decoder(_Backbone):
    """Latents `N h w z` to frames `N H W 3`; with `reads_context`, cross-attention in its middle and after levels."""

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
    ) -> BackboneOutput:
        hidden = self.mid(self.conv_in(latents), self.config.remat)
        maps = {-1: hidden}
        hidden = self._attend(-1, hidden, conditions, keys)
        for index, level in enumerate(self.levels):
            hidden = level(hidden, self.config.remat)
            if index in self.site_levels:
                maps[index] = hidden
            hidden = self._attend(index, hidden, conditions, keys)
        return self._output(hidden, maps)


def _heads(tokens: Float[Array, "B L C"]) -> Float[Array, "B L N D"]:
    return rearrange(tokens, "b l (n d) -> b l n d", n=CROSS_HEADS)
