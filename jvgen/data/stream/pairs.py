"""Pairs of views from single clips: a static clip folded at its middle frame, a dynamic clip and its warped copy."""

import dataclasses
from typing import NamedTuple

import cv2
import numpy as np

from jvgen.config import Config
from jvgen.geometry.homography import Motion, homographies, on_pixel_indices, ramp
from jvgen.value_rules import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class HomographyConfig(Config):
    """Standard deviations of the homography of a copy's last frame; the motion grows linearly up to it.

    The paper (arXiv 2405.17414) gives no values. Lengths are in image heights, so they do not depend on resolution.

    Attributes:
      translation: right and down, in image heights.
      rotation: in radians.
      scale: relative growth of width and height.
      shear: of x by y and of y by x.
      projection: change of depth over one image height.
      strength: factor on all of them; 0 disables the warp.
    """

    translation: Weight = 0.08
    rotation: Weight = 0.1
    scale: Weight = 0.1
    shear: Weight = 0.05
    projection: Weight = 0.1
    strength: Weight = 1.0

    def draw(self, seed: int, height: int) -> Motion:
        """One motion, float64, for images of `height` pixels: a pure function of the seed."""
        rng = np.random.default_rng(seed)

        def normal(std: float, *shape: int) -> np.ndarray:
            return self.strength * std * rng.standard_normal(shape)

        return Motion(
            translation=height * normal(self.translation, 2),
            rotation=normal(self.rotation),
            scale=normal(self.scale, 2),
            shear=normal(self.shear, 2),
            projection=normal(self.projection, 2) / height,
        )


class WarpedPair(NamedTuple):
    """A clip and its warped copy.

    Attributes:
      video: uint8 (2, F, H, W, 3).
      homographies: float32 (F, 3, 3), from pixels of the clip to pixels of the copy, relative to the image center.
      valid: bool (2, F, H, W): pixels with image content; all True for the clip itself.
    """

    video: np.ndarray
    homographies: np.ndarray
    valid: np.ndarray


def folded(values: np.ndarray) -> np.ndarray:
    """Two views of N frames of a still scene from one clip of 2N - 1 frames: `2N-1 ...` to `2 N ...`.

    The first runs backward in time from the middle frame and the second forward, so both start with the same frame
    (arXiv 2405.17414, section 4.2).

    Raises:
      ValueError: an even number of frames.
    """
    if len(values) % 2 == 0:
        raise ValueError(f"{len(values)} frames cannot be folded: use an odd number, 2N - 1 for two views of N.")
    middle = len(values) // 2
    return np.stack([values[middle::-1], values[middle:]])


def warped_pair(video: np.ndarray, config: HomographyConfig, seed: int) -> WarpedPair:
    """A clip and a copy warped by a homography that grows with every frame (arXiv 2405.17414, appendix A.2.1).

    Args:
      video: uint8 (F, H, W, 3).
      config: distribution of the motion.
      seed: seed of the motion.
    """
    frames, height, width = video.shape[:3]
    matrices = homographies(ramp(config.draw(seed, height), frames))
    copy, valid = np.empty_like(video), np.ones((2, frames, height, width), bool)
    white = np.full((height, width), 255, np.uint8)
    for number, matrix in enumerate(matrices):
        warp = on_pixel_indices(matrix, (height, width))
        copy[number] = cv2.warpPerspective(video[number], warp, (width, height), flags=cv2.INTER_LINEAR)
        # A pixel is valid if it is interpolated from pixels of the image only.
        valid[1, number] = cv2.warpPerspective(white, warp, (width, height), flags=cv2.INTER_LINEAR) == 255
    return WarpedPair(np.stack([video, copy]), matrices.astype(np.float32), valid)


def latent_valid(valid: np.ndarray, spatial: int, temporal: int) -> np.ndarray:
    """Latents whose pixels are all valid: bool `V F H W` to `V f h w`.

    Args:
      valid: masks of r n + 1 frames.
      spatial: pixels per latent along rows and columns.
      temporal: frames per latent frame, r; the first latent frame covers one frame.
    """
    views, frames, height, width = valid.shape
    cells = valid.reshape(views, frames, height // spatial, spatial, width // spatial, spatial).all(axis=(3, 5))
    later = cells[:, 1:].reshape(views, (frames - 1) // temporal, temporal, *cells.shape[2:]).all(axis=2)
    return np.concatenate([cells[:, :1], later], axis=1)
