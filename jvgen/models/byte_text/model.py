"""A small pre-norm transformer encoder over bytes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.byte_text.tokenizer import VOCABULARY
from jvgen.nn.attention import attention
from jvgen.nn.embeddings import Embedding, sincos_axis
from jvgen.nn.feed_forward import FeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.norm import LayerNorm
from jvgen.nn.stacked import LAYER_INPUT, Stacked
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

TOKENS = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


class ByteTextBlock(nnx.Module):
    """Norm, attention, sum; norm, feed-forward, sum."""

    def __init__(self, config: ByteTextConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        width = config.width
        output_init = nnx.initializers.normal(0.02 / math.sqrt(2 * config.layers))

        def projection() -> Linear:
            return Linear(width, width, axes=(axes.EMBED, axes.HEADS), rngs=rngs)

        self.attention_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.query, self.key, self.value = projection(), projection(), projection()
        self.output = Linear(width, width, axes=(axes.HEADS, axes.EMBED), kernel_init=output_init, rngs=rngs)
        self.feed_forward_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.feed_forward = FeedForward(width, width * config.feed_forward_ratio, output_init=output_init, rngs=rngs)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        normed = self.attention_norm(x)
        heads = (
            rearrange(projection(normed), "b l (n d) -> b l n d", n=self.heads)
            for projection in (self.query, self.key, self.value)
        )
        x = constrain(x + self.output(rearrange(attention(*heads), "b l n d -> b l (n d)")), *TOKENS)
        return constrain(x + self.feed_forward(self.feed_forward_norm(x)), *TOKENS)


class ByteTextEncoder(nnx.Module):
    """Byte tokens to embeddings. Padding is attended to, as in CogVideoX."""

    def __init__(self, config: ByteTextConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        # Of the same scale as the positions that are added.
        self.embedding = Embedding(
            VOCABULARY,
            config.width,
            axes=(axes.VOCABULARY, axes.EMBED),
            init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.blocks = Stacked(lambda layer_rngs: ByteTextBlock(config, rngs=layer_rngs), config.layers, rngs=rngs)
        self.final_norm = LayerNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)

    def __call__(self, tokens: Int[Array, "B L"], *, dtype: Any = jnp.float32) -> Float[Array, "B L C"]:
        """Embeddings of token ids (see `tokenizer.tokenize`), layer-normed, computed in `dtype`."""
        positions = jnp.asarray(sincos_axis(np.arange(tokens.shape[1]), self.config.width))
        x = constrain((self.embedding(tokens).astype(jnp.float32) + positions).astype(dtype), *TOKENS)

        def step(block: ByteTextBlock, carry: jax.Array, _: Any) -> jax.Array:
            return block(checkpoint_name(carry, LAYER_INPUT))

        return self.final_norm(self.blocks.scan(step, x, remat=self.config.remat, unroll=self.config.unroll))
