"""How a future frame reads its context: cross-attention from its feature map to those of the context frames."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from jvgen.models.ivideogpt.config import CROSS_HEADS, CROSS_NORM_EPSILON, CompressiveTokenizerConfig
from jvgen.nn.attention import attention
from jvgen.nn.dropout import attention_with_dropout, dropout, folded
from jvgen.nn.linear import Linear
from jvgen.nn.norm import GroupNorm
from jvgen.parallel.axes import CONV_IN, CONV_OUT


class Condition(NamedTuple):
    """What one site has read of the context frames: keys and values, `B K N D`, K = context frames x height x width."""

    key: jax.Array
    value: jax.Array


class ContextAttention(nnx.Module):
    """`silu(z + attention(z, context))`: the non-linearity is outside of the residual sum.

    Learned positions are added after the norms and before the projections, so they are in the values too. The norm of
    the context takes its statistics over all context frames together.

    Args:
      features: channels of both maps.
      side: height and width of both maps.
      config: frames of context, groups of the norms, dropout (of the weights, and again of the result).
    """

    def __init__(self, features: int, side: int, config: CompressiveTokenizerConfig, *, rngs: nnx.Rngs):
        self.rate = config.dropout

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

    def read(self, context: Float[Array, "B T H W C"]) -> Condition:
        """Keys and values of feature maps of the context frames."""
        tokens = rearrange(self.context_norm(context), "b t h w c -> b (t h w) c")
        tokens = tokens + self.context_positions[...].astype(tokens.dtype)
        return Condition(*(_heads(projection(tokens)) for projection in (self.key, self.value)))

    def __call__(
        self, maps: Float[Array, "N H W C"], condition: Condition, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "N H W C"]:
        """Maps of N = B x F future frames, F after each other for each of the B contexts."""
        batch, (_, height, width, _) = condition.key.shape[0], maps.shape
        tokens = rearrange(self.query_norm(maps), "n h w c -> n (h w) c")
        tokens = tokens + self.query_positions[...].astype(tokens.dtype)
        # Frames of one clip read the same context: one row of queries for all of them.
        queries = _heads(self.query(rearrange(tokens, "(b f) l c -> b (f l) c", b=batch)))
        if keys is None or self.rate == 0.0:
            mixed = attention(queries, condition.key, condition.value)
        else:
            mixed = attention_with_dropout(queries, condition.key, condition.value, folded(keys, 0), self.rate)
        mixed = dropout(self.output(rearrange(mixed, "b l n d -> b l (n d)")), folded(keys, 1), self.rate)
        mixed = rearrange(mixed, "b (f h w) c -> (b f) h w c", h=height, w=width)
        return jax.nn.silu(maps + mixed)


def _heads(tokens: Float[Array, "B L C"]) -> Float[Array, "B L N D"]:
    return rearrange(tokens, "b l (n d) -> b l n d", n=CROSS_HEADS)
