"""Homographies that imitate the motion of a camera, with seven components that grow over a clip.

A homography acts on pixels relative to the image center: H = translation rotation scale shear projection
(arXiv 2405.17414, appendix A.2.1). Functions return the kind of array they are given, numpy or JAX.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jvgen.geometry.cameras import AnyArray, Size
from jvgen.precision import in_full_precision


class Motion(NamedTuple):
    """The components of a homography, along any leading axes.

    Attributes:
      translation: `... 2`, pixels to the right and down.
      rotation: `...`, radians, clockwise as seen.
      scale: `... 2`, relative growth of width and height: 0.1 is 10%.
      shear: `... 2`, x by y, then y by x.
      projection: `... 2`, one over pixels.
    """

    translation: Any
    rotation: Any
    scale: Any
    shear: Any
    projection: Any


@in_full_precision
def homographies(motion: Motion) -> Float[AnyArray, "*b 3 3"]:
    """The matrices, `... 3 3`."""
    xp = motion.rotation.__array_namespace__()
    zero, one = xp.zeros_like(motion.rotation), xp.ones_like(motion.rotation)
    cosine, sine = xp.cos(motion.rotation), xp.sin(motion.rotation)

    def matrix(*entries: Any) -> AnyArray:
        return xp.stack(entries, axis=-1).reshape(*zero.shape, 3, 3)

    x, y = motion.translation[..., 0], motion.translation[..., 1]
    translate = matrix(one, zero, x, zero, one, y, zero, zero, one)
    rotate = matrix(cosine, -sine, zero, sine, cosine, zero, zero, zero, one)
    scale = matrix(1 + motion.scale[..., 0], zero, zero, zero, 1 + motion.scale[..., 1], zero, zero, zero, one)
    shear = matrix(one, motion.shear[..., 0], zero, motion.shear[..., 1], one, zero, zero, zero, one)
    project = matrix(one, zero, zero, zero, one, zero, motion.projection[..., 0], motion.projection[..., 1], one)
    return translate @ rotate @ scale @ shear @ project


def ramp(last: Motion, frames: int) -> Motion:
    """A motion per frame of a clip, from none to `last`: its components grow linearly, not its matrices."""
    xp = last.rotation.__array_namespace__()
    share = xp.asarray(np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1), dtype=last.rotation.dtype)
    return Motion(*(share.reshape(-1, *[1] * value.ndim) * value for value in last))


@in_full_precision
def map_points(
    matrices: Float[AnyArray, "*b 3 3"], points: Float[AnyArray, "n 3"], size: Size, *,
    integer_centers: bool = False, epsilon: float | None = None,
) -> Float[AnyArray, "*b n 3"]:  # fmt: skip
    """Images of points under homographies, in pixels.

    Args:
      matrices: acting on pixels relative to the image center.
      points: homogeneous, with a third coordinate of 1.
      size: of the image.
      integer_centers: see `jvgen.geometry.epipolar.token_points`.
      epsilon: added to the divisor, as released (1e-6). By default points at or behind the horizon have no image.

    Returns:
      x, y, 1; or zeros for points without an image.
    """
    xp = matrices.__array_namespace__()
    half = 0.5 if integer_centers else 0.0
    center = xp.asarray([size[1] / 2 - half, size[0] / 2 - half, 0.0], dtype=matrices.dtype)
    mapped = (points - center) @ xp.swapaxes(matrices, -1, -2)
    divisor = mapped[..., 2:]
    if epsilon is not None:
        return mapped / (divisor + epsilon) + center
    in_front = divisor > 1e-6
    return xp.where(in_front, mapped / xp.where(in_front, divisor, 1.0) + center, 0.0)


def on_pixel_indices(matrix: np.ndarray, size: Size) -> np.ndarray:
    """The homography (3, 3) in OpenCV's coordinates, with the center of pixel 0 at 0."""
    shift = np.eye(3)
    shift[:2, 2] = (size[1] - 1) / 2, (size[0] - 1) / 2
    return shift @ matrix @ np.linalg.inv(shift)
