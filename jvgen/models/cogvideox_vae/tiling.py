"""Large frames as overlapping tiles, coded one at a time and blended: memory of one tile at any resolution.

The result differs from that of whole frames, because norms are over a tile; it is what diffusers computes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.nn.tiles import blend

# Shares of a tile that the next one covers again, vertically and horizontally, as in diffusers.
OVERLAP = (1 / 6, 1 / 5)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles for encoding or for decoding; all pairs are (height, width).

    Attributes:
      size: input elements of a tile; those at the bottom and right may be smaller.
      stride: input elements from one tile to the next.
      blend: output rows and columns that two neighbors share.
      keep: output rows and columns that a tile contributes.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    blend: tuple[int, int]
    keep: tuple[int, int]

    @classmethod
    def encoding(cls, config: CogVideoXVAEConfig) -> "Tiling":
        """Tiles of pixels: half of the size that the network was trained for.

        Raises:
          ValueError: see `decoding`.
        """
        cls.decoding(config)
        return cls._of(_pixels(config), _latents(config))

    @classmethod
    def decoding(cls, config: CogVideoXVAEConfig) -> "Tiling":
        """Tiles of latents: half of the size that the network was trained for.

        Raises:
          ValueError: a size whose tiles do not join to the size of the frame.
        """
        tiling = cls._of(_latents(config), _pixels(config))
        for name, step, kept in zip(("rows", "columns"), tiling.stride, tiling.keep, strict=True):
            if step * config.downsampling != kept:
                raise ValueError(
                    f"sample_height, sample_width = {config.sample_height}, {config.sample_width}: a tile of "
                    f"{tiling.size[0]}x{tiling.size[1]} latents has a stride of {step * config.downsampling} "
                    f"and contributes {kept} {name}; a sixth and a fifth of it must be whole latents."
                )
        return tiling

    @classmethod
    def _of(cls, size: tuple[int, int], output: tuple[int, int]) -> "Tiling":
        stride = tuple(int(length * (1 - share)) for length, share in zip(size, OVERLAP, strict=True))
        blend = tuple(int(length * share) for length, share in zip(output, OVERLAP, strict=True))
        return cls(size, stride, blend, tuple(length - shared for length, shared in zip(output, blend, strict=True)))

    def needed(self, height: int, width: int) -> bool:
        """Whether frames of this size are larger than one tile."""
        return height > self.size[0] or width > self.size[1]


def tiled(
    code: Callable[[jax.Array], jax.Array], clip: Float[Array, "B F H W C"], tiling: Tiling
) -> Float[Array, "B T h w K"]:
    """Code a clip tile by tile.

    Args:
      code: encodes or decodes one tile, of all frames. It is called once per tile, and under `jax.jit` compiled once
        for each of the at most four sizes of tiles.
      clip: pixels or latents.
      tiling: for the direction of `code`.
    """
    height, width = clip.shape[2:4]
    if not tiling.needed(height, width):
        return code(clip)
    above: list[jax.Array] = []
    bands = []
    for top in range(0, height, tiling.stride[0]):
        tiles = [
            code(clip[:, :, top : top + tiling.size[0], left : left + tiling.size[1]])
            for left in range(0, width, tiling.stride[1])
        ]
        # Each tile is blended with neighbors that are blended already.
        for index in range(len(tiles)):
            if above:
                tiles[index] = blend(above[index], tiles[index], tiling.blend[0], axis=2)
            if index:
                tiles[index] = blend(tiles[index - 1], tiles[index], tiling.blend[1], axis=3)
        bands.append(jnp.concatenate([tile[:, :, : tiling.keep[0], : tiling.keep[1]] for tile in tiles], axis=3))
        above = tiles
    return jnp.concatenate(bands, axis=2)


def _pixels(config: CogVideoXVAEConfig) -> tuple[int, int]:
    return config.sample_height // 2, config.sample_width // 2


def _latents(config: CogVideoXVAEConfig) -> tuple[int, int]:
    height, width = _pixels(config)
    return height // config.downsampling, width // config.downsampling
