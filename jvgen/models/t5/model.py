"""The T5 v1.1 encoder: relative position biases, root-mean-square norms, gated GELU, scores without a scale."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jvgen.models.t5.config import T5Config
from jvgen.nn.attention import attention
from jvgen.nn.embeddings import Embedding
from jvgen.nn.feed_forward import GatedFeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.norm import RMSNorm
from jvgen.nn.stacked import LAYER_INPUT, Stacked
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

TOKENS = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


def relative_buckets(length: int, *, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 `length length`: exact for small distances, logarithmic for large ones.

    Half of the buckets are for keys before the query, half for keys after it.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    size = np.abs(distance)
    # In float32, as in the training code, so that distances at a border get the same bucket.
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return (np.where(size < exact, size, far) + np.where(distance > 0, half, 0)).astype(np.int32)


def _init(fan: int) -> nnx.Initializer:
    return nnx.initializers.normal(fan**-0.5)


class T5Attention(nnx.Module):
    """Self-attention without biases and without a scale on the scores."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.head_width = config.head_width
        width, inner = config.width, config.heads * config.head_width

        def projection(fan: int) -> Linear:
            return Linear(width, inner, axes=(axes.EMBED, axes.HEADS), bias=False, kernel_init=_init(fan), rngs=rngs)

        # The initial queries include the scale that the scores do not have.
        self.query = projection(width * config.head_width)
        self.key, self.value = projection(width), projection(width)
        self.output = Linear(
            inner, width, axes=(axes.HEADS, axes.EMBED), bias=False, kernel_init=_init(inner), rngs=rngs
        )

    def __call__(self, x: Float[Array, "B L C"], bias: Float[Array, "#B N L L"]) -> Float[Array, "B L C"]:
        heads = (
            rearrange(projection(x), "b l (n d) -> b l n d", d=self.head_width)
            for projection in (self.query, self.key, self.value)
        )
        mixed = rearrange(attention(*heads, scale=1.0, bias=bias), "b l n d -> b l (n d)")
        return self.output(constrain(mixed, axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS))


class T5Block(nnx.Module):
    """Norm, attention, sum; norm, gated feed-forward, sum."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.attention = T5Attention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.feed_forward = GatedFeedForward(
            config.width,
            config.hidden,
            input_init=_init(config.width),
            output_init=_init(config.hidden),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B L C"], bias: Float[Array, "#B N L L"]) -> Float[Array, "B L C"]:
        x = constrain(x + self.attention(self.attention_norm(x), bias), *TOKENS)
        return constrain(x + self.feed_forward(self.feed_forward_norm(x)), *TOKENS)


class T5Encoder(nnx.Module):
    """Token ids to embeddings: what transformers' `T5EncoderModel` returns as `last_hidden_state`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        self.embedding = Embedding(
            config.vocabulary,
            config.width,
            axes=(axes.VOCABULARY, axes.EMBED),
            init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        # Part of the first layer in the published files, used by all layers.
        self.position_bias = Embedding(
            config.buckets, config.heads, axes=(None, axes.HEADS), init=_init(config.width), rngs=rngs
        )
        self.blocks = Stacked(lambda layer_rngs: T5Block(config, rngs=layer_rngs), config.layers, rngs=rngs)
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_epsilon, axis=axes.EMBED)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        mask: Bool[Array, "B L"] | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> Float[Array, "B L C"]:
        """Embeddings of tokens.

        Args:
          tokens: ids, padded to one length.
          mask: true for tokens that may be attended to. None also attends to padding, as in CogVideoX and RepVideo.
          dtype: of the computation; biases on the scores, softmax and norms are always float32.
        """
        x = constrain(self.embedding(tokens).astype(dtype), *TOKENS)
        bias = self.bias(tokens.shape[1])
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)

        def step(block: T5Block, carry: jax.Array, _: Any) -> jax.Array:
            return block(checkpoint_name(carry, LAYER_INPUT), bias)

        x = self.blocks.scan(step, x, remat=self.config.remat, unroll=self.config.unroll)
        return self.final_norm(x)

    def bias(self, length: int) -> Float[Array, "1 N L L"]:
        """The bias on the scores of (query, key) pairs in every layer, float32."""
        buckets = relative_buckets(length, buckets=self.config.buckets, max_distance=self.config.max_distance)
        return rearrange(self.position_bias(jnp.asarray(buckets)), "q k n -> 1 n q k").astype(jnp.float32)
