"""Which parameters are computed with in a narrower dtype than they are kept in."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jvgen.nn.network import Parameters
from jvgen.parallel.axes import CODES, LAYERS


def is_cast(shape: tuple[int, ...], names: tuple[str | None, ...]) -> bool:
    """Whether a parameter is computed with in the compute dtype: matrices and convolution kernels, stacked or not.

    Vectors (biases, scales of norms) stay float32: they cost nothing, and norms compute in float32. So do codebooks:
    which entry is nearest hangs on the last digits.
    """
    return len(shape) - (LAYERS in names) >= 2 and CODES not in names


def cast(parameters: Parameters, axes: Parameters, dtype: DTypeLike) -> Parameters:
    """Parameters as the networks compute with them; differentiable, gradients come back in the original dtype."""

    def leaf_cast(leaf: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating and is_cast(leaf.shape, names) else leaf

    return jax.tree.map(leaf_cast, parameters, axes)


def compute_shapes(shapes: Parameters, axes: Parameters, dtype: DTypeLike) -> Parameters:
    """Shapes and dtypes of `cast`."""
    return jax.eval_shape(lambda tree: cast(tree, axes, dtype), shapes)
