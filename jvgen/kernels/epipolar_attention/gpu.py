"""Epipolar attention for NVIDIA GPUs: cuDNN's fused kernel with the bias of some frames at a time.

cuDNN takes a bias as an array of the inputs' dtype, one for all heads: 3.6 MB per frame at 1,350 tokens. It is computed
from lines and points before each pass and not kept between them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from jvgen.kernels.attention import gpu
from jvgen.kernels.epipolar_attention import reference

# The bias of as many frames as this holds is in memory at once.
MAX_BIAS_BYTES = 2**28


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lines: jax.Array,
    points: jax.Array,
    width: jax.Array,
    slope: jax.Array,
    *,
    scale: float,
    implementation: str = "cudnn",
    max_bias_bytes: int = MAX_BIAS_BYTES,
) -> jax.Array:
    """As `reference.attention`, with products and bias in the dtype of the inputs.

    Which arrays cuDNN takes is what `jvgen.kernels.attention.gpu.refusal` says.

    Args:
      implementation: "cudnn", or "xla" for the same calls on any backend.
      max_bias_bytes: memory of the bias.
    """
    lines, points, width, slope = jax.lax.stop_gradient((lines, points, width, slope))
    attend = functools.partial(gpu.attention, scale=scale, implementation=implementation)

    # What the backward pass needs of cuDNN is kept, the bias is computed again.
    @functools.partial(jax.checkpoint, policy=gpu.is_cudnn_forward)
    def of_frames(frames: tuple) -> jax.Array:
        query, key, value, lines, width, slope = frames
        return attend(query, key, value, bias=shifted_bias(lines, points, width, slope).astype(query.dtype)[:, None])

    arrays = (query, key, value, lines, width, slope)
    frame_bytes = query.shape[1] * key.shape[1] * query.dtype.itemsize
    count = _groups(query.shape[0], frame_bytes, max_bias_bytes)
    if count == 1:
        return of_frames(arrays)
    grouped = jax.tree.map(lambda array: rearrange(array, "(g b) ... -> g b ...", g=count), arrays)
    return rearrange(jax.lax.map(of_frames, grouped), "g b ... -> (g b) ...")


def shifted_bias(lines: jax.Array, points: jax.Array, width: jax.Array, slope: jax.Array) -> jax.Array:
    """The bias plus a number per query, which no softmax depends on: 0 for the nearest key, so that it rounds well.

    Returns:
      Float32 `B L K`.
    """
    bias = reference.tile_bias(lines, points, width, slope)
    return jnp.maximum(bias - jnp.max(bias, axis=-1, keepdims=True), gpu.LOWEST_BIAS)


def _groups(frames: int, bytes_per_frame: int, limit: int) -> int:
    """The least number of equal groups of frames whose bias fits; one frame each if none does."""
    most = max(1, limit // bytes_per_frame)
    return next(count for count in range(math.ceil(frames / most), frames + 1) if frames % count == 0)
