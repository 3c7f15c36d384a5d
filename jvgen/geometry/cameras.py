"""Pinhole cameras: calibration matrices, rigid poses and relative poses, crops and resizes.

Conventions, here and in data sets: extrinsics are world-to-camera [R|t] with OpenCV axes (x right, y down, z forward).
Intrinsics are fx, fy, cx, cy divided by the width (x) and the height (y) of the image: 0 at the outer edge of its first
pixel, 1 at that of its last. So the center of pixel i is at i + 0.5, and resizing leaves them unchanged.

Functions return the kind of array they are given: numpy float64 for files and paths, JAX float32 under `jax.jit`, where
all matrix products run in full float32 precision on every device.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jvgen.precision import in_full_precision

AnyArray = jax.Array | np.ndarray
Size = tuple[int, int]
"""Height and width in pixels."""

# Relative distance below which two camera centers are equal within the precision of float32.
CENTER_TOLERANCE = 1e-5


class Cameras(NamedTuple):
    """Cameras along any leading axes.

    Attributes:
      intrinsics: `... 4`, normalized.
      extrinsics: `... 3 4`, world-to-camera.
    """

    intrinsics: Any
    extrinsics: Any


@in_full_precision
def calibration(intrinsics: Float[AnyArray, "*b 4"], size: Size) -> Float[AnyArray, "*b 3 3"]:
    """The matrix K from camera coordinates to homogeneous pixel coordinates of an image of `size`."""
    xp = intrinsics.__array_namespace__()
    height, width = size
    fx, fy, cx, cy = (intrinsics[..., i] * scale for i, scale in enumerate((width, height, width, height)))
    zero, one = xp.zeros_like(fx), xp.ones_like(fx)
    return xp.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], axis=-1).reshape(*fx.shape, 3, 3)


def inverse_calibration(matrix: Float[AnyArray, "*b 3 3"]) -> Float[AnyArray, "*b 3 3"]:
    """The inverse of a calibration matrix without skew, in closed form."""
    xp = matrix.__array_namespace__()
    fx, fy, cx, cy = matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 0, 2], matrix[..., 1, 2]
    zero, one = xp.zeros_like(fx), xp.ones_like(fx)
    return xp.stack([1 / fx, zero, -cx / fx, zero, 1 / fy, -cy / fy, zero, zero, one], axis=-1).reshape(matrix.shape)


@in_full_precision
def inverse(motion: Float[AnyArray, "*b 3 4"]) -> Float[AnyArray, "*b 3 4"]:
    """The inverse of a rigid motion: world-to-camera to camera-to-world, and back."""
    xp = motion.__array_namespace__()
    rotation = xp.swapaxes(motion[..., :3], -1, -2)
    return xp.concatenate([rotation, -rotation @ motion[..., 3:]], axis=-1)


@in_full_precision
def compose(after: Float[AnyArray, "*#b 3 4"], before: Float[AnyArray, "*#b 3 4"]) -> Float[AnyArray, "*b 3 4"]:
    """The rigid motion `x -> after(before(x))`; leading axes broadcast."""
    xp = after.__array_namespace__()
    rotation = after[..., :3] @ before[..., :3]
    return xp.concatenate([rotation, after[..., :3] @ before[..., 3:] + after[..., 3:]], axis=-1)


def between(source: Float[AnyArray, "*#b 3 4"], target: Float[AnyArray, "*#b 3 4"]) -> Float[AnyArray, "*b 3 4"]:
    """The rigid motion from source to target camera coordinates, from two world-to-camera extrinsics."""
    return compose(target, inverse(source))


def relative(
    extrinsics: Float[AnyArray, "*#b 3 4"], reference: Float[AnyArray, "*#b 3 4"]
) -> Float[AnyArray, "*b 3 4"]:
    """Extrinsics in the coordinates of the reference camera, whose own become [I|0]."""
    return compose(extrinsics, inverse(reference))


def centers(extrinsics: Float[AnyArray, "*b 3 4"]) -> Float[AnyArray, "*b 3"]:
    """Camera centers in world coordinates."""
    return inverse(extrinsics)[..., 3]


def share_a_center(
    source: Float[AnyArray, "*#b 3 4"],
    target: Float[AnyArray, "*#b 3 4"],
    tolerance: float = CENTER_TOLERANCE,
    extent: Any = 0.0,
) -> Any:
    """Whether two cameras have a common center, and so no epipolar geometry: bool `*b`.

    Args:
      source, target: world-to-camera.
      tolerance: largest distance between the centers, relative to their distance from the origin of the world.
      extent: what it is relative to where that is larger, `*#b`: the distance from the origin of the world that the
        cameras were given in, if they were moved to near that of this one. Rounding has its size.
    """
    xp = source.__array_namespace__()
    first, second = centers(source), centers(target)
    apart = _norm(first - second)
    return apart <= tolerance * xp.maximum(xp.maximum(_norm(first), _norm(second)), extent)


def resized_and_cropped(intrinsics: Float[AnyArray, "*b 4"], source: Size, size: Size) -> Float[AnyArray, "*b 4"]:
    """Intrinsics after an image of size `source` is scaled to cover `size` and center-cropped."""
    xp = intrinsics.__array_namespace__()
    scale = max(size[0] / source[0], size[1] / source[1])
    height, width = source[0] * scale / size[0], source[1] * scale / size[1]
    grow = xp.asarray([width, height, width, height], dtype=intrinsics.dtype)
    shift = xp.asarray([0.0, 0.0, (width - 1) / 2, (height - 1) / 2], dtype=intrinsics.dtype)
    return intrinsics * grow - shift


@in_full_precision
def project(points: Float[AnyArray, "*#b n 3"], cameras: Cameras, size: Size) -> Float[AnyArray, "*b n 3"]:
    """Pixel coordinates of world points in each camera's image, with their depth as the third coordinate.

    Args:
      points: `... n 3`.
      cameras: with the same leading axes.
      size: of the images.
    """
    xp = points.__array_namespace__()
    matrix = calibration(cameras.intrinsics, size)
    seen = points @ xp.swapaxes(cameras.extrinsics[..., :3], -1, -2) + cameras.extrinsics[..., None, :, 3]
    pixels = seen @ xp.swapaxes(matrix, -1, -2)
    return xp.concatenate([pixels[..., :2] / pixels[..., 2:], seen[..., 2:]], axis=-1)


def of_latent_frames(values: Any, compression: int, axis: int) -> Any:
    """One value per latent frame of a causal VAE: that of the first frame, then of the last of every `compression`.

    Latent frame 0 covers frame 0, latent frame k covers frames r(k - 1) + 1 .. rk, with r = `compression`.

    Raises:
      ValueError: a number of frames other than r n + 1.
    """
    frames = values.shape[axis]
    if (frames - 1) % compression:
        raise ValueError(
            f"{frames} frames: with {compression} frames per latent frame there must be {compression}n + 1."
        )
    index = [slice(None)] * values.ndim
    index[axis] = slice(None, None, compression)
    return values[tuple(index)]


def _norm(vectors: AnyArray) -> Any:
    xp = vectors.__array_namespace__()
    return xp.sqrt(xp.sum(vectors * vectors, axis=-1))
