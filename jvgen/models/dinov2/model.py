"""The vision transformer of DINOv2: pre-norm blocks with layer scales, learned positions that are interpolated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jvgen.models.dinov2.config import Dinov2Config
from jvgen.nn.attention import attention
from jvgen.nn.feed_forward import FeedForward, GatedFeedForward
from jvgen.nn.linear import Linear
from jvgen.nn.norm import LayerNorm
from jvgen.nn.stacked import LAYER_INPUT, Stacked
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain
from jvgen.precision import product_precision

TOKENS = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)
# Of the pixels of ImageNet, in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# The cubic that PyTorch interpolates with; JAX's has -0.5.
_CUBIC = -0.75


def prepared(images: Float[Array, "B H W 3"], size: tuple[int, int]) -> Float[Array, "B h w 3"]:
    """Images in [0, 1], resized and normalized as the published networks take them, float32.

    Args:
      size: height and width, multiples of the patch.
    """
    shape = (images.shape[0], *size, 3)
    resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic", antialias=True)
    return (jnp.clip(resized, 0.0, 1.0) - jnp.asarray(MEAN)) / jnp.asarray(STD)


class Dinov2Block(nnx.Module):
    """Norm, attention, scale, sum; norm, feed-forward, scale, sum."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.heads = config.heads
        width = config.width

        def projection() -> Linear:
            return Linear(width, width, axes=(axes.EMBED, axes.HEADS), rngs=rngs)

        def scale() -> nnx.Param:
            return nnx.Param(jnp.ones((width,), jnp.float32), logical_axes=(axes.EMBED,))

        self.attention_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        self.query, self.key, self.value = projection(), projection(), projection()
        self.output = Linear(width, width, axes=(axes.HEADS, axes.EMBED), rngs=rngs)
        self.attention_scale = scale()
        self.feed_forward_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)
        if config.gated:
            self.feed_forward = GatedFeedForward(width, config.hidden, activation=jax.nn.silu, bias=True, rngs=rngs)
        else:
            self.feed_forward = FeedForward(width, config.hidden, exact_gelu=True, rngs=rngs)
        self.feed_forward_scale = scale()

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        normed = self.attention_norm(x)
        heads = (
            rearrange(projection(normed), "b l (n d) -> b l n d", n=self.heads)
            for projection in (self.query, self.key, self.value)
        )
        update = self.output(rearrange(attention(*heads), "b l n d -> b l (n d)"))
        x = constrain(x + update * self.attention_scale[...].astype(x.dtype), *TOKENS)
        update = self.feed_forward(self.feed_forward_norm(x))
        return constrain(x + update * self.feed_forward_scale[...].astype(x.dtype), *TOKENS)


class Dinov2(nnx.Module):
    """Images to tokens: what transformers' `Dinov2Model` returns as `last_hidden_state`."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        width, init = config.width, nnx.initializers.normal(0.02)
        self.patches = Linear(3 * config.patch**2, width, axes=(None, axes.EMBED), rngs=rngs)
        self.class_token = nnx.Param(init(rngs.params(), (1, width), jnp.float32), logical_axes=(None, axes.EMBED))
        rows = 1 + config.positions**2
        self.positions = nnx.Param(init(rngs.params(), (rows, width), jnp.float32), logical_axes=(None, axes.EMBED))
        self.blocks = Stacked(lambda layer_rngs: Dinov2Block(config, rngs=layer_rngs), config.layers, rngs=rngs)
        self.final_norm = LayerNorm(width, epsilon=config.norm_epsilon, axis=axes.EMBED)

    def __call__(self, images: Float[Array, "B H W 3"], *, dtype: Any = jnp.float32) -> Float[Array, "B L C"]:
        """The token of the class, then those of the patches by rows, after the last norm.

        Args:
          images: as `prepared` makes them.
          dtype: of the computation.

        Raises:
          ValueError: sizes that the patch does not divide.
        """
        patch, (height, width) = self.config.patch, images.shape[1:3]
        if height % patch or width % patch:
            raise ValueError(f"images of {height}x{width}: must be multiples of patch = {patch}.")
        cells = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)
        tokens = self.patches(cells.astype(dtype))
        first = jnp.broadcast_to(self.class_token[...].astype(dtype), (len(tokens), 1, self.config.width))
        x = jnp.concatenate([first, tokens], axis=1) + self.position_rows(height // patch, width // patch).astype(dtype)

        def step(block: Dinov2Block, carry: jax.Array, _: Any) -> jax.Array:
            return block(checkpoint_name(carry, LAYER_INPUT))

        x = self.blocks.scan(step, constrain(x, *TOKENS), remat=self.config.remat, unroll=self.config.unroll)
        return self.final_norm(x)

    def position_rows(self, rows: int, columns: int) -> Float[Array, "L C"]:
        """Positions of the class token and of a grid of patches, float32, by PyTorch's bicubic interpolation."""
        table, side = self.positions[...].astype(jnp.float32), self.config.positions
        if (rows, columns) == (side, side):
            return table
        grid = rearrange(table[1:], "(h w) c -> h w c", h=side)
        weights = [jnp.asarray(bicubic_weights(side, size)) for size in (rows, columns)]
        grid = jnp.einsum("hi,wj,ijc->hwc", *weights, grid, precision=product_precision(grid.dtype))
        return jnp.concatenate([table[:1], rearrange(grid, "h w c -> (h w) c")])


def bicubic_weights(size: int, new_size: int) -> np.ndarray:
    """Bicubic interpolation along an axis as a matrix `new_size size`, as PyTorch's without antialiasing and aligned
    corners: cells beyond the border are those at the border."""
    places = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(places - first - offset)
        near = (_CUBIC + 2) * distance**3 - (_CUBIC + 3) * distance**2 + 1
        far = _CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        column = np.clip(first + offset, 0, size - 1)
        np.add.at(weights, (np.arange(new_size), column), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)
