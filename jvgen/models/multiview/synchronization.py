"""The cross-view synchronization module of CVD (Kuang et al. 2024, arXiv 2405.17414, section 4.1).

Frame k of one video attends to frame k of its partner, not to its own tokens. The module is independent of the network
it is inserted into; its last layer is initialized to zero, so that it is the identity at first.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
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

    def __init__(self, features: int, *, heads: int, rescale: float = 1.0, rngs: nnx.Rngs):
        self.head_width, self.rescale = features // heads, rescale

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
        return self._projected(attended)

    def _projected(self, attended: Float[Array, "*b C"]) -> Float[Array, "*b C"]:
        update = self.output(attended)
        return update if self.rescale == 1 else update / self.rescale

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
        return self._projected(by_view)


class SynchronizationBlock(nnx.Module):
    """Cross-view attention sublayers, then a feed-forward sublayer, each with a pre-norm and a residual connection."""

    def __init__(self, features: int, *, heads: int, sublayers: int, rescale: float = 1.0, rngs: nnx.Rngs):
        self.norms = nnx.List([LayerNorm(features, epsilon=1e-5, axis=axes.EMBED) for _ in range(sublayers)])
        self.attentions = nnx.List(
            [CrossViewAttention(features, heads=heads, rescale=rescale, rngs=rngs) for _ in range(sublayers)]
        )
        self.feed_forward_norm = LayerNorm(features, epsilon=1e-5, axis=axes.EMBED)
        self.feed_forward = GatedFeedForward(
            features, 4 * features, activation=functools.partial(jax.nn.gelu, approximate=False), bias=True, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "R F L C"], attend: Callable[[CrossViewAttention, jax.Array, Band | None], jax.Array],
        bands: Sequence[Band | None],
    ) -> Float[Array, "R F L C"]:  # fmt: skip
        for norm, layer, band in zip(self.norms, self.attentions, bands, strict=True):
            x = x + attend(layer, norm(x), band)
        frames = x.shape[1]
        normed = rearrange(self.feed_forward_norm(x), "r f l c -> (r f) l c")
        return x + rearrange(self.feed_forward(normed), "(r f) l c -> r f l c", f=frames)


class CrossViewSynchronization(nnx.Module):
    """Group norm of each frame, projection, transformer blocks across views, projection, residual connection.

    The first block is `block`, those after it are in the list `deeper`.

    Args:
      features: channels per token.
      heads: of each attention.
      sublayers: attentions in a block: 2 as released, 1 in an ablation of the paper.
      depth: blocks: 1 as released.
      groups: of the group norm.
      rescale: what the output of each attention is divided by: 1 as released.
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        sublayers: int = 2,
        depth: int = 1,
        groups: int = 32,
        rescale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        wide = (axes.EMBED, axes.EMBED)

        def block() -> SynchronizationBlock:
            return SynchronizationBlock(features, heads=heads, sublayers=sublayers, rescale=rescale, rngs=rngs)

        self.norm = GroupNorm(features, groups=groups, epsilon=1e-6, axis=axes.EMBED, leading=2, rounded=False)
        self.input = Linear(features, features, axes=wide, rngs=rngs)
        self.block = block()
        self.deeper = nnx.List([block() for _ in range(depth - 1)])
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
            `R F`. One for all attentions, or a sequence with one per attention, block by block.
          mode: see `SyncMode`.
          kernels: implementations of attention.
          share_first_frame: replace the attention output of the first frames by the mean of the views' own values, as
            a switch of the released code does.

        Raises:
          ValueError: a sequence of bands without exactly one per attention.
        """
        blocks = [self.block, *self.deeper]
        sublayers = len(self.block.attentions)
        one_for_all = band is None or isinstance(band, Band)
        bands = [band] * (len(blocks) * sublayers) if one_for_all else list(band)

        def attend(layer: CrossViewAttention, x: jax.Array, band: Band | None) -> jax.Array:
            return layer(x, views, partner, band, mode, kernels, share_first_frame)

        x = self.input(self.norm(tokens))
        if len(bands) != len(blocks) * sublayers:
            raise ValueError(f"band has {len(bands)} entries for {len(blocks)} blocks of {sublayers} attentions each.")
        for index, block in enumerate(blocks):
            x = block(x, attend, bands[index * sublayers :][:sublayers])
        return (tokens.astype(jnp.float32) + self.output(x).astype(jnp.float32)).astype(tokens.dtype)
