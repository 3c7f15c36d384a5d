"""Features of single frames by a local DINOv2, for measures of how consistent clips are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.interop.from_torch import import_folder, read_config
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.dinov2.model import Dinov2, prepared
from jvgen.nn.network import Network
from jvgen.storage import Path

SIDE = 224  # shorter side of what the network sees, in pixels
BATCH = 32  # frames per call


def subject_features(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The class token of frames, uint8 `N H W 3` to float32 `N D`, by the DINOv2 in a folder.

    Raises:
      ValueError: weights of another network, or files that are missing or damaged.
    """
    config = read_config(folder)
    if not isinstance(config, Dinov2Config):
        raise ValueError(
            f"--dinov2 {folder}: holds a network of {type(config).__name__}; give a folder of transformers' "
            "`Dinov2Model`, such as facebook/dinov2-base."
        )
    parameters = jax.tree.map(jnp.asarray, import_folder(folder)[1])
    network = Network.of(lambda rngs: Dinov2(config, rngs=rngs))

    @jax.jit
    def tokens(parameters: dict, frames: jax.Array) -> jax.Array:
        scale = SIDE / min(frames.shape[1:3])
        size = tuple(max(1, round(side * scale / config.patch)) * config.patch for side in frames.shape[1:3])
        return network.apply(parameters, prepared(frames.astype(jnp.float32) / 255.0, size))[:, 0]

    def features(frames: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(frames), BATCH):
            some = frames[start : start + BATCH]
            filled = np.concatenate([some, np.repeat(some[-1:], BATCH - len(some), axis=0)])
            found.append(np.asarray(tokens(parameters, jnp.asarray(filled)))[: len(some)])
        return np.concatenate(found)

    return features
