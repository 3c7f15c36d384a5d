"""Convolutions over clips: padding in time, and causal convolutions of a clip in chunks."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jvgen.nn.conv import DEFAULT_INIT, Border, Padding, convolve
from jvgen.nn.linear import Initializer
from jvgen.parallel.axes import CONV_IN, CONV_OUT, Axes

# Padding in time. "causal": copies of the first frame in front, so that no frame depends on later ones;
# "repeat": copies of the first and the last frame; "zeros": zeros at both ends.
InTime = Literal["causal", "repeat", "zeros"]
# Cache of a causal convolution: the last input frames of one chunk, for the next chunk.
Past = Float[Array, "B P H W I"] | None


class Conv3d(nnx.Module):
    """`y = x * kernel + bias` over clips `B F H W C`, in the dtype of `x`.

    The number of frames is kept at stride 1; at stride 2 the outputs are at frames 0, 2, 4, ...

    Args:
      features_in, features_out: channels.
      kernel_size: frames, height and width of the window; odd frames.
      strides: of the window.
      in_time: padding in time.
      sides: elements (before, after) height and width; the default keeps the size at stride 1.
      border: values of those elements.
      axes: logical names of the channels of the kernel; the second also names the bias.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        strides: tuple[int, int, int] = (1, 1, 1),
        in_time: InTime,
        sides: Padding | None = None,
        border: Border = "zeros",
        axes: Axes = (CONV_IN, CONV_OUT),
        kernel_init: Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        assert kernel_size[0] % 2, f"a window of {kernel_size[0]} frames has no middle frame"
        self.strides, self.in_time, self.border = tuple(strides), in_time, border
        same = tuple((size // 2, (size - 1) // 2) for size in kernel_size[1:])
        self.sides = same if sides is None else tuple(sides)
        shape = (*kernel_size, features_in, features_out)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32), logical_axes=(None, None, None, *axes))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32), logical_axes=(axes[1],))

    def __call__(self, clip: Float[Array, "B F H W I"], past: Past = None) -> tuple[Float[Array, "B f h w O"], Past]:
        """Convolve a clip, or the chunk of it that follows `past` (causal convolutions only).

        Returns:
          The output, and the `past` of the next chunk; None if it needs none.
        """
        taps = self.kernel.shape[0]
        assert past is None or self.in_time == "causal", (
            f"in_time = {self.in_time}: only causal convolutions have a past"
        )
        kept = None
        if self.in_time == "causal":
            before, after = taps - 1, 0
            if taps > self.strides[0]:
                kept = _last(clip, past, taps - self.strides[0])
            if past is not None:
                clip, before = jnp.concatenate([past, clip], axis=1), 0
        else:
            before = after = taps // 2
        output = convolve(
            clip,
            self.kernel[...],
            strides=self.strides,
            padding=((before, after), *self.sides),
            borders=("zeros" if self.in_time == "zeros" else "repeat", self.border, self.border),
        )
        return output + self.bias[...].astype(clip.dtype), kept


def _last(clip: Array, past: Past, count: int) -> Array:
    """The last `count` frames of a clip, extended to the front by `past` or copies of the first frame."""
    if clip.shape[1] < count:
        earlier = jnp.repeat(clip[:, :1], count, axis=1) if past is None else past
        clip = jnp.concatenate([earlier, clip], axis=1)
    return clip[:, -count:]
