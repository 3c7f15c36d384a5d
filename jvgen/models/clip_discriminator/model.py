"""The 3-D patch discriminator of CV-VAE's training: one score per patch of a clip or image."""

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.nn.conv3d import Conv3d
from jvgen.nn.linear import Linear
from jvgen.nn.norm import GroupNorm
from jvgen.nn.stacked import Remat, run_block
from jvgen.parallel.axes import BATCH, CONV_IN, CONV_OUT, FRAMES, HEIGHT, WIDTH, constrain

NORM_EPSILON = 1e-5
SLOPE = 0.2  # of the leaky ReLUs
_INIT = nnx.initializers.normal(0.02)
_AROUND = ((1, 1), (1, 1))


def _conv(features_in: int, features_out: int, rngs: nnx.Rngs, stride: int = 1) -> Conv3d:
    return Conv3d(
        features_in, features_out, strides=(stride,) * 3, in_time="zeros", sides=_AROUND, kernel_init=_INIT, rngs=rngs
    )


def _pointwise(features_in: int, features_out: int, rngs: nnx.Rngs) -> Linear:
    return Linear(features_in, features_out, axes=(CONV_IN, CONV_OUT), kernel_init=_INIT, rngs=rngs)


def halve(clip: Float[Array, "B F H W C"]) -> Float[Array, "B f h w C"]:
    """Means of 2x2x2 blocks. With an odd number of frames the first counts twice; an odd last row or column is cut."""
    if clip.shape[1] % 2:
        clip = jnp.concatenate([clip[:, :1], clip], axis=1)
    height, width = (size // 2 * 2 for size in clip.shape[2:4])
    return reduce(clip[:, :, :height, :width], "b (f t) (h p) (w q) c -> b f h w c", "mean", t=2, p=2, q=2)


class Block(nnx.Module):
    """Norm, SiLU, convolution, halving, norm, SiLU, convolution, added to the halved input; norm, leaky ReLU.

    The last norm and leaky ReLU follow each block in the published code.
    """

    def __init__(
        self, features_in: int, features_out: int, config: ClipDiscriminatorConfig, *, halves: bool, rngs: nnx.Rngs
    ):
        def norm(features: int) -> GroupNorm:
            return GroupNorm(features, groups=config.groups, epsilon=NORM_EPSILON, axis=CONV_OUT)

        self.halves = halves
        self.norm1 = norm(features_in)
        self.conv1 = _conv(features_in, features_out, rngs)
        self.norm2 = norm(features_out)
        self.conv2 = _conv(features_out, features_out, rngs)
        self.shortcut = None if features_in == features_out else _pointwise(features_in, features_out, rngs)
        self.norm_out = norm(features_out)

    def __call__(self, clip: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(clip)))[0]
        if self.halves:
            hidden, clip = halve(hidden), halve(clip)
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))[0]
        hidden = hidden + (clip if self.shortcut is None else self.shortcut(clip))
        return constrain(jax.nn.leaky_relu(self.norm_out(hidden), SLOPE), BATCH, FRAMES, HEIGHT, WIDTH, None)


class ClipDiscriminator(nnx.Module):
    """Clips, or images as clips of one frame, to one score per patch: high for real ones, low for generated ones."""

    def __init__(self, config: ClipDiscriminatorConfig, *, rngs: nnx.Rngs):
        config.validate()
        widths = config.widths
        self.conv_in = _conv(config.channels, widths[0], rngs, stride=2)
        self.blocks = nnx.List(
            [
                Block(widths[index], width, config, halves=index < config.halvings, rngs=rngs)
                for index, width in enumerate(widths[1:])
            ]
        )
        self.conv_out = _conv(widths[-1], 1, rngs)

    def __call__(self, clip: Float[Array, "B F H W C"]) -> Float[Array, "B f h w 1"]:
        hidden = jax.nn.leaky_relu(self.conv_in(clip)[0], SLOPE)
        for block in self.blocks:
            hidden = run_block(block, Remat.NONE, hidden)
        return self.conv_out(hidden)[0]
