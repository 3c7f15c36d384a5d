"""Embeddings: sinusoids of timesteps and grid positions, patches of video to and from tokens, lookup tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from jvgen.nn.linear import Initializer, Linear
from jvgen.parallel import axes
from jvgen.parallel.axes import Axes


def sinusoidal_timesteps(timesteps: Float[Array, "B"], width: int) -> Float[Array, "B {width}"]:
    """Sinusoids of raw timesteps (0..999), cosines first, float32; frequencies 10000^(-i / (width / 2)).

    Raises:
      ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"width = {width}: must be even, with half sines and half cosines.")
    half = width // 2
    # In numpy, with exponents rounded to float32 as in the published code: at timestep 999 the last bit is visible.
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Sinusoids of a timestep through Linear, SiLU, Linear: `B -> B features`, float32.

    Args:
      width: of the sinusoids.
      features: of the two linear layers.
      width_axis: logical name of the sinusoids' width.
    """

    def __init__(self, width: int, features: int, *, width_axis: str | None = axes.EMBED, rngs: nnx.Rngs):
        self.width = width
        self.hidden = Linear(width, features, axes=(width_axis, axes.CONDITION), rngs=rngs)
        self.output = Linear(features, features, axes=(axes.CONDITION, None), rngs=rngs)

    def __call__(self, timesteps: Float[Array, "B"]) -> Float[Array, "B C"]:
        return self.output(jax.nn.silu(self.hidden(sinusoidal_timesteps(timesteps, self.width))))


def sincos_axis(positions: np.ndarray, width: int) -> np.ndarray:
    """Sines, then cosines, of positions along one axis: float32 `n width`, computed in float64 with numpy."""
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_positions(
    grid: tuple[int, int, int],
    width: int,
    *,
    spatial_scale: float = 1.0,
    column_scale: float | None = None,
    temporal_scale: float = 1.0,
) -> Float[Array, "L {width}"]:
    """Additive sin-cos positions of a grid of frames, rows and columns, in that order of tokens, float32.

    A quarter of the channels encodes time, then three eighths each the column and the row (column first, as in
    CogVideoX). Each axis has a numpy table of its own, broadcast over the grid inside the program.

    Args:
      grid: frames, rows and columns of tokens.
      width: channels, a multiple of 16.
      spatial_scale, temporal_scale: positions in space and time are divided by these.
      column_scale: the divisor of the columns, if it is not that of the rows.

    Raises:
      ValueError: a width that is not a multiple of 16.
    """
    if width % 16:
        raise ValueError(f"width = {width}: sin-cos positions need a multiple of 16.")
    frames, rows, columns = grid
    tables = (
        ("t d -> t 1 1 d", frames, temporal_scale, width // 4),
        ("w d -> 1 1 w d", columns, spatial_scale if column_scale is None else column_scale, 3 * width // 8),
        ("h d -> 1 h 1 d", rows, spatial_scale, 3 * width // 8),
    )
    parts = []
    for pattern, count, scale, channels in tables:
        # The division is in float32, as in the published training code.
        positions = np.arange(count, dtype=np.float32) / np.float32(scale)
        table = rearrange(jnp.asarray(sincos_axis(positions, channels)), pattern)
        parts.append(jnp.broadcast_to(table, (frames, rows, columns, channels)))
    return rearrange(jnp.concatenate(parts, axis=-1), "t h w d -> (t h w) d")


def token_grid(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens for a clip of (frames, height, width) and patches in the same order.

    Raises:
      ValueError: a size that is not a multiple of the patch.
    """
    for name, size, part in zip(("frames", "height", "width"), shape, patch, strict=True):
        if size < 1 or size % part:
            raise ValueError(f"latent {name} = {size} is not a multiple of the patch of {part}; choose a multiple.")
    return shape[0] // patch[0], shape[1] // patch[1], shape[2] // patch[2]


class PatchEmbedding(nnx.Module):
    """Cut a clip into patches and project each to a token: `B F H W C -> B L features`.

    Tokens are ordered by frame, row, column. A row of the kernel belongs to one (frame, row, column, channel) of a
    patch, with the channel fastest: the order of a patch's values in memory.

    Args:
      channels: of the clip.
      features: of a token.
      patch: frames, rows and columns of a patch.
      kernel_init: initializer of the `(pixels x channels, features)` kernel.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        patch: tuple[int, int, int],
        kernel_init: Initializer = nnx.initializers.xavier_uniform(),
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        self.projection = Linear(
            math.prod(patch) * channels, features, axes=(None, axes.EMBED), kernel_init=kernel_init, rngs=rngs
        )

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B L D"]:
        frames, rows, columns = self.patch
        token_grid((clip.shape[1], clip.shape[2], clip.shape[3]), self.patch)
        patches = rearrange(clip, "b (f t) (h r) (w c) x -> b (f h w) (t r c x)", t=frames, r=rows, c=columns)
        return self.projection(patches)


def unpatchify(
    tokens: Float[Array, "B L P"], grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> Float[Array, "B F H W C"]:
    """Arrange tokens of `patch` pixels into a clip; the inverse of the patches of `PatchEmbedding`."""
    return rearrange(
        tokens,
        "b (f h w) (t r c x) -> b (f t) (h r) (w c) x",
        f=grid[0],
        h=grid[1],
        w=grid[2],
        t=patch[0],
        r=patch[1],
        c=patch[2],
    )


class Embedding(nnx.Module):
    """A table of vectors, looked up by index: int32 `B L` to float32 `B L features`."""

    def __init__(
        self,
        count: int,
        features: int,
        *,
        axes: Axes,
        init: Initializer = nnx.initializers.normal(0.02),
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(init(rngs.params(), (count, features), jnp.float32), logical_axes=tuple(axes))

    def __call__(self, indices: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        return jnp.take(self.table[...], indices, axis=0, mode="clip")
