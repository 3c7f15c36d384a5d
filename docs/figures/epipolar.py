"""The epipolar band over frames of a rendered scene with exactly known cameras."""

import cv2
import jax.numpy as jnp
import numpy as np

from jvgen.data import SceneConfig, folded, render_scene
from jvgen.evaluation import png_bytes
from jvgen.geometry import Cameras, EpipolarBias, epipolar_bias, relative
from jvgen.models import SyncConfig, camera_band

QUERIES = ((0.3, 0.45), (0.8, 0.4))  # x, y in [0, 1] of the tokens shown
CELL = 8  # pixels per token


def picture() -> bytes:
    """PNG: a row per token, its frame with the token and the other view with the weights of its keys."""
    config = SceneConfig(
        height=168, width=252, frames=15, kinds={"static": 1.0}, objects=(4, 4), background="textured",
        camera_motions=("orbit left",), supersampling=2,
    )  # fmt: skip
    scene = render_scene(config, seed=0, index=3)
    views = folded(scene.video[0])  # 2 F H W 3
    cameras = Cameras(scene.intrinsics[0].astype(float), scene.extrinsics[0].astype(float))
    pair = Cameras(*(folded(part) for part in cameras))
    pair = pair._replace(extrinsics=relative(pair.extrinsics, pair.extrinsics[:1, :1]))
    frame, size = views.shape[1] - 1, views.shape[2:4]
    grid = (size[0] // CELL, size[1] // CELL)
    normals = jnp.broadcast_to(jnp.float32([0.8, 0.6]), (1, 2, views.shape[1], 2))
    batch = Cameras(*(jnp.float32(part[None]) for part in pair))
    band = camera_band(batch, jnp.asarray([1, 0]), SyncConfig(bias=EpipolarBias.SOFT), normals, grid=grid, size=size)
    rows = [_row(views, frame, band, query, grid, size) for query in QUERIES]
    return png_bytes(np.concatenate(rows))


def _row(views: np.ndarray, frame: int, band, query: tuple[float, float], grid, size) -> np.ndarray:
    column, line = int(query[0] * grid[1]), int(query[1] * grid[0])
    token = line * grid[1] + column
    row = band._replace(
        lines=band.lines[:1, frame : frame + 1, token : token + 1],
        width=band.width[:1, frame : frame + 1],
        slope=band.slope[:1, frame : frame + 1],
    )
    kept = np.exp(np.asarray(epipolar_bias(row))).reshape(grid).astype(np.float32)
    kept = cv2.resize(kept, size[::-1], interpolation=cv2.INTER_NEAREST)[..., None]
    left = views[0, frame].copy()
    place = (int((column + 0.5) * CELL), int((line + 0.5) * CELL))
    cv2.circle(left, place, 8, (20, 20, 20), -1, cv2.LINE_AA)
    cv2.circle(left, place, 6, (255, 230, 0), -1, cv2.LINE_AA)
    right = np.clip(views[1, frame] * (0.35 + 0.65 * kept) + 40 * kept * np.array([1.0, 0.9, 0.0]), 0, 255)
    gap = np.full((size[0], 6, 3), 128, np.uint8)
    return np.concatenate([left, gap, right.astype(np.uint8)], axis=1)
