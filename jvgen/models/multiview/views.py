"""From cameras, or homographies, to what the network takes: bands of tokens along lines, and ray patches.

One camera stands for a latent frame: that of the first frame, then of the last of each group that a causal VAE merges.
Rays are told of every frame.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from jvgen.geometry import plucker
from jvgen.geometry.cameras import Cameras, Size, in_full_precision, of_latent_frames, share_a_center
from jvgen.geometry.epipolar import (
    Band,
    band,
    epipolar_lines,
    fundamental_matrices,
    infinite_homographies,
    pseudo_lines,
    random_normals,
    token_points,
    unit_lines,
)
from jvgen.geometry.homography import moved
from jvgen.models.multiview.config import SyncConfig
from jvgen.models.multiview.sync import ViewLayout


@dataclasses.dataclass(frozen=True)
class Views:
    """What the network is told of the views in a batch.

    Attributes:
      layout: what the rows are.
      partner: int32 `V`, the view that each view looks at.
      band: for rows `examples views` (without copies); None where views look at everything.
      rays: `R F h w X` for rows without copies; None for clips without cameras.
    """

    layout: ViewLayout
    partner: Int[Array, "V"]
    band: Band | None = None
    rays: Float[Array, "R F h w X"] | None = None

    def for_rows(self, rows: int) -> "Views":
        """Band and rays repeated for the copies of each clip, if there are copies.

        Raises:
          ValueError: rows that are not examples x views x copies.
        """
        if rows % (self.layout.views * self.layout.copies):
            raise ValueError(
                f"{rows} clips are not examples of {self.layout.views} views, {self.layout.copies} times; give a "
                "multiple."
            )
        if self.layout.copies == 1:
            return self

        def copied(array: jax.Array) -> jax.Array:
            return jnp.repeat(array, self.layout.copies, axis=0)

        its_band = self.band
        if its_band is not None:
            its_band = Band(copied(its_band.lines), its_band.points, copied(its_band.width), copied(its_band.slope))
        return dataclasses.replace(self, band=its_band, rays=None if self.rays is None else copied(self.rays))


def camera_band(
    cameras: Cameras,
    partner: Int[Array, "V"],
    config: SyncConfig,
    normals: Float[Array, "B V F 2"],
    *,
    grid: Size,
    size: Size,
) -> Band:
    """The band of each token around its epipolar line in the partner's frame, for rows `(B V)`.

    Args:
      cameras: intrinsics `B V F 4` and extrinsics `B V F 3 4`, F those of the tokens (see `token_cameras`).
      partner: the view that each view looks at.
      config: form and width of the band.
      normals: directions of lines where two cameras share their place (see `draw_normals`).
      grid: rows and columns of a frame's tokens.
      size: height and width in pixels.
    """
    other = Cameras(*(jnp.take(part, partner, axis=1) for part in cameras))
    points = jnp.asarray(token_points(grid, size))
    lines = epipolar_lines(fundamental_matrices(cameras, other, size), points)
    same = share_a_center(cameras.extrinsics, other.extrinsics)[..., None, None]
    if config.without_baseline == "open":
        return _band(jnp.where(same, 0.0, lines), config, grid, size)
    there = _seen_through(infinite_homographies(cameras, other, size), points)
    return _band(jnp.where(same, pseudo_lines(there, normals), lines), config, grid, size)


def homography_band(
    homographies: Float[Array, "B F 3 3"],
    config: SyncConfig,
    normals: Float[Array, "B 2 F 2"],
    *,
    grid: Size,
    size: Size,
) -> Band:
    """The bands between a clip and its warped copy, for rows `(B 2)`: lines of random directions through moved points.

    Args:
      homographies: from the clip to the copy, on pixels relative to the middle; one for each frame of tokens.
      config, normals, grid, size: see `camera_band`.
    """
    both = jnp.stack([homographies, jnp.linalg.inv(homographies)], axis=1)
    there = moved(both, jnp.asarray(token_points(grid, size)), size)
    lines = jnp.zeros_like(there) if config.without_baseline == "open" else pseudo_lines(there, normals)
    return _band(lines, config, grid, size)


def draw_normals(keys: Key[Array, "B"], views: int, frames: int) -> Float[Array, "B V F 2"]:
    """Directions of pseudo-lines, drawn for each example by its own key."""
    return jax.vmap(lambda key: random_normals(key, (views, frames)))(keys)


def token_cameras(cameras: Cameras, compression: int, temporal_patch: int = 1) -> Cameras:
    """The camera of each frame of tokens, `... F 4` and `... F 3 4`: the last one of the frames that it holds.

    Args:
      cameras: `... r n + 1` frames.
      compression: frames a latent frame of a causal VAE.
      temporal_patch: latent frames a patch.
    """
    axis = cameras.intrinsics.ndim - 2
    kept = (of_latent_frames(part, compression, axis) for part in cameras)
    return Cameras(*(part[(slice(None),) * axis + (slice(temporal_patch - 1, None, temporal_patch),)] for part in kept))


def ray_patches(cameras: Cameras, compression: int, *, grid: Size, size: Size) -> Float[Array, "R F h w X"]:
    """Plücker coordinates at each latent's centre, those of the frames that it holds side by side: 6 x compression.

    The first latent frame holds one frame, whose rays are repeated. Rows are `(B V)`.

    Args:
      cameras: intrinsics `B V F 4`, extrinsics `B V F 3 4`, all frames of the clip.
      compression: frames a latent frame.
      grid: rows and columns of latents.
      size: height and width in pixels.
    """
    rays = rearrange(plucker.rays(cameras, size, grid), "b v f h w x -> (b v) f h w x")
    first = jnp.repeat(rays[:, :1], compression - 1, axis=1)
    return rearrange(jnp.concatenate([first, rays], axis=1), "r (f t) h w x -> r f h w (t x)", t=compression)


def _band(lines: jax.Array, config: SyncConfig, grid: Size, size: Size) -> Band:
    made = band(unit_lines(lines), grid, size, form=config.bias, width=config.band, decay=config.decay)
    flat = (rearrange(part, "b v f ... -> (b v) f ...") for part in (made.lines, made.width, made.slope))
    lines, width, slope = flat
    return Band(lines, made.points, width, slope)


@in_full_precision
def _seen_through(matrices: Float[Array, "*b 3 3"], points: Float[Array, "n 3"]) -> Float[Array, "*b n 3"]:
    """Points moved by homographies of pixels; zeros for those that end up behind the camera."""
    taken = points @ jnp.swapaxes(matrices, -1, -2)
    ahead = taken[..., 2:] > 1e-6
    return jnp.where(ahead, taken / jnp.where(ahead, taken[..., 2:], 1.0), 0.0)
