"""A Llama over frame tokens: actions are added to the slots that open frames, rewards are read off their last tokens.

The same layers train on whole sequences and decode with a cache of keys and values (`FrameTransformer.decode`); what
a cache holds is the business of `jvgen.models.ivideogpt.decoding`.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.ivideogpt.layout import Layout
from jvgen.nn.attention import attention
from jvgen.nn.dropout import attention_with_dropout, folded
from jvgen.nn.embeddings import Embedding
from jvgen.nn.feed_forward import GatedFeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.network import Parameters
from jvgen.nn.norm import RMSNorm
from jvgen.nn.rope import Rotation, line_rotation, rotate_halves
from jvgen.nn.stacked import LAYER_INPUT, Stacked
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

TOKENS = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


@runtime_checkable
class LayerCache(Protocol):
    """Keys and values of one layer that new tokens read besides their own."""

    def attend(
        self, query: Float[Array, "B L N D"], key: Float[Array, "B L N D"], value: Float[Array, "B L N D"]
    ) -> tuple[Float[Array, "B L N D"], "LayerCache"]:
        """Causal attention of new tokens, rotated, over the cache and themselves; and the cache with them in it."""


class CausalAttention(nnx.Module):
    """Causal self-attention with rotary positions, without biases."""

    def __init__(self, config: FrameTransformerConfig, *, rngs: nnx.Rngs):
        self.heads, self.dropout_rate = config.heads, config.attention_dropout
        into, out = (axes.EMBED, axes.HEADS), (axes.HEADS, axes.EMBED)
        width = config.width
        self.query, self.key, self.value = (Linear(width, width, axes=into, bias=False, rngs=rngs) for _ in range(3))
        self.output = Linear(width, width, axes=out, bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        rotation: Rotation,
        keys: Key[Array, "B"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B L C"], LayerCache | None]:
        query, key, value = (
            rearrange(projection(x), "b l (n d) -> b l n d", n=self.heads)
            for projection in (self.query, self.key, self.value)
        )
        query, key = rotate_halves(query, rotation), rotate_halves(key, rotation)
        if cache is not None:
            mixed, cache = cache.attend(query, key, value)
        elif keys is None or self.dropout_rate == 0.0:
            mixed = attention(query, key, value, causal=True)
        else:
            mixed = attention_with_dropout(query, key, value, keys, self.dropout_rate, causal=True)
        mixed = rearrange(mixed, "b l n d -> b l (n d)")
        return self.output(constrain(mixed, axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS)), cache


class Block(nnx.Module):
    """Pre-norm attention and gated feed-forward (SiLU), each with a residual sum."""

    def __init__(self, config: FrameTransformerConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.attention = CausalAttention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.feed_forward = GatedFeedForward(config.width, config.hidden, activation=jax.nn.silu, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        rotation: Rotation,
        keys: Key[Array, "B"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B L C"], LayerCache | None]:
        """The layer's output; with a cache, also the cache with the new tokens in it.

        Args:
          x: tokens.
          rotation: rotary angles of their positions.
          keys: dropout keys, one per sequence; None for no dropout.
          cache: keys and values of earlier tokens; None to attend among the given tokens alone.
        """
        attended, cache = self.attention(self.attention_norm(x), rotation, keys, cache)
        x = constrain(x + attended, *TOKENS)
        return constrain(x + self.feed_forward(self.feed_forward_norm(x)), *TOKENS), cache


class FrameTransformer(nnx.Module):
    """Token ids to hidden states; `logits`, `rewards` and `reconstructed_actions` are its heads.

    Without actions the model is a plain Llama. The action projection is initialized at zero, so that an action-free
    model given actions starts as what it was.

    Args:
      config: the architecture.
      unstacked: one module per layer in place of stacked parameters: for decoding (`unstack` converts parameters).
    """

    def __init__(self, config: FrameTransformerConfig, *, unstacked: bool = False, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        table = (axes.VOCABULARY, axes.EMBED)
        self.embedding = Embedding(config.vocabulary, config.width, axes=table, rngs=rngs)
        if unstacked:
            self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        else:
            self.blocks = Stacked(lambda layer_rngs: Block(config, rngs=layer_rngs), config.layers, rngs=rngs)
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.head = Linear(config.width, config.vocabulary, axes=table[::-1], bias=False, rngs=rngs)
        zeros = {"axes": (None, axes.EMBED), "kernel_init": nnx.initializers.zeros, "rngs": rngs}
        out = {"axes": (axes.EMBED, None), "rngs": rngs}
        width, action = config.width, config.action_width
        self.action = Linear(action, width, **zeros) if action else None
        self.reward = Linear(width, 1, **out) if config.reward else None
        self.action_reconstruction = Linear(width, action, **out) if config.action_reconstruction else None
        places = sum(count + 1 for count in config.tokens_per_frame or ())
        zero_table = {"axes": (None, axes.EMBED), "init": nnx.initializers.zeros, "rngs": rngs}
        self.place = Embedding(places, width, **zero_table) if places else None

    def embed(
        self,
        tokens: Int[Array, "B L"],
        layout: Layout | None = None,
        actions: Float[Array, "B F A"] | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B L C"]:
        """Embeddings of ids, with those of actions added at the slots of future frames.

        Args:
          tokens: ids from the start of a sequence: all, or the prompt.
          layout: of the sequence; needed with actions or `tokens_per_frame`.
          actions: the action that leads to each future frame (`Layout.action_frames`), as recorded, not normalized.
          dtype: of the computation.
        """
        x = self.embedding(tokens).astype(dtype)
        if self.place is not None:
            assert layout is not None
            x = x + self.place(jnp.asarray(layout.places[None, : tokens.shape[1]])).astype(dtype)
        if actions is not None:
            assert self.action is not None and layout is not None
            embedded = self.action(actions.astype(dtype))
            if self.config.action_everywhere:
                x = x.at[:, layout.prompt_length :].add(jnp.repeat(embedded, layout.frame_length, axis=1))
            else:
                x = x.at[:, layout.future_slots].add(embedded)
        return constrain(x, *TOKENS)

    def embed_frame(
        self,
        ids: Int[Array, "B L"],
        first: Int[Array, ""] | int,
        layout: Layout,
        actions: Float[Array, "B A"] | None,
        *,
        opens: bool,
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B L C"]:
        """Embeddings of successive ids of one future frame of each sequence.

        Args:
          ids: the slot alone, or ids after it.
          first: the place of the first of them in the frame; 0 for the slot.
          layout: of the sequence.
          actions: those that lead to the frame.
          opens: they are the slot.
          dtype: of the computation.
        """
        x = self.embedding(ids).astype(dtype)
        if self.place is not None:
            x = x + self.place((layout.future_place + first + jnp.arange(ids.shape[1]))[None]).astype(dtype)
        if actions is not None and (opens or self.config.action_everywhere):
            assert self.action is not None, "actions given to a transformer without them"
            x = x + self.action(actions.astype(dtype))[:, None]
        return constrain(x, *TOKENS)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        layout: Layout | None = None,
        actions: Float[Array, "B F A"] | None = None,
        keys: Key[Array, "B"] | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B L C"]:
        """Hidden states of whole sequences after the last norm; arguments as in `embed`, and dropout keys."""
        x = self.embed(tokens, layout, actions, dtype=dtype)
        rotation = self._rotation(jnp.arange(tokens.shape[1]))

        def step(block: Block, carry: jax.Array, layer: jax.Array) -> jax.Array:
            return block(checkpoint_name(carry, LAYER_INPUT), rotation, folded(keys, layer))[0]

        layers = jnp.arange(self.config.layers)
        x = self.blocks.scan(step, x, layers, remat=self.config.remat, unroll=self.config.unroll)
        return self.final_norm(x)

    def decode(
        self, x: Float[Array, "B L C"], positions: Int[Array, "L"], caches: tuple[LayerCache, ...]
    ) -> tuple[Float[Array, "B L C"], tuple[LayerCache, ...]]:
        """Hidden states of embedded tokens that follow on those in the caches, and the caches with them in it.

        Args:
          x: of `embed` or `embed_frame`.
          positions: in the sequence.
          caches: one per layer.
        """
        rotation, after = self._rotation(positions), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, rotation, cache=cache)
            after.append(cache)
        return self.final_norm(x), tuple(after)

    def logits(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B V"]:
        """Scores of the next id, float32."""
        return self.head(hidden).astype(jnp.float32)

    def reconstructed_actions(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B A"]:
        """The action reconstructed from a frame's hidden states, float32."""
        assert self.action_reconstruction is not None
        return self.action_reconstruction(hidden).astype(jnp.float32)

    def rewards(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        """Predicted rewards, float32, from hidden states of frames' last tokens, in the scale they were trained in."""
        assert self.reward is not None
        return self.reward(hidden)[..., 0].astype(jnp.float32)

    def _rotation(self, positions: Int[Array, "L"]) -> Rotation:
        return line_rotation(positions, head_width=self.config.head_width, theta=self.config.rope_theta)


def unstack(parameters: Parameters, layers: int) -> Parameters:
    """Parameters of `FrameTransformer` in the structure of the unstacked one, which decodes."""
    stacked = parameters["blocks"]["layers"]
    return {
        **parameters,
        "blocks": {str(layer): jax.tree.map(lambda leaf, i=layer: leaf[i], stacked) for layer in range(layers)},
    }
