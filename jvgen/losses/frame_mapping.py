"""Mapping of a clip to one frame per latent frame, to compare video and image autoencoders (CV-VAE, section 3.2)."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

# "first": frame 0 alone. The others keep frame 0 and take, of every group of frames that shares a latent, the last
# frame ("slice"), the mean ("average"), or a random frame ("random").
FrameMapping = Literal["first", "slice", "average", "random"]


def map_frames(
    clip: Float[Array, "B F H W C"],
    mapping: FrameMapping,
    group: int,
    picks: Int[Array, "B G"] | None = None,
) -> Float[Array, "B f H W C"]:
    """One frame per latent frame of a clip.

    Args:
      clip: the first frame, then n groups of frames.
      mapping: see `FrameMapping`.
      group: frames per group, the temporal compression.
      picks: for "random": index of the frame in each group of each clip, 0 to group - 1.

    Returns:
      n + 1 frames; 1 for "first".
    """
    first = clip[:, :1]
    if mapping == "first" or clip.shape[1] == 1:
        return first
    groups = rearrange(clip[:, 1:], "b (n g) h w c -> b n g h w c", g=group)
    if mapping == "slice":
        rest = groups[:, :, -1]
    elif mapping == "average":
        rest = jnp.mean(groups, axis=2)
    else:
        assert picks is not None, "the random mapping needs picks"
        rest = jnp.take_along_axis(groups, picks[:, :, None, None, None, None], axis=2)[:, :, 0]
    return jnp.concatenate([first, rest], axis=1)


def draw_picks(keys: Key[Array, "B"], groups: int, group: int) -> Int[Array, "B {groups}"]:
    """Uniformly random picks for `map_frames`, from one key per clip.

    The published code draws once for a whole batch.
    """
    return jax.vmap(lambda key: jax.random.randint(key, (groups,), 0, group))(keys)
