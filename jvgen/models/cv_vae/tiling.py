"""Long and large clips as published: chunks of 17 frames, and tiles that are blended where they overlap.

Every chunk but the first is coded as if its first frame were a still image, and the result of that frame is dropped;
norms are over one chunk and one tile. So the result differs from that of the whole clip, and the rule is part of the
published models. Networks with `config.is_causal` are coded exactly, by `jvgen.autoencoding.streaming`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.nn.tiles import blend

Coder = Callable[[jax.Array], jax.Array]


def encode_tiled(encode: Coder, clip: Float[Array, "B F H W C"], config: CVVAEConfig) -> Float[Array, "B f h w M"]:
    """Moments of a clip by chunks and tiles of `config.tile_frames`, `tile_size` and `tile_overlap`.

    Args:
      encode: moments of a chunk or tile; called with a few different shapes.
      clip: of any length; see `CVVAEConfig.check_clip` for lengths without a remainder.
      config: of the network.

    Raises:
      ValueError: see `check_tiles`.
    """

    def tiled(chunk: jax.Array) -> jax.Array:
        if config.tile_size is None:
            return encode(chunk)
        check_tiles(config, *chunk.shape[2:4])
        tile = config.tile_size
        latent_tile = tile // config.downsampling
        overlap = round(latent_tile * config.tile_overlap)
        step = round(tile * (1 - config.tile_overlap))
        return _tiles(encode, chunk, tile, step, overlap, latent_tile - overlap)

    return _chunks(tiled, clip, config.tile_frames)


def decode_tiled(decode: Coder, latents: Float[Array, "B f h w z"], config: CVVAEConfig) -> Float[Array, "B F H W C"]:
    """A clip from latents by chunks and tiles; see `encode_tiled`."""

    def tiled(chunk: jax.Array) -> jax.Array:
        if config.tile_size is None:
            return decode(chunk)
        check_tiles(config, *(side * config.downsampling for side in chunk.shape[2:4]))
        tile = config.tile_size // config.downsampling
        overlap = round(config.tile_size * config.tile_overlap)
        step = round(tile * (1 - config.tile_overlap))
        return _tiles(decode, chunk, tile, step, overlap, config.tile_size - overlap)

    frames = None if config.tile_frames is None else config.tile_frames // config.temporal_downsampling
    return _chunks(tiled, latents, frames)


def check_tiles(config: CVVAEConfig, height: int, width: int) -> None:
    """Raise `ValueError` if frames of this size, in pixels, are cut into tiles that do not join to their size.

    The published code rounds the overlap of pixels and that of latents separately. Where one is not the other times
    `config.downsampling`, it moves tiles against each other and returns frames of another size.
    """
    tile, side = config.tile_size, config.downsampling
    if tile is None or max(height, width) <= tile:
        return
    latents = tile // side
    shared, apart = round(latents * config.tile_overlap), round(latents * (1 - config.tile_overlap))
    pixels = round(tile * config.tile_overlap), round(tile * (1 - config.tile_overlap))
    if pixels != (shared * side, apart * side) or shared + apart != latents:
        raise ValueError(
            f"tile_size = {tile}, tile_overlap = {config.tile_overlap:g}: tiles share {pixels[0]} pixels or {shared} "
            f"latents of {side} pixels, so that frames of {height}x{width} would come out at another size; set "
            f"tile_overlap = {shared / latents:.6g}."
        )


def chunk_bounds(frames: int, size: int | None) -> list[tuple[int, int]]:
    """(start, stop) of each chunk: `size` frames and the one before, which it shares with the chunk before."""
    if size is None:
        return [(0, frames)]
    count = max(-(-(frames - 1) // size), 1)
    return [(index * size, min((index + 1) * size + 1, frames)) for index in range(count)]


def tile_starts(length: int, tile: int, step: int) -> list[int]:
    """Where tiles start along a side; the last one is the first that reaches the end."""
    starts = [0]
    while starts[-1] + tile < length and starts[-1] + step < length:
        starts.append(starts[-1] + step)
    return starts


def _chunks(function: Coder, clip: jax.Array, size: int | None) -> jax.Array:
    parts = [function(clip[:, start:stop]) for start, stop in chunk_bounds(clip.shape[1], size)]
    return jnp.concatenate([parts[0], *(part[:, 1:] for part in parts[1:])], axis=1)


def _tiles(function: Coder, clip: jax.Array, tile: int, step: int, overlap: int, kept: int) -> jax.Array:
    """Code tiles, blend them and join them.

    Args:
      tile, step: input elements per tile, and from one tile to the next.
      overlap, kept: output elements that are blended, and that each tile but the last contributes.
    """
    height, width = clip.shape[2:4]
    grid: list[list[jax.Array]] = []
    for top in tile_starts(height, tile, step):
        row: list[jax.Array] = []
        for left in tile_starts(width, tile, step):
            output = function(clip[:, :, top : top + tile, left : left + tile])
            # With the tile above, then with the one to the left; both are blended already.
            if grid:
                output = blend(grid[-1][len(row)], output, overlap, axis=2)
            if row:
                output = blend(row[-1], output, overlap, axis=3)
            row.append(output)
        grid.append(row)
    rows = []
    for number, row in enumerate(grid):
        if number < len(grid) - 1:
            row = [output[:, :, :kept] for output in row]
        row = [*(output[:, :, :, :kept] for output in row[:-1]), row[-1]]
        rows.append(jnp.concatenate(row, axis=3))
    return jnp.concatenate(rows, axis=2)
