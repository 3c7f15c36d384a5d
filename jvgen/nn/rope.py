"""Rotary positions: of frames, rows and columns in adjacent pairs (CogVideoX); of a sequence in halves (Llama)."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int


class RotaryGrid(enum.Enum):
    """Positions of the rows and columns of a token grid, relative to the base grid of the network."""

    LINSPACE = "linspace"  # CogVideoX 1.0: resized to fit the base grid, and centered in it
    SLICE = "slice"  # CogVideoX 1.5: 0, 1, 2, ...


class Rotation(NamedTuple):
    """Cosine and sine of one angle per token and pair of channels, repeated for both channels: float32 `L D`."""

    cosine: Float[Array, "L D"]
    sine: Float[Array, "L D"]


def crop_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The region of the base grid that a (rows, columns) grid covers: resized to fit the base grid, and centered in it.

    Halves round to even, as in the published code.

    Returns:
      ((top, left), (bottom, right)), in cells of the base grid.
    """
    rows, columns = grid
    base_rows, base_columns = base
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, int(round(base_rows / rows * columns))
    else:
        height, width = int(round(base_columns / columns * rows)), base_columns
    top = int(round((base_rows - height) / 2.0))
    left = int(round((base_columns - width) / 2.0))
    return (top, left), (top + height, left + width)


def grid_coordinates(
    grid: tuple[int, int, int], kind: RotaryGrid, base: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of frames, rows and columns, float32, one array per axis.

    Args:
      grid: frames, rows and columns of tokens.
      kind: positions of rows and columns; those of frames are always 0, 1, 2, ...
      base: rows and columns of the base grid, which the network was trained with.

    Raises:
      ValueError: a SLICE grid larger than the base grid.
    """
    frames, rows, columns = grid
    times = np.arange(frames, dtype=np.float32)
    if kind is RotaryGrid.SLICE:
        if rows > base[0] or columns > base[1]:
            raise ValueError(
                f"a grid of {rows}x{columns} tokens does not fit the {base[0]}x{base[1]} positions of this network; "
                "increase sample_height and sample_width (in latent pixels) or use smaller clips."
            )
        return times, np.arange(rows, dtype=np.float32), np.arange(columns, dtype=np.float32)
    (top, left), (bottom, right) = crop_region((rows, columns), base)
    # As published, although stop * (n - 1) / n is not the last point of an even grid unless the region starts at zero.
    y = np.linspace(top, bottom * (rows - 1) / rows, rows, dtype=np.float32)
    x = np.linspace(left, right * (columns - 1) / columns, columns, dtype=np.float32)
    return times, y, x


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """Channels of a head for frames, rows and columns: a quarter, three eighths, three eighths.

    Raises:
      ValueError: a head width that does not divide into even parts.
    """
    if head_width % 16:
        raise ValueError(f"head_width = {head_width}: rotary positions need a multiple of 16.")
    return head_width // 4, head_width // 8 * 3, head_width // 8 * 3


def rotation(
    grid: tuple[int, int, int],
    *,
    head_width: int,
    kind: RotaryGrid,
    base: tuple[int, int],
    theta: float = 10000.0,
    before: int = 0,
    after: int = 0,
) -> Rotation:
    """Rotation of every token of a sequence `[before; frames x rows x columns; after]`.

    Tokens before and after the grid are not rotated. Angles are computed with numpy per axis and broadcast over the
    grid in the program, so that it has no constants as long as the sequence.

    Args:
      grid: frames, rows and columns of tokens.
      head_width: channels of one head, a multiple of 16.
      kind, base: see `grid_coordinates`.
      theta: base of the geometric series of frequencies.
      before, after: tokens (text, padding) on either side of the grid.
    """
    frames, rows, columns = grid
    parts: dict[str, list[jax.Array]] = {"cosine": [], "sine": []}
    spread = ("t d -> t 1 1 d", "h d -> 1 h 1 d", "w d -> 1 1 w d")
    coordinates = grid_coordinates(grid, kind, base)
    for positions, width, pattern in zip(coordinates, axis_widths(head_width), spread, strict=True):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.repeat(np.outer(positions.astype(np.float64), frequencies), 2, axis=1)
        for name, function in (("cosine", np.cos), ("sine", np.sin)):
            table = jnp.asarray(function(angles).astype(np.float32))
            parts[name].append(jnp.broadcast_to(rearrange(table, pattern), (frames, rows, columns, width)))
    tables = {
        name: rearrange(jnp.concatenate(values, axis=-1), "t h w d -> (t h w) d") for name, values in parts.items()
    }
    padding = ((before, after), (0, 0))
    return Rotation(
        cosine=jnp.pad(tables["cosine"], padding, constant_values=1.0), sine=jnp.pad(tables["sine"], padding)
    )


def rotate(x: Float[Array, "B L N D"], by: Rotation) -> Float[Array, "B L N D"]:
    """Rotate adjacent pairs of channels, (a, b) -> (a cos - b sin, b cos + a sin), in float32.

    Two shifts along the channels and a select, instead of an axis of size two, which is slow on TPUs and CPUs.
    """
    y = x.astype(jnp.float32)
    even = (jnp.arange(x.shape[-1]) % 2 == 0)[None, None, None, :]
    partner = jnp.where(even, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))
    return (y * by.cosine[None, :, None, :] + partner * by.sine[None, :, None, :]).astype(x.dtype)


def line_rotation(positions: Int[Array, "L"], *, head_width: int, theta: float = 10000.0) -> Rotation:
    """Rotation of tokens at integer positions of a sequence, for `rotate_halves`: channels i and i + D / 2 are a pair.

    Angles are products of positions and frequencies in float32, as in the training code of Llama.

    Raises:
      ValueError: an odd head width.
    """
    if head_width % 2:
        raise ValueError(f"head_width = {head_width}: must be even for rotary positions.")
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequencies = jnp.asarray((1.0 / np.float32(theta) ** exponents).astype(np.float32))
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rotation(cosine=jnp.cos(angles), sine=jnp.sin(angles))


def rotate_halves(x: Float[Array, "B L N D"], by: Rotation) -> Float[Array, "B L N D"]:
    """Rotate channel i with channel i + D / 2, (a, b) -> (a cos - b sin, b cos + a sin), in float32."""
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    partner = jnp.concatenate([-second, first], axis=-1)
    return (y * by.cosine[None, :, None, :] + partner * by.sine[None, :, None, :]).astype(x.dtype)
