"""Casting of parameters to the compute dtype."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jvgen.nn.network import Parameters
from jvgen.parallel.axes import CODES, LAYERS


def is_cast(shape: tuple[int, ...], names: tuple[str | None, ...]) -> bool:
    """Whether a parameter is cast to the compute dtype: matrices and convolution kernels, stacked or not.

    Vectors (biases, scales of norms) stay float32: they are small, and norms compute in float32. So do codebooks: the
    choice of the nearest entry is sensitive to rounding.
    """
    return len(shape) - (LAYERS in names) >= 2 and CODES not in names


def cast(parameters: Parameters, axes: Parameters, dtype: DTypeLike) -> Parameters:
    """Parameters in the dtypes that networks compute with; differentiable, with gradients in the original dtype."""

    def leaf_cast(leaf: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating and is_cast(leaf.shape, names) else leaf

    return jax.tree.map(leaf_cast, parameters, axes)


def compute_shapes(shapes: Parameters, axes: Parameters, dtype: DTypeLike) -> Parameters:
    """Shapes and dtypes of `cast`."""
    return jax.eval_shape(lambda tree: cast(tree, axes, dtype), shapes)
