"""Layer, group and root-mean-square norms: statistics in float32, two-pass variance, explicit epsilon."""

import jax
import jax.numpy as jnp
from flax import nnx

from jvgen.parallel.axes import BATCH, FRAMES, HEIGHT, WIDTH, current, platform

# XLA:TPU's convolutions take as many images or clips per device as they are, or a multiple.
_WHOLE = 8


class LayerNorm(nnx.Module):
    """Normalize the last axis to zero mean and unit variance, then scale and shift.

    Args:
      features: width of the last axis.
      epsilon: added to the variance.
      axis: logical name of the width.
      affine: learn scale and bias.
    """

    def __init__(self, features: int, *, epsilon: float, axis: str | None = None, affine: bool = True):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), logical_axes=(axis,)) if affine else None
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), logical_axes=(axis,)) if affine else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = inputs.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        centered = x - mean
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        x = centered * jax.lax.rsqrt(variance + self.epsilon)
        if self.scale is not None:
            x = x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x.astype(inputs.dtype)


class RMSNorm(nnx.Module):
    """Divide the last axis by its root mean square, then scale."""

    def __init__(self, features: int, *, epsilon: float, axis: str | None = None):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), logical_axes=(axis,))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = inputs.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].astype(jnp.float32)).astype(inputs.dtype)


class GroupNorm(nnx.Module):
    """Normalize groups of channels, as `torch.nn.GroupNorm`.

    Statistics of an input `B ... C` are over the channels of a group and all axes between the leading ones and the
    channels.

    Args:
      features: channels.
      groups: divides the channels.
      epsilon: added to the variance.
      axis: logical name of the channels.
      leading: number of leading axes with separate statistics: 1 for one set per example, 2 for one per frame of a
        clip `B F H W C`.
      rounded: normalize inputs of 16 bits as they are. Otherwise the compiler may take the float32 sums of the
        convolution before instead. These cost nothing where the statistics are fused into that convolution, but XLA:TPU
        stores them where it splits images to fill its tiles, for 6 per device and not for 8: twice the time of a
        residual block, three times its memory. None: on TPUs, for images `B H W C` and clips `B F H W C` whose number B
        per device 8 does not divide.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int,
        epsilon: float,
        axis: str | None = None,
        leading: int = 1,
        rounded: bool | None = None,
    ):
        if features % groups:
            raise ValueError(f"groups = {groups} does not divide features = {features}; choose a divisor.")
        self.groups = groups
        self.epsilon = epsilon
        self.leading = leading
        self.rounded = rounded
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), logical_axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), logical_axes=(axis,))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        rounded = _are_split(inputs.shape) if self.rounded is None else self.rounded
        if rounded and inputs.dtype != jnp.float32:
            inputs = jax.lax.optimization_barrier(inputs)
        # Axes are not merged: each may be sharded.
        x = inputs.astype(jnp.float32).reshape(*inputs.shape[:-1], self.groups, inputs.shape[-1] // self.groups)
        over = (*range(self.leading, inputs.ndim - 1), x.ndim - 1)
        mean = jnp.mean(x, axis=over, keepdims=True)
        centered = x - mean
        variance = jnp.mean(jnp.square(centered), axis=over, keepdims=True)
        x = (centered * jax.lax.rsqrt(variance + self.epsilon)).reshape(inputs.shape)
        x = x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x.astype(inputs.dtype)


def _are_split(shape: tuple[int, ...]) -> bool:
    """Whether XLA:TPU splits images `B H W C`, or clips `B F H W C`, of the traced program to fill its tiles."""
    if len(shape) < 4 or platform() != "tpu":
        return False
    partitioner = current()
    if partitioner is not None:
        leading = (BATCH, FRAMES)[: len(shape) - 3]
        shape = partitioner.activation((*leading, HEIGHT, WIDTH, None), shape).shard_shape(shape)
    return shape[0] % _WHOLE != 0
