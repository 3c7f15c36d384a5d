"""The cross-view synchronization module of CVD (Kuang et al. 2024, arXiv 2405.17414, section 4.1).

Frame k of one video attends to frame k of its partner, not to its own tokens. The module is independent of the network
it is inserted into; its last layer is initialized to zero, so that it is the identity at first.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from jvgen.geometry.epipolar import Band
from jvgen.nn.attention import AttentionKernel, attention
from jvgen.nn.epipolar_attention import EpipolarKernel, epipolar_attention
from jvgen.nn.feed_forward import GatedFeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.norm import GroupNorm, LayerNorm
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain


class SyncMode(enum.Enum):
    """What the tokens of a frame attend to."""

    EPIPOLAR = "epipolar"  # the partner's frame, near their epipolar lines (CVD)
    CROSS = "cross"  # the whole frame of the partner (CVD without epipolar attention)
    JOINT = "joint"  # the same frame of all views, including their own (SynCamMaster)


class Kernels(NamedTuple):
    """Implementations of attention without a band and with one."""

    attention: AttentionKernel = AttentionKernel.AUTO
    epipolar: EpipolarKernel = EpipolarKernel.AUTO


AUTO = Kernels()


@dataclasses.dataclass(frozen=True)
class ViewLayout:
    """Order of the rows of a batch: `examples views copies`, copies fastest (guidance takes two copies of a clip)."""

    views: int
    copies: int = 1

    def partner_rows(self, rows: Float[Array, "R ..."], partner: Int[Array, "V"]) -> Float[Array, "R ..."]:
        """For each row, the row of its view's partner in the same example and copy."""
        split = rows.reshape(-1, self.views, self.copies, *rows.shape[1:])
        return jnp.take(split, partner, axis=1).reshape(rows.shape)


class CrossViewAttention(nnx.Module):
    """Queries from a view's tokens, keys and values from its partner's; no positional encoding."""

    def __init__(self, features: int, *, heads: int, rngs: nnx.Rngs):
        self.head_width = features // heads

        def projection() -> Linear:
            return Linear(features, features, axes=(axes.EMBED, axes.HEADS), bias=False, rngs=rngs)

        self.query, self.key, self.value = projection(), projection(), projection()
        self.output = Linear(features, features, axes=(axes.HEADS, axes.EMBED), rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "R F L C"],
        views: ViewLayout,
        partner: Int[Array, "V"],
        band: Band | None,
        mode: SyncMode,
        kernels: Kernels,
        share_first_frame: bool = False,
    ) -> Float[Array, "R F L C"]:
        if mode is SyncMode.JOINT:
            return self._joint(tokens, views, kernels)
        frames = tokens.shape[1]
        partner_tokens = views.partner_rows(tokens, partner)
        query = self._heads(self.query, tokens)
        key, value = (self._heads(projection, partner_tokens) for projection in (self.key, self.value))
        if mode is SyncMode.EPIPOLAR and band is not None:
            flat = Band(
                rearrange(band.lines, "r f l x -> (r f) l x"),
                band.points,
                band.width.reshape(-1),
                band.slope.reshape(-1),
            )
            attended = epipolar_attention(query, key, value, flat, kernel=kernels.epipolar)
        else:
            attended = attention(query, key, value, kernel=kernels.attention)
        attended = rearrange(attended, "(r f) l n d -> r f l (n d)", f=frames)
        if share_first_frame:
            own = self.value(tokens[:, 0]).reshape(-1, views.views, views.copies, *tokens.shape[2:])
            mean = jnp.broadcast_to(jnp.mean(own, axis=1, keepdims=True), own.shape)
            attended = attended.at[:, 0].set(mean.reshape(attended[:, 0].shape))
        return self.output(attended)

    def _heads(self, projection: Linear, tokens: Float[Array, "R F L C"]) -> Float[Array, "B L N D"]:
        x = rearrange(projection(tokens), "r f l (n d) -> (r f) l n d", d=self.head_width)
        return constrain(x, axes.BATCH, None, axes.ACTIVATION_HEADS, None)

    def _joint(self, tokens: Float[Array, "R F L C"], views: ViewLayout, kernels: Kernels) -> jax.Array:
        """Every token attends to the same frame of all views."""
        pattern, sizes = "(b v c) f l x -> (b c f) (v l) x", {"v": views.views, "c": views.copies}
        x = rearrange(tokens, pattern, **sizes)
        query, key, value = (
            rearrange(projection(x), "b l (n d) -> b l n d", d=self.head_width)
            for projection in (self.query, self.key, self.value)
        )
        attended = rearrange(attention(query, key, value, kernel=kernels.attention), "b l n d -> b l (n d)")
        by_view = rearrange(attended, "(b c f) (v l) x -> (b v c) f l x", f=tokens.shape[1], **sizes)
        return self.output(by_view)


class SynchronizationBlock(nnx.Module):
    """Cross-view attention sublayers, then a feed-forward sublayer, each with a pre-norm and a residual connection."""

    def __init__(self, features: int, *, heads: int, sublayers: int, rngs: nnx.Rngs):
        self.norms = nnx.List([LayerNorm(features, epsilon=1e-5, axis=axes.EMBED) for _ in range(sublayers)])
        self.attentions = nnx.List([CrossViewAttention(features, heads=heads, rngs=rngs) for _ in range(sublayers)])
        self.feed_forward_norm = LayerNorm(features, epsilon=1e-5, axis=axes.EMBED)
        self.feed_forward = GatedFeedForward(
            features, 4 * features, activation=functools.partial(jax.nn.gelu, approximate=False), bias=True, rngs=rngs
        )


class CrossViewSynchronization(nnx.Module):
    """Group norm of each frame, projection, one transformer block across views, projection, residual connection.

    Args:
      features: channels per token.
      heads: of each attention.
      sublayers: attentions in the block: 2 as released, 1 in an ablation of the paper.
      groups: of the group norm.
    """

    def __init__(self, features: int, *, heads: int, sublayers: int = 2, groups: int = 32, rngs: nnx.Rngs):
        wide = (axes.EMBED, axes.EMBED)
        self.norm = GroupNorm(features, groups=groups, epsilon=1e-6, axis=axes.EMBED, leading=2)
        self.input = Linear(features, features, axes=wide, rngs=rngs)
        self.block = SynchronizationBlock(features, heads=heads, sublayers=sublayers, rngs=rngs)
        self.output = Linear(features, features, axes=wide, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "R F L C"],
        views: ViewLayout,
        partner: Int[Array, "V"],
        band: Band | Sequence[Band] | None = None,
        *,
        mode: SyncMode = SyncMode.EPIPOLAR,
        kernels: Kernels = AUTO,
        share_first_frame: bool = False,
    ) -> Float[Array, "R F L C"]:
        """Exchange information between views.

        Args:
          tokens: L tokens in each of F frames.
          views: order of the rows R.
          partner: index of the view that each view attends to; ignored with JOINT.
          band: which of the partner's tokens each token attends to, with EPIPOLAR: lines `R F L 3`, width and slope
            `R F`. One for all sublayers, or a sequence with one per sublayer.
          mode: see `SyncMode`.
          kernels: implementations of attention.
          share_first_frame: replace the attention output of the first frames by the mean of the views' own values, as
            a switch of the released code does.
        """
        block = self.block
        bands = [band] * len(block.attentions) if band is None or isinstance(band, Band) else list(band)
        x = self.input(self.norm(tokens))
        for norm, attend, its_band in zip(block.norms, block.attentions, bands, strict=True):
            x = x + attend(norm(x), views, partner, its_band, mode, kernels, share_first_frame)
        frames = x.shape[1]
        normed = rearrange(block.feed_forward_norm(x), "r f l c -> (r f) l c")
        x = x + rearrange(block.feed_forward(normed), "(r f) l c -> r f l c", f=frames)
        return (tokens.astype(jnp.float32) + self.output(x).astype(jnp.float32)).astype(tokens.dtype)
