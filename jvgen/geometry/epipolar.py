"""Epipolar geometry: fundamental matrices, epipolar lines, and the bias that makes a token attend along its line.

Points and lines are homogeneous, in pixels (x right, y down). A line (a, b, c) is the set a x + b y + c = 0.
The bias is never stored as a matrix: the product of a unit line and a point is their distance, so `Band` has three
numbers per query and three per key, and kernels compute the bias per tile (`jvgen.kernels.epipolar_attention`).

Sources: Kuang et al. 2024 (CVD), arXiv 2405.17414, section 4.1 and its released code; Hartley and Zisserman, chapter 9.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jvgen.geometry.cameras import (
    AnyArray,
    Cameras,
    Size,
    between,
    calibration,
    inverse_calibration,
    share_a_center,
)
from jvgen.precision import in_full_precision

# Bias per pixel beyond a hard band: weights underflow to zero without infinities.
HARD_SLOPE = 1e30
# Lines with a normal shorter than this share of the frame's longest are degenerate (a query at the epipole).
MIN_RELATIVE_NORMAL = 1e-6


class EpipolarBias(enum.Enum):
    """The attention bias as a function of a key's distance from the query's epipolar line."""

    SOFT = "soft"  # as released: 0 within a share of the frame's largest distance, a linear ramp beyond
    HARD = "hard"  # as in the paper: no attention beyond a number of pixels
    ABSOLUTE = "absolute"  # 0 within a number of pixels, a linear ramp beyond


class Band(NamedTuple):
    """The bias between queries and keys in factored form: bias = -slope max(0, |line . point| - width).

    Attributes:
      lines: `... L 3`, unit epipolar lines of the queries in the keys' image; zeros for queries without a bias.
      points: `K 3`, positions of the keys.
      width: `...`, half width of the band in pixels.
      slope: `...`, bias per pixel beyond it.
    """

    lines: Any
    points: Any
    width: Any
    slope: Any


# Matrices ------------------------------------------------------------------------------------------------------------


@in_full_precision
def fundamental_of(
    motion: Float[AnyArray, "*b 3 4"], source: Float[AnyArray, "*b 3 3"], target: Float[AnyArray, "*b 3 3"]
) -> Float[AnyArray, "*b 3 3"]:
    """F with x_target^T F x_source = 0 for the two images of one point; defined up to scale.

    Args:
      motion: from the source camera's coordinates to the target's.
      source, target: calibration matrices.
    """
    xp = motion.__array_namespace__()
    x, y, z = motion[..., 0, 3], motion[..., 1, 3], motion[..., 2, 3]
    zero = xp.zeros_like(x)
    # -[t]x, the sign of the released code; distances do not depend on it.
    crossed = xp.stack([zero, z, -y, -z, zero, x, y, -x, zero], axis=-1).reshape(*x.shape, 3, 3)
    essential = crossed @ motion[..., :3]
    return xp.swapaxes(inverse_calibration(target), -1, -2) @ essential @ inverse_calibration(source)


def fundamental_matrices(source: Cameras, target: Cameras, size: Size) -> Float[AnyArray, "*b 3 3"]:
    """F between pairs of cameras with images of `size`; zero for cameras with a common center, which have none."""
    xp = source.extrinsics.__array_namespace__()
    matrix = fundamental_of(
        between(source.extrinsics, target.extrinsics),
        calibration(source.intrinsics, size),
        calibration(target.intrinsics, size),
    )
    same = share_a_center(source.extrinsics, target.extrinsics)
    return xp.where(same[..., None, None], xp.zeros_like(matrix), matrix)


@in_full_precision
def infinite_homographies(source: Cameras, target: Cameras, size: Size) -> Float[AnyArray, "*b 3 3"]:
    """Homographies from source to target pixels for cameras that differ by a rotation (or a zoom) only."""
    rotation = between(source.extrinsics, target.extrinsics)[..., :3]
    return calibration(target.intrinsics, size) @ rotation @ inverse_calibration(calibration(source.intrinsics, size))


# Points and lines ----------------------------------------------------------------------------------------------------


def token_points(grid: Size, size: Size, *, integer_centers: bool = False) -> np.ndarray:
    """Centers of the cells of a grid over an image, row by row: float32 (rows x columns, 3), homogeneous.

    Args:
      grid: rows and columns.
      size: of the image.
      integer_centers: put the center of pixel i at i, as the attention of the released code does; its rays have it at
        i + 0.5, as everything here.
    """
    y, x = (
        (np.arange(n) + 0.5) * (side / n) - (0.5 if integer_centers else 0.0)
        for n, side in zip(grid, size, strict=True)
    )
    points = np.stack([*np.meshgrid(x, y), np.ones(grid)], axis=-1)
    return points.reshape(-1, 3).astype(np.float32)


@in_full_precision
def epipolar_lines(fundamental: Float[Array, "*b 3 3"], points: Float[AnyArray, "n 3"]) -> Float[Array, "*b n 3"]:
    """The line F x of each point."""
    return points @ jnp.swapaxes(fundamental, -1, -2)


def random_normals(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*b 2"]:
    """Unit normals of `shape` lines with uniformly distributed directions, for `pseudo_lines`."""
    angles = jnp.pi * jax.random.uniform(key, shape, jnp.float32)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def pseudo_lines(points: Float[Array, "*b n 3"], normals: Float[Array, "*b 2"]) -> Float[Array, "*b n 3"]:
    """Parallel lines through corresponding points that a homography, not F, determines; one direction per frame.

    Args:
      points: in the keys' image; points with a third coordinate of 0 do not exist there and get a zero line.
      normals: unit normal of each frame; (0, 1) makes its lines horizontal.
    """
    a, b = normals[..., 0, None], normals[..., 1, None]
    x, y, there = points[..., 0], points[..., 1], (points[..., 2] != 0).astype(jnp.float32)
    return jnp.stack(jnp.broadcast_arrays(a * there, b * there, -(a * x + b * y)), axis=-1)


def unit_lines(lines: Float[Array, "*b n 3"], *, epsilon: float | None = None) -> Float[Array, "*b n 3"]:
    """Lines scaled so that line . point is the signed distance in pixels; degenerate lines become zero.

    Args:
      lines: of any scale: multiples of F give equal results.
      epsilon: added to the length of the normals, as released (1e-6). It is not small for the lines of near cameras,
        so that the unit of length changes the bias; by default a line is degenerate relative to the others of its
        frame.
    """
    normal = jnp.sqrt(jnp.sum(jnp.square(lines[..., :2]), axis=-1, keepdims=True))
    if epsilon is not None:
        return lines / (normal + epsilon)
    valid = normal > MIN_RELATIVE_NORMAL * jnp.max(normal, axis=-2, keepdims=True)
    return jnp.where(valid, lines / jnp.where(valid, normal, 1.0), 0.0)


def distances(lines: Float[Array, "*b n 3"], points: Float[AnyArray, "k 3"]) -> Float[Array, "*b n k"]:
    """Distances in pixels of points from unit lines: elementwise float32, not rounded by a matrix unit."""
    a, b, c = (lines[..., i, None] for i in range(3))
    return jnp.abs(a * points[:, 0] + b * points[:, 1] + c * points[:, 2])


def corners(points: Float[AnyArray, "k 3"]) -> Float[AnyArray, "4 3"]:
    """The corners of a grid of points, where the distance from any line is largest."""
    x, y = points[:, 0], points[:, 1]
    ends = [(x.min(), y.min()), (x.max(), y.min()), (x.min(), y.max()), (x.max(), y.max())]
    return np.array([(x, y, 1.0) for x, y in ends], np.float32)


def outside_grid(lines: Float[Array, "*b n 3"], points: Float[AnyArray, "k 3"], width: Any) -> Bool[Array, "*b n"]:
    """Whether a line is farther than `width` pixels from the whole grid of points."""
    a, b, c = (lines[..., i, None] for i in range(3))
    ends = corners(points)
    signed = a * ends[:, 0] + b * ends[:, 1] + c
    one_side = jnp.all(signed > 0, axis=-1) | jnp.all(signed < 0, axis=-1)
    return one_side & (jnp.min(jnp.abs(signed), axis=-1) > width)


# The bias ------------------------------------------------------------------------------------------------------------


def band(
    lines: Float[Array, "*b n 3"],
    grid: Size,
    size: Size,
    *,
    form: EpipolarBias = EpipolarBias.SOFT,
    width: float = 3.0,
    decay: float = 3.0,
    integer_centers: bool = False,
) -> Band:
    """The band of keys around the queries' lines.

    A band of half a token's diagonal contains a key wherever the line crosses the grid, so HARD and ABSOLUTE bands are
    at least that wide. With HARD, a query whose line is outside the grid has no bias.

    Args:
      lines: `unit_lines` of the queries, in pixels of the keys' image.
      grid: rows and columns of the keys.
      size: height and width of the image.
      form: see `EpipolarBias`.
      width: half width in pixels; with SOFT multiplied by (largest distance of the frame) / (half the shorter side).
      decay: magnitude of the bias at twice the width (SOFT, ABSOLUTE).
      integer_centers: see `token_points`.
    """
    points = token_points(grid, size, integer_centers=integer_centers)
    if form is EpipolarBias.SOFT:
        largest = jnp.max(distances(lines, corners(points)), axis=(-2, -1))
        wide = width / (min(size) // 2) * largest
        return Band(lines, points, wide, decay / (wide + 1e-6))
    half_diagonal = 0.5 * float(np.hypot(size[0] / grid[0], size[1] / grid[1]))
    wide = max(width, half_diagonal)
    if form is EpipolarBias.HARD:
        lines = jnp.where(outside_grid(lines, points, wide)[..., None], 0.0, lines)
    slope = HARD_SLOPE if form is EpipolarBias.HARD else decay / wide
    return Band(lines, points, *(jnp.full(lines.shape[:-2], value, jnp.float32) for value in (wide, slope)))


def epipolar_bias(band: Band) -> Float[Array, "*b n k"]:
    """The bias as a matrix, float32, for small grids and as a reference."""
    beyond = distances(band.lines, band.points) - band.width[..., None, None]
    return -band.slope[..., None, None] * jnp.maximum(beyond, 0.0)
