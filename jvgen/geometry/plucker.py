"""Plücker coordinates of the rays through pixels (CameraCtrl, He et al. 2024, arXiv 2404.02101)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.geometry.cameras import Cameras, Size, calibration, inverse, inverse_calibration
from jvgen.geometry.epipolar import token_points
from jvgen.precision import in_full_precision


@in_full_precision
def rays(cameras: Cameras, size: Size, grid: Size | None = None) -> Float[Array, "*b h w 6"]:
    """Moment o x d and unit direction d of the ray through each cell's center, in world coordinates.

    Moments depend on the origin and the scale of the world; make the poses relative to one of the cameras first.

    Args:
      cameras: with any leading axes.
      size: height and width of the images in pixels.
      grid: rows and columns of cells; by default the pixels.
    """
    grid = size if grid is None else grid
    points = jnp.asarray(token_points(grid, size))
    in_camera = points @ jnp.swapaxes(inverse_calibration(calibration(cameras.intrinsics, size)), -1, -2)
    in_camera /= jnp.linalg.norm(in_camera, axis=-1, keepdims=True)
    to_world = inverse(cameras.extrinsics)
    direction = in_camera @ jnp.swapaxes(to_world[..., :3], -1, -2)
    moment = jnp.cross(to_world[..., None, :, 3], direction, axis=-1)
    return jnp.concatenate([moment, direction], axis=-1).reshape(*cameras.intrinsics.shape[:-1], *grid, 6)
