"""View conditioning: from cameras or homographies to epipolar bands of tokens and patches of ray maps.

A latent frame has one camera: that of the first frame, then that of the last frame of each group that a causal VAE
merges. Ray maps cover every frame.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from jvgen.geometry import plucker
from jvgen.geometry.cameras import Cameras, Size, centers, of_latent_frames, relative, share_a_center
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
from jvgen.geometry.homography import map_points
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.models.multiview.synchronization import SyncMode, ViewLayout
from jvgen.nn.embeddings import token_grid
from jvgen.precision import in_full_precision


@dataclasses.dataclass(frozen=True)
class ViewConditioning:
    """What a `MultiViewDiT` is conditioned on besides text and timesteps.

    Attributes:
      layout: order of the rows.
      partner: int32 `V`, the view that each view attends to.
      band: for rows `examples views` (without copies); None where views attend to whole frames.
      rays: `R F h w X` for rows without copies; None for clips without cameras.
    """

    layout: ViewLayout
    partner: Int[Array, "V"]
    band: Band | None = None
    rays: Float[Array, "R F h w X"] | None = None

    def for_rows(self, rows: int) -> "ViewConditioning":
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


# Conditioning of a batch ---------------------------------------------------------------------------------------------


def camera_conditioning(
    config: MultiViewDiTConfig,
    cameras: Cameras,
    partner: Int[Array, "V"],
    keys: Key[Array, "B"],
    latents: tuple[int, ...],
    *,
    frames_per_latent: int,
    pixels_per_latent: int,
    copies: int = 1,
) -> ViewConditioning:
    """Bands and rays of views with cameras.

    Args:
      config: of the network; rays, and bands with mode EPIPOLAR, are made if it has them.
      cameras: intrinsics `B V F 4` and extrinsics `B V F 3 4` of every frame, in any world.
      partner: the view that each view attends to.
      keys: one per example, for directions of lines between cameras with a common center.
      latents: shape `R F H W C` of the latents.
      frames_per_latent, pixels_per_latent: temporal and spatial compression of the VAE.
      copies: see `ViewLayout`.
    """
    extrinsics = cameras.extrinsics.astype(jnp.float32)
    cameras = Cameras(cameras.intrinsics.astype(jnp.float32), relative(extrinsics, extrinsics[:, :1, :1]))
    frames, *grid = token_grid(latents[1:4], config.patch_shape)
    size, views = _in_pixels(latents, pixels_per_latent), cameras.intrinsics.shape[1]
    bands, rays = None, None
    if config.sync is not None and config.sync.mode is SyncMode.EPIPOLAR:
        moved, given = (
            token_cameras(Cameras(cameras.intrinsics, world), frames_per_latent, config.temporal_patch or 1)
            for world in (cameras.extrinsics, extrinsics)
        )
        bands = camera_band(
            moved, partner, config.sync, draw_normals(keys, views, frames), grid=tuple(grid), size=size,
            extent=jnp.linalg.norm(centers(given.extrinsics), axis=-1),
        )  # fmt: skip
    if config.rays:
        rays = ray_patches(cameras, frames_per_latent, grid=latents[2:4], size=size)
    return ViewConditioning(ViewLayout(views, copies), partner.astype(jnp.int32), bands, rays)


def homography_conditioning(
    config: MultiViewDiTConfig,
    homographies: Float[Array, "B F 3 3"],
    keys: Key[Array, "B"],
    latents: tuple[int, ...],
    *,
    pixels_per_latent: int,
) -> ViewConditioning:
    """Bands between clips and their warped copies, which have no cameras and so no rays.

    Args:
      config: of the network.
      homographies: from a clip to its copy, one per latent frame; see `homography_band`.
      keys, latents, pixels_per_latent: see `camera_conditioning`.
    """
    layout, partner = ViewLayout(2), jnp.asarray([1, 0])
    if config.sync is None or config.sync.mode is not SyncMode.EPIPOLAR:
        return ViewConditioning(layout, partner)
    frames, *grid = token_grid(latents[1:4], config.patch_shape)
    step = config.temporal_patch or 1
    bands = homography_band(
        homographies[:, step - 1 :: step],
        config.sync,
        draw_normals(keys, 2, frames),
        grid=tuple(grid),
        size=_in_pixels(latents, pixels_per_latent),
    )
    return ViewConditioning(layout, partner, bands)


# Bands ---------------------------------------------------------------------------------------------------------------


def camera_band(
    cameras: Cameras,
    partner: Int[Array, "V"],
    config: SyncConfig,
    normals: Float[Array, "B V F 2"],
    *,
    grid: Size,
    size: Size,
    extent: Float[Array, "B V F"] | float = 0.0,
) -> Band:
    """The band of each token around its epipolar line in the partner's frame, for rows `(B V)`.

    Args:
      cameras: intrinsics `B V F 4` and extrinsics `B V F 3 4`, F frames of tokens (see `token_cameras`).
      partner: the view that each view attends to.
      config: form and width of the band.
      normals: directions of lines between cameras with a common center (see `draw_normals`).
      grid: rows and columns of a frame's tokens.
      size: height and width in pixels.
      extent: distance of each camera from the origin of the world that it was given in, see `share_a_center`.
    """
    other = Cameras(*(jnp.take(part, partner, axis=1) for part in cameras))
    points = jnp.asarray(token_points(grid, size))
    lines = epipolar_lines(fundamental_matrices(cameras, other, size), points)
    same = share_a_center(cameras.extrinsics, other.extrinsics, extent=extent)[..., None, None]
    if config.without_baseline == "open":
        return _band(jnp.where(same, 0.0, lines), config, grid, size)
    there = _mapped(infinite_homographies(cameras, other, size), points)
    return _band(jnp.where(same, pseudo_lines(there, normals), lines), config, grid, size)


def homography_band(
    homographies: Float[Array, "B F 3 3"],
    config: SyncConfig,
    normals: Float[Array, "B 2 F 2"],
    *,
    grid: Size,
    size: Size,
) -> Band:
    """The bands between a clip and its warped copy: lines of random directions through the mapped points, rows `(B 2)`.

    Args:
      homographies: from the clip to the copy, on pixels relative to the image center; one per frame of tokens.
      config, normals, grid, size: see `camera_band`.
    """
    both = jnp.stack([homographies, jnp.linalg.inv(homographies)], axis=1)
    there = map_points(both, jnp.asarray(token_points(grid, size)), size)
    lines = jnp.zeros_like(there) if config.without_baseline == "open" else pseudo_lines(there, normals)
    return _band(lines, config, grid, size)


def draw_normals(keys: Key[Array, "B"], views: int, frames: int) -> Float[Array, "B V F 2"]:
    """Directions of pseudo-lines, drawn for each example with its own key."""
    return jax.vmap(lambda key: random_normals(key, (views, frames)))(keys)


def _band(lines: jax.Array, config: SyncConfig, grid: Size, size: Size) -> Band:
    of_views = band(unit_lines(lines), grid, size, form=config.bias, width=config.band, decay=config.decay)
    flat = (rearrange(part, "b v f ... -> (b v) f ...") for part in (of_views.lines, of_views.width, of_views.slope))
    lines, width, slope = flat
    return Band(lines, of_views.points, width, slope)


@in_full_precision
def _mapped(matrices: Float[Array, "*b 3 3"], points: Float[Array, "n 3"]) -> Float[Array, "*b n 3"]:
    """Points mapped by homographies of pixels; zeros for those that end up behind the camera."""
    mapped = points @ jnp.swapaxes(matrices, -1, -2)
    in_front = mapped[..., 2:] > 1e-6
    return jnp.where(in_front, mapped / jnp.where(in_front, mapped[..., 2:], 1.0), 0.0)


# Cameras and rays ----------------------------------------------------------------------------------------------------


def token_cameras(cameras: Cameras, compression: int, temporal_patch: int = 1) -> Cameras:
    """The camera of each frame of tokens, `... F 4` and `... F 3 4`: that of the last frame it covers.

    Args:
      cameras: `... r n + 1` frames.
      compression: frames per latent frame of a causal VAE.
      temporal_patch: latent frames per patch.
    """
    axis = cameras.intrinsics.ndim - 2
    kept = (of_latent_frames(part, compression, axis) for part in cameras)
    return Cameras(*(part[(slice(None),) * axis + (slice(temporal_patch - 1, None, temporal_patch),)] for part in kept))


def ray_patches(cameras: Cameras, compression: int, *, grid: Size, size: Size) -> Float[Array, "R F h w X"]:
    """Plücker coordinates at each latent's center, stacked over the frames it covers: X = 6 x compression channels.

    The first latent frame covers one frame, whose rays are repeated. Rows are `(B V)`.

    Args:
      cameras: intrinsics `B V F 4`, extrinsics `B V F 3 4`, all frames of the clip.
      compression: frames per latent frame.
      grid: rows and columns of latents.
      size: height and width in pixels.
    """
    rays = rearrange(plucker.rays(cameras, size, grid), "b v f h w x -> (b v) f h w x")
    first = jnp.repeat(rays[:, :1], compression - 1, axis=1)
    return rearrange(jnp.concatenate([first, rays], axis=1), "r (f t) h w x -> r f h w (t x)", t=compression)


def _in_pixels(latents: tuple[int, ...], pixels_per_latent: int) -> Size:
    return latents[2] * pixels_per_latent, latents[3] * pixels_per_latent
