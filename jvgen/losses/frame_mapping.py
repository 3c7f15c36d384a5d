"""Which frame stands for those of one latent, where a video and an image autoencoder are compared (CV-VAE, 3.2)."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

# "first": frame 0 alone. The others keep frame 0 and take, of every group that shares a latent, its newest frame
# ("slice"), the mean of its frames ("average"), or one drawn at random ("random").
FrameMapping = Literal["first", "slice", "average", "random"]


def map_frames(
    clip: Float[Array, "B F H W C"],
    mapping: FrameMapping,
    group: int,
    picks: Int[Array, "B G"] | None = None,
) -> Float[Array, "B f H W C"]:
    """One frame for each latent frame of a clip.

    Args:
      clip: n groups of frames after the first one.
      mapping: see `FrameMapping`.
      group: frames of a group: 4 where time is divided by 4.
      picks: of "random": the frame of each group of each clip, 0 to group - 1.

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
    """Uniformly random frames for `map_frames`, of each clip by its own key.

    The published code draws once for a whole batch.
    """
    return jax.vmap(lambda key: jax.random.randint(key, (groups,), 0, group))(keys)
