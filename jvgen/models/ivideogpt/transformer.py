"""A Llama over the tokens of frames; actions are added to the slots of frames, rewards read off their last token."""

from typing import Any

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
from jvgen.nn.norm import RMSNorm
from jvgen.nn.rope import Rotation, line_rotation, rotate_halves
from jvgen.nn.stacked import LAYER_INPUT, Stacked
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

TOKENS = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


class CausalAttention(nnx.Module):
    """Self-attention without biases over what came before, with rotary positions."""

    def __init__(self, config: FrameTransformerConfig, *, rngs: nnx.Rngs):
        self.heads, self.rate = config.heads, config.attention_dropout
        into, out = (axes.EMBED, axes.HEADS), (axes.HEADS, axes.EMBED)
        width = config.width
        self.query, self.key, self.value = (Linear(width, width, axes=into, bias=False, rngs=rngs) for _ in range(3))
        self.output = Linear(width, width, axes=out, bias=False, rngs=rngs)

    def project(
        self, x: Float[Array, "B L C"], rotation: Rotation
    ) -> tuple[Float[Array, "B L N D"], Float[Array, "B L N D"], Float[Array, "B L N D"]]:
        """Rotated queries and keys, and values."""
        query, key, value = (
            rearrange(projection(x), "b l (n d) -> b l n d", n=self.heads)
            for projection in (self.query, self.key, self.value)
        )
        return rotate_halves(query, rotation), rotate_halves(key, rotation), value

    def join(self, mixed: Float[Array, "B L N D"]) -> Float[Array, "B L C"]:
        """The output projection of what the heads read."""
        mixed = rearrange(mixed, "b l n d -> b l (n d)")
        return self.output(constrain(mixed, axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS))

    def __call__(
        self, x: Float[Array, "B L C"], rotation: Rotation, keys: Key[Array, "B"] | None
    ) -> Float[Array, "B L C"]:
        query, key, value = self.project(x, rotation)
        if keys is None or self.rate == 0.0:
            return self.join(attention(query, key, value, causal=True))
        return self.join(attention_with_dropout(query, key, value, keys, self.rate, causal=True))


class Block(nnx.Module):
    """Norm, attention, sum; norm, gated feed-forward with SiLU, sum."""

    def __init__(self, config: FrameTransformerConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.attention = CausalAttention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.feed_forward = GatedFeedForward(config.width, config.hidden, activation=jax.nn.silu, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L C"], rotation: Rotation, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B L C"]:
        x = constrain(x + self.attention(self.attention_norm(x), rotation, keys), *TOKENS)
        return constrain(x + self.feed_forward(self.feed_forward_norm(x)), *TOKENS)


class FrameTransformer(nnx.Module):
    """Token ids to hidden states; `logits`, `rewards` and `reconstructed_actions` read them.

    Without an action the model is a plain Llama. The map from actions starts at zero, so that an action-free model
    given actions begins as what it was.
    """

    def __init__(self, config: FrameTransformerConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        table = (axes.VOCABULARY, axes.EMBED)
        self.embedding = Embedding(config.vocabulary, config.width, axes=table, rngs=rngs)
        self.blocks = Stacked(lambda layer_rngs: Block(config, rngs=layer_rngs), config.layers, rngs=rngs)
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.head = Linear(config.width, config.vocabulary, axes=table[::-1], bias=False, rngs=rngs)
        zeros = {"axes": (None, axes.EMBED), "kernel_init": nnx.initializers.zeros, "rngs": rngs}
        out = {"axes": (axes.EMBED, None), "rngs": rngs}
        width, action = config.width, config.action_width
        self.action = Linear(action, width, **zeros) if action else None
        self.reward = Linear(width, 1, **out) if config.reward else None
        self.action_reconstruction = Linear(width, action, **out) if config.action_reconstruction else None

    def embed(
        self,
        tokens: Int[Array, "B L"],
        layout: Layout | None = None,
        actions: Float[Array, "B F A"] | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B L C"]:
        """What the first block sees: embeddings of ids, with those of actions added at the slots of future frames.

        Args:
          tokens: ids.
          layout: where the slots are; needed with actions.
          actions: the action that leads to each future frame (`Layout.action_frames`), as recorded, not normalised.
          dtype: of the computation.
        """
        x = self.embedding(tokens).astype(dtype)
        if actions is not None:
            assert self.action is not None and layout is not None
            x = x.at[:, layout.future_slots].add(self.action(actions.astype(dtype)))
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
        """Hidden states after the last norm; arguments as in `embed`, and keys of dropout."""
        x = self.embed(tokens, layout, actions, dtype=dtype)
        rotation = self.rotation(jnp.arange(tokens.shape[1]))

        def step(block: Block, carry: jax.Array, layer: jax.Array) -> jax.Array:
            return block(checkpoint_name(carry, LAYER_INPUT), rotation, folded(keys, layer))

        layers = jnp.arange(self.config.layers)
        x = self.blocks.scan(step, x, layers, remat=self.config.remat, unroll=self.config.unroll)
        return self.final_norm(x)

    def rotation(self, positions: Int[Array, "L"]) -> Rotation:
        """Rotary angles of positions in the sequence."""
        return line_rotation(positions, head_width=self.config.head_width, theta=self.config.rope_theta)

    def logits(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B V"]:
        """Scores of the next id, float32."""
        return self.head(hidden).astype(jnp.float32)

    def reconstructed_actions(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B A"]:
        """The action read back from a frame's hidden states, float32."""
        assert self.action_reconstruction is not None
        return self.action_reconstruction(hidden).astype(jnp.float32)

    def rewards(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        """Predicted rewards (in whatever scale they were trained in), float32, from hidden states of last tokens."""
        assert self.reward is not None
        return self.reward(hidden)[..., 0].astype(jnp.float32)
