"""Linear layers whose parameters have logical axis names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jvgen.nn import quantized
from jvgen.parallel.axes import Axes, current
from jvgen.precision import product_precision

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


class Linear(nnx.Module):
    """`y = x @ kernel + bias` over the last axis, in the dtype of `x`, accumulated in float32 by the hardware.

    Args:
      features_in, features_out: widths.
      axes: logical names of the two kernel axes; the second also names the bias.
      kernel_init: initializer of the kernel; default normal with standard deviation 0.02.
    """

    # What `jvgen.nn.lora.attach` puts beside the kernel: adds to the output, given the inputs.
    lora: Callable[[jax.Array], jax.Array] | None = None

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        axes: Axes,
        bias: bool = True,
        kernel_init: Initializer = nnx.initializers.normal(0.02),
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (features_in, features_out), jnp.float32), logical_axes=tuple(axes)
        )
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32), logical_axes=(axes[1],)) if bias else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        output = self._product(inputs)
        return output if self.lora is None else output + self.lora(inputs)

    def _product(self, inputs: jax.Array) -> jax.Array:
        partitioner = current()
        leading = inputs.shape[:-1]
        if partitioner is None or partitioner.mesh.size == 1:
            # With several leading axes, the gradient takes 1.8 times as long on CPUs, because of needless transposes.
            # On a mesh the axes stay separate, because each may be sharded.
            inputs = inputs.reshape(-1, inputs.shape[-1])
        kernel = self.kernel[...].astype(inputs.dtype)
        about = self.kernel.get_metadata()
        kind = quantized.kind_for(about["logical_axes"], frozen=about.get("frozen", False))
        if kind == "none":
            output = jnp.matmul(inputs, kernel, precision=product_precision(inputs.dtype))
        else:
            output = quantized.product(inputs, kernel, kind)
        if self.bias is not None:
            output = output + self.bias[...].astype(inputs.dtype)
        return output.reshape(*leading, output.shape[-1])
