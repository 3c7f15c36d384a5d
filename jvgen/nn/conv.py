"""Convolutions over images and clips, channels last, with explicit padding; nearest-neighbor upsampling."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from jvgen.nn import halo
from jvgen.nn.linear import Initializer
from jvgen.parallel.axes import BATCH, CONV_IN, CONV_OUT, FRAMES, HEIGHT, WIDTH, Axes, constrain, current, platform
from jvgen.precision import product_precision

Padding = Sequence[tuple[int, int]]
Border = Literal["zeros", "repeat"]  # values of padding: zeros, or copies of the edge

# Variance 1 / (3 fan_in): the initial scale of Stable Diffusion's autoencoders.
DEFAULT_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
_AXIS_NAMES: dict[int, Axes] = {1: (None,), 2: (HEIGHT, WIDTH), 3: (FRAMES, HEIGHT, WIDTH)}


def convolve(
    inputs: Float[Array, "B *spatial I"],
    kernel: Float[Array, "*window I O"],
    *,
    strides: Sequence[int],
    padding: Padding,
    borders: Sequence[Border] | None = None,
) -> Float[Array, "B *output O"]:
    """Cross-correlation over one, two or three spatial axes, as `torch.nn.functional.conv{1,2,3}d`.

    On a mesh, spatial axes that the compute table shards (`frames`, `height`, `width`) stay sharded, and devices
    exchange halos. If the table does not shard them, or they do not divide evenly, every device has whole images.
    Differentiable in reverse mode, any number of times.

    Args:
      inputs: channels last.
      kernel: window axes, then input and output channels.
      strides: one per spatial axis.
      padding: elements (before, after) each spatial axis.
      borders: values of the padding, one per spatial axis; default zeros.
    """
    strides, padding = tuple(strides), tuple((int(before), int(after)) for before, after in padding)
    borders = ("zeros",) * len(strides) if borders is None else tuple(borders)
    kernel = kernel.astype(inputs.dtype)
    partitioner = current()
    if partitioner is None:
        return _local(inputs, kernel, strides, padding, borders)
    names = (BATCH, *_AXIS_NAMES[len(strides)], None)
    splits = halo.splits(partitioner, names, inputs.shape, kernel.shape, strides, padding)
    if any(splits):
        return halo.convolve(_local, partitioner, splits, names, inputs, kernel, strides, padding, borders)
    # Whole images on every device: XLA (jax 0.10) doubles the kernel's gradient when it shards rows on some meshes.
    names = (BATCH, *(None for _ in strides), None)
    output = _local(constrain(inputs, *names), kernel, strides, padding, borders)
    return constrain(output, *names)


def _local(
    inputs: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding, borders: Sequence[Border]
) -> jax.Array:
    """The convolution of the arrays of one device."""
    repeated = [pair if border == "repeat" else (0, 0) for pair, border in zip(padding, borders, strict=True)]
    if any(any(pair) for pair in repeated):
        inputs = _repeat_edges(inputs, repeated)
        padding = tuple((0, 0) if border == "repeat" else p for p, border in zip(padding, borders, strict=True))
    if len(strides) == 3 and platform() == "cpu":
        return _by_taps(inputs, kernel, strides, padding)
    return _convolve(inputs, kernel, strides, tuple(padding))


def _repeat_edges(inputs: jax.Array, padding: Padding) -> jax.Array:
    # `jnp.pad` also slices axes that it does not pad: for a sharded batch, communication in the backward pass.
    for axis, (before, after) in enumerate(padding, start=1):
        first, last = (jax.lax.slice_in_dim(inputs, at, at + 1, axis=axis) for at in (0, inputs.shape[axis] - 1))
        parts = [first] * before + [inputs] + [last] * after
        inputs = jnp.concatenate(parts, axis=axis) if len(parts) > 1 else inputs
    return inputs


def _by_taps(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding) -> jax.Array:
    """A convolution over clips as a sum of convolutions over images, one per frame of the window.

    XLA's convolutions over three axes take three to five times as long on CPUs, forward and backward.
    """
    inputs = jnp.pad(inputs, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0))) if any(padding[0]) else inputs
    count = output_size(inputs.shape[1], window=len(kernel), stride=strides[0], padding=(0, 0))
    last = (count - 1) * strides[0] + 1
    parts = [
        _convolve(
            rearrange(inputs[:, tap : tap + last : strides[0]], "b f h w c -> (b f) h w c"),
            weights,
            strides[1:],
            tuple(padding[1:]),
        )
        for tap, weights in enumerate(kernel)
    ]
    return rearrange(functools.reduce(jnp.add, parts), "(b f) h w c -> b f h w c", f=count)


def _plain(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding) -> jax.Array:
    # XLA's convolutions on CPUs take three times as long without padding: compute one extra row, and drop it.
    bare = max(kernel.shape[:-2]) > 1 and max(strides) == 1 and not any(map(any, padding)) and platform() == "cpu"
    output = jax.lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides=strides,
        padding=((0, 1), *padding[1:]) if bare else padding,
        dimension_numbers=_LAYOUTS[inputs.ndim - 2],
        precision=product_precision(inputs.dtype),
    )
    return output[:, :-1] if bare else output


# On CPUs, XLA computes the gradient of the kernel slowly for large batches: there the batch is cut into pieces.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding) -> jax.Array:
    return _plain(inputs, kernel, strides, padding)


def _forward(
    inputs: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(inputs, kernel, strides, padding), (inputs, kernel)


def _backward(
    strides: tuple[int, ...], padding: Padding, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = saved
    to_inputs = jax.linear_transpose(lambda x: _plain(x, kernel, strides, padding), inputs)

    def whole(inputs: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda k: _plain(inputs, k, strides, padding), kernel)(gradient)[0]

    def split(inputs: jax.Array, gradient: jax.Array) -> jax.Array:
        pairs = zip(jnp.split(inputs, pieces), jnp.split(gradient, pieces), strict=True)
        return functools.reduce(jnp.add, (whole(some, their) for some, their in pairs))

    pieces = _pieces(len(inputs), kernel)
    if pieces == 1:
        return to_inputs(gradient)[0], whole(inputs, gradient)
    return to_inputs(gradient)[0], jax.lax.platform_dependent(inputs, gradient, cpu=split, default=whole)


_convolve.defvjp(_forward, _backward)


def _pieces(batch: int, kernel: jax.Array) -> int:
    """Number of pieces of a batch for the kernel's gradient; at least eight examples each, measured on images."""
    partitioner = current()
    if kernel.ndim != 4 or kernel.shape[-1] < 8 or (partitioner is not None and partitioner.mesh.size > 1):
        return 1
    return max(pieces for pieces in range(1, 9) if batch % pieces == 0 and (pieces == 1 or batch // pieces >= 8))


class Conv2d(nnx.Module):
    """`y = x * kernel + bias` over images `B H W C`, in the dtype of `x`.

    Args:
      features_in, features_out: channels.
      kernel_size: height and width of the window.
      strides: of the window.
      padding: zeros (before, after) height and width; the default keeps the size at stride 1.
      axes: logical names of the channels of the kernel; the second also names the bias.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        kernel_size: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (1, 1),
        padding: Padding | None = None,
        axes: Axes = (CONV_IN, CONV_OUT),
        bias: bool = True,
        kernel_init: Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        self.strides = tuple(strides)
        same = tuple((size // 2, (size - 1) // 2) for size in kernel_size)
        self.padding = same if padding is None else tuple(padding)
        shape = (*kernel_size, features_in, features_out)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), shape, jnp.float32), logical_axes=(*(None for _ in kernel_size), *axes)
        )
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32), logical_axes=(axes[1],)) if bias else None

    def __call__(self, inputs: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        output = convolve(inputs, self.kernel[...], strides=self.strides, padding=self.padding)
        return output if self.bias is None else output + self.bias[...].astype(inputs.dtype)


def upsample_nearest(images: Float[Array, "B H W C"], factor: int = 2) -> Float[Array, "B h w C"]:
    """Repeat every pixel `factor` times along height and width."""
    return repeat(images, "b h w c -> b (h p) (w q) c", p=factor, q=factor)


def output_size(size: int, *, window: int, stride: int, padding: tuple[int, int]) -> int:
    """Length of a spatial axis after a convolution."""
    return (size + sum(padding) - window) // stride + 1


def convolution_flops(kernel_shape: Sequence[int], output_size: Sequence[int]) -> float:
    """FLOPs of one convolution of one image or clip, with padding counted as data."""
    return 2.0 * math.prod(kernel_shape) * math.prod(output_size)
