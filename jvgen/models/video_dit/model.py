"""The CogVideoX denoiser: text and video rows in one sequence, with joint attention and separate modulation."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jvgen.models.video_dit import aggregation, aggregation_memory
from jvgen.models.video_dit.aggregation import Aggregation
from jvgen.models.video_dit.config import Positions, VideoDiTConfig
from jvgen.nn.attention import attention
from jvgen.nn.embeddings import PatchEmbedding, TimestepEmbedding, sincos_positions, token_grid, unpatchify
from jvgen.nn.feed_forward import FeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.modulation import Modulation, TextVideoModulation, gated_residual, modulated_norm
from jvgen.nn.norm import LayerNorm
from jvgen.nn.rope import Rotation, rotate, rotation
from jvgen.nn.stacked import LAYER_INPUT, Stacked
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

TOKENS = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """What the rows of a sequence are: `text` rows, then frames x rows x columns of video, then padding."""

    text: int
    grid: tuple[int, int, int]
    padding: int = 0

    @property
    def valid(self) -> int:
        """Rows that are not padding."""
        return self.text + math.prod(self.grid)

    @property
    def length(self) -> int:
        """All rows."""
        return self.valid + self.padding


# From normed, rotated queries and keys `B L N D`, the layout of the rows and the layer index: float32 factors `#B #N`
# on the video rows of the attention output, one for all heads or one per head.
AttentionScale = Callable[[jax.Array, jax.Array, TokenLayout, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockContext:
    """Inputs that are the same for every block.

    Attributes:
      condition: embedding of the timestep (and offset), `B C` float32.
      layout: what the rows are.
      is_video: `L` bool, false for rows of text.
      rotation: of queries and keys; None without rotary positions.
      attention_scale: see `AttentionScale`; None for no scaling.
      layer: index of the block, int32; set if there is an attention_scale.
    """

    condition: jax.Array
    layout: TokenLayout
    is_video: jax.Array
    rotation: Rotation | None = None
    attention_scale: AttentionScale | None = None
    layer: jax.Array | None = None


class JointAttention(nnx.Module):
    """Self-attention over all rows, with normed queries and keys.

    Queries, keys and values have separate kernels: their heads shard over the `tensor` axis without slicing, and
    optimizers that work on matrices (Muon) see each matrix.
    """

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width

        def projection() -> Linear:
            return Linear(width, width, axes=(axes.EMBED, axes.HEADS), rngs=rngs)

        self.query, self.key, self.value = projection(), projection(), projection()
        self.query_norm = LayerNorm(config.head_width, epsilon=config.query_key_epsilon, axis=axes.KV)
        self.key_norm = LayerNorm(config.head_width, epsilon=config.query_key_epsilon, axis=axes.KV)
        self.output = Linear(
            width, width, axes=(axes.HEADS, axes.EMBED), kernel_init=residual_init(config.layers), rngs=rngs
        )

    def __call__(self, x: Float[Array, "B L C"], context: BlockContext) -> Float[Array, "B L C"]:
        query, key, value = (self._heads(projection(x)) for projection in (self.query, self.key, self.value))
        query = self._normed(self.query_norm, query, context)
        key = self._normed(self.key_norm, key, context)
        valid_length = context.layout.valid if context.layout.padding else None
        kernels = {"kernel": self.config.attention, "sequence": self.config.sequence_parallel}
        mixed = attention(query, key, value, valid_length=valid_length, **kernels)
        if context.attention_scale is None:
            return self._projected(mixed)
        factor = context.attention_scale(query, key, context.layout, context.layer)
        mean = jnp.mean(factor, axis=1, keepdims=True)
        if factor.shape[1] > 1:
            mixed = _scaled(mixed, (factor / mean)[:, None, :, None], context.is_video[None, :, None, None])
        # The mean factor is applied after the projection, so that it scales the bias too.
        return _scaled(self._projected(mixed), mean[:, None], context.is_video[None, :, None])

    def _projected(self, mixed: Float[Array, "B L N D"]) -> Float[Array, "B L C"]:
        mixed = rearrange(mixed, "b l n d -> b l (n d)")
        return self.output(constrain(mixed, axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS))

    def _normed(self, norm: LayerNorm, x: Float[Array, "B L N D"], context: BlockContext) -> Float[Array, "B L N D"]:
        def compute(x: jax.Array) -> jax.Array:
            x = norm(x)
            return x if context.rotation is None else rotate(x, context.rotation)

        # As in `modulated_norm`, the backward pass recomputes this from the projected queries and keys.
        return jax.checkpoint(compute, prevent_cse=False)(x)

    def _heads(self, x: Float[Array, "B L C"]) -> Float[Array, "B L N D"]:
        x = rearrange(x, "b l (n d) -> b l n d", d=self.config.head_width)
        return constrain(x, axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None)


def _scaled(x: jax.Array, factor: jax.Array, rows: jax.Array) -> jax.Array:
    """`x` with some rows multiplied by a factor, in float32; keeps the dtype."""
    return jnp.where(rows, (x.astype(jnp.float32) * factor).astype(x.dtype), x)


class Block(nnx.Module):
    """One transformer block: modulated norm, attention, gate; modulated norm, feed-forward, gate."""

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs):
        width, condition = config.width, config.condition_width
        modulation_init = nnx.initializers.zeros if config.zero_init else nnx.initializers.normal(0.02)
        self.attention_modulation = TextVideoModulation(condition, width, kernel_init=modulation_init, rngs=rngs)
        self.attention_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.attention = JointAttention(config, rngs=rngs)
        self.feed_forward_modulation = TextVideoModulation(condition, width, kernel_init=modulation_init, rngs=rngs)
        self.feed_forward_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.feed_forward = FeedForward(
            width, width * config.feed_forward_ratio, output_init=residual_init(config.layers), rngs=rngs
        )

    def __call__(self, x: Float[Array, "B L C"], context: BlockContext) -> Float[Array, "B L C"]:
        rows = self.attention_modulation(context.condition, context.is_video, x.dtype)
        update = self.attention(modulated_norm(self.attention_norm, x, rows.shift, rows.scale), context)
        x = gated_residual(x, constrain(update, *TOKENS), rows.gate)
        rows = self.feed_forward_modulation(context.condition, context.is_video, x.dtype)
        update = self.feed_forward(modulated_norm(self.feed_forward_norm, x, rows.shift, rows.scale))
        return constrain(gated_residual(x, constrain(update, *TOKENS), rows.gate), *TOKENS)


class VideoDiT(nnx.Module):
    """Predicts the target of the schedule (noise, v, velocity) for a noisy latent clip; see the README of this folder.

    The residual stream has the dtype of the latents, as published; norms, softmax, modulation and residual sums are
    computed in float32 and rounded once.
    """

    def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        width = config.width
        self.patch_embedding = PatchEmbedding(config.in_channels, width, patch=config.patch_shape, rngs=rngs)
        self.text_projection = Linear(config.text_width, width, axes=(None, axes.EMBED), rngs=rngs)
        if config.positions is Positions.ROTARY_AND_LEARNED:
            rows = config.text_length + config.sample_frames * math.prod(config.base_grid)
            self.learned_positions = nnx.Param(
                nnx.initializers.normal(0.02)(rngs.params(), (rows, width), jnp.float32),
                logical_axes=(None, axes.EMBED),
            )
        self.timestep_embedding = TimestepEmbedding(width, config.condition_width, rngs=rngs)
        if config.offset_width is not None:
            self.offset_embedding = TimestepEmbedding(
                config.offset_width, config.condition_width, width_axis=None, rngs=rngs
            )
        self.blocks = Stacked(lambda layer_rngs: Block(config, rngs=layer_rngs), config.layers, rngs=rngs)
        if config.aggregation is not None:
            self.aggregation = Aggregation(config.aggregation, layers=config.layers, width=width)
        self.final_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        zeros = nnx.initializers.zeros
        self.output_modulation = Modulation(
            config.condition_width,
            width,
            2,
            kernel_init=zeros if config.zero_init else nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.output_norm = LayerNorm(width, epsilon=config.output_norm_epsilon, axis=axes.EMBED)
        self.output = Linear(
            width,
            math.prod(config.patch_shape) * config.out_channels,
            axes=(axes.EMBED, None),
            kernel_init=zeros if config.zero_init else nnx.initializers.xavier_uniform(),
            rngs=rngs,
        )

    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        text: Float[Array, "B T K"],
        timesteps: Float[Array, "B"],
        *,
        offsets: Float[Array, "B"] | None = None,
        attention_scale: AttentionScale | None = None,
        hidden_after: int | None = None,
    ) -> Float[Array, "B F H W Z"] | tuple[Float[Array, "B F H W Z"], Float[Array, "B F P D"]]:
        """Denoise.

        Args:
          latents: noisy latent clips; their dtype is the compute dtype.
          text: embeddings of the captions.
          timesteps: raw timesteps, 0..999.
          offsets: the "ofs" of 1.5 image to video; required if and only if the config has an offset_width.
          attention_scale: see `AttentionScale`.
          hidden_after: a block, from 0, whose video tokens by frame and patch are returned too.

        Raises:
          ValueError: shapes that the patches do not divide, or that the config does not allow.
        """
        layout = self.layout((latents.shape[1], latents.shape[2], latents.shape[3]), text.shape[1])
        context = self.context(timesteps, layout, offsets=offsets, attention_scale=attention_scale)
        x = self.embed(latents, text, layout)
        if hidden_after is None:
            return self.head(self.run_blocks(x, context), context)
        x, hidden = self.run_blocks(x, context, pause_after=hidden_after)
        video = rearrange(hidden[:, layout.text : layout.valid], "b (f p) d -> b f p d", f=layout.grid[0])
        return self.head(x, context), video

    def layout(self, shape: tuple[int, int, int], text: int) -> TokenLayout:
        """The rows of a sequence for latents of (frames, height, width) and `text` rows of text."""
        if text > self.config.text_length:
            raise ValueError(f"{text} rows of text: the maximum is text_length = {self.config.text_length}.")
        grid = token_grid(shape, self.config.patch_shape)
        valid = text + math.prod(grid)
        # Devices with whole examples need no rows that only make shards of a sequence equal.
        multiple = self.config.token_multiple // math.gcd(self.config.token_multiple, axes.spread_parts())
        return TokenLayout(text=text, grid=grid, padding=-valid % multiple)

    def context(
        self,
        timesteps: Float[Array, "B"],
        layout: TokenLayout,
        *,
        offsets: Float[Array, "B"] | None = None,
        attention_scale: AttentionScale | None = None,
    ) -> BlockContext:
        """Inputs of all blocks: the conditioning vector, the mask of video rows, the rotation."""
        config = self.config
        condition = self.timestep_embedding(timesteps)
        if (offsets is None) != (config.offset_width is None):
            raise ValueError(
                f"offsets {'are missing' if offsets is None else 'were given'}: offset_width = {config.offset_width}; "
                "give offsets if and only if the config has an offset_width."
            )
        if offsets is not None:
            condition = condition + self.offset_embedding(offsets)
        query_key_rotation = None
        if config.positions is not Positions.SINCOS:
            query_key_rotation = rotation(
                layout.grid,
                head_width=config.head_width,
                kind=config.rotary_grid,
                base=config.base_grid,
                before=layout.text,
                after=layout.padding,
            )
        is_video = jnp.arange(layout.length) >= layout.text
        return BlockContext(condition, layout, is_video, query_key_rotation, attention_scale)

    def embed(
        self, latents: Float[Array, "B F H W C"], text: Float[Array, "B T K"], layout: TokenLayout
    ) -> Float[Array, "B L D"]:
        """The joint sequence: projected text, projected patches, padding; plus additive positions if there are any."""
        config = self.config
        patches = self.patch_embedding(latents)
        if config.positions is Positions.SINCOS:
            positions = sincos_positions(
                layout.grid,
                config.width,
                spatial_scale=config.spatial_scale,
                column_scale=config.column_scale,
                temporal_scale=config.temporal_scale,
            )
            patches = patches + positions.astype(patches.dtype)
        rows = self.text_projection(text.astype(latents.dtype))
        if config.positions is Positions.ROTARY_AND_LEARNED:
            config.check_grid(layout.grid)
            table = self.learned_positions[...].astype(patches.dtype)
            rows = rows + table[: layout.text]
            patches = patches + table[config.text_length : config.text_length + math.prod(layout.grid)]
        x = jnp.concatenate([rows, patches], axis=1)
        if layout.padding:
            x = jnp.pad(x, ((0, 0), (0, layout.padding), (0, 0)))
        return constrain(x, *TOKENS)

    def run_blocks(self, x: Float[Array, "B L D"], context: BlockContext, *, pause_after: int | None = None) -> Any:
        """Run all blocks, and return the last tokens, or with `pause_after` those after that block too.

        A variant that passes more than tokens from layer to layer overrides this method.
        """
        how = {"remat": self.config.remat, "unroll": self.config.unroll}
        indices = None if context.attention_scale is None else jnp.arange(self.config.layers)
        if self.config.aggregation is None:

            def step(block: Block, carry: jax.Array, index: jax.Array | None) -> jax.Array:
                return block(checkpoint_name(carry, LAYER_INPUT), dataclasses.replace(context, layer=index))

            return self.blocks.scan(step, x, indices, **how, pause_after=pause_after)

        def layer(block: Block, index: jax.Array, read: jax.Array, condition: jax.Array, constants: Any) -> jax.Array:
            is_video, query_key_rotation = constants
            inputs = {"condition": condition, "is_video": is_video, "rotation": query_key_rotation, "layer": index}
            return block(read, dataclasses.replace(context, **inputs))

        run_layers = aggregation_memory.run_layers if self.aggregation.config.memory_saving else aggregation.run_layers
        if pause_after is not None:
            assert not self.aggregation.config.memory_saving, "its backward pass is of all layers together"
            run_layers = functools.partial(aggregation.run_layers, pause_after=pause_after)
        gates, plan = self.aggregation.values(), self.aggregation.plan(self.config.layers)
        constants = (context.is_video, context.rotation)
        return run_layers(self.blocks, layer, gates, plan, x, context.condition, constants, **how)

    def head(self, x: Float[Array, "B L D"], context: BlockContext) -> Float[Array, "B F H W C"]:
        """From the last tokens to a clip: two norms, the second one modulated, a projection, and unpatchify."""
        layout = context.layout
        video = self.final_norm(x[:, layout.text : layout.valid])
        shift, scale = self.output_modulation(context.condition, x.dtype)
        tokens = self.output(modulated_norm(self.output_norm, video, shift, scale))
        return unpatchify(tokens, layout.grid, self.config.patch_shape)


def residual_init(layers: int) -> nnx.Initializer:
    """Normal, with a standard deviation that keeps the variance of 2 x layers residual updates independent of depth."""
    return nnx.initializers.normal(0.02 / math.sqrt(2 * layers))
