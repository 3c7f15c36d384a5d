"""An image-to-video denoiser that begins as a text-to-video one: at first given frames change nothing."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.models.video_dit.config import Positions, VideoDiTConfig
from jvgen.nested import flatten, unflatten
from jvgen.nn.adaptation import Adaptation

PATCH_KERNEL = "patch_embedding/projection/kernel"


def without_condition(config: VideoDiTConfig) -> VideoDiTConfig:
    """The text-to-video network that an image-to-video one can begin from: half the channels, no offset embedding.

    Learned positions, which are added to rotary ones, are left out.
    """
    learned = config.positions is Positions.ROTARY_AND_LEARNED
    return config.replace(
        in_channels=config.out_channels,
        offset_width=None,
        positions=Positions.ROTARY if learned else config.positions,
    )


def adaptations(config: VideoDiTConfig) -> dict[str, Adaptation]:
    """How the parameters begin that a `without_condition` network has in another shape, or not, by path.

    Channels of given frames, learned positions and the output of the offset embedding are zero: the network is that
    without them, and all of them have a gradient.
    """
    pixels, given = math.prod(config.patch_shape), config.in_channels - config.out_channels

    def widened(kernel: jax.Array) -> jax.Array:
        by_channel = rearrange(kernel, "(p x) d -> p x d", p=pixels)
        return rearrange(jnp.pad(by_channel, ((0, 0), (0, given), (0, 0))), "p x d -> (p x) d")

    found = {PATCH_KERNEL: Adaptation((pixels * config.out_channels, config.width), widened)}
    if config.positions is Positions.ROTARY_AND_LEARNED:
        found["learned_positions"] = Adaptation(None, jnp.zeros_like)
    if config.offset_width is not None:
        found |= {f"offset_embedding/hidden/{part}": Adaptation(None, None) for part in ("kernel", "bias")}
        found |= {f"offset_embedding/output/{part}": Adaptation(None, jnp.zeros_like) for part in ("kernel", "bias")}
    return found


def begin(parameters: Mapping[str, Any], config: VideoDiTConfig, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of an image-to-video network on the host, from those of a text-to-video one.

    Args:
      parameters: of `without_condition(config)`.
      config: of the new network.
      shapes: of its parameters.

    Returns:
      Without those that are to be initialized randomly.
    """
    flat, shapes = flatten(parameters), flatten(shapes)
    for path, adaptation in adaptations(config).items():
        if adaptation.make is not None:
            source = np.zeros(shapes[path].shape, np.float32) if adaptation.source is None else flat[path]
            flat[path] = np.asarray(adaptation.make(jnp.asarray(source)))
    return unflatten(flat)
