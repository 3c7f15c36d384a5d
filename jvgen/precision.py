"""The precision of matrix products and convolutions: one rule from the dtype of their operands.

What "float32" means differs between devices unless a product says how its operands are read: by default a TPU rounds
float32 operands to bfloat16, and NVIDIA GPUs since Ampere may round them to TF32 (10 bits of mantissa). So every
product of jvgen passes `precision=product_precision(...)`: float32 operands are multiplied in float32, and bfloat16
operands in one pass with float32 accumulation.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Level = Literal["highest", "high", "default"]
Function = TypeVar("Function", bound=Callable[..., Any])

# Part of the key under which JAX caches traces: a function traced at one level is not reused at another.
_level = jax.make_user_context("highest")


def product_precision(*operands: DTypeLike) -> jax.lax.Precision:
    """The `precision` of a product of operands that hold values of these dtypes.

    Explicit for narrow operands too: JAX's process-wide default would make their products slow, and TPU kernels refuse
    it. Gradients of a product have its precision.

    Args:
      operands: dtypes of the values; bfloat16 for values that were only stored in float32 for the product.

    Returns:
      For float32 (and wider) operands HIGHEST, or the level of the enclosing `float32_products`; DEFAULT if one of the
      operands is narrower.
    """
    if min(jnp.finfo(dtype).bits for dtype in operands) < 32:
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision(_level.value)


def float32_products(level: Level) -> Any:
    """A context: programs traced in it multiply float32 operands at this level.

    Args:
      level: "highest": float32 (six bfloat16 passes on TPUs). "high": three bfloat16 passes on TPUs, TF32 on GPUs.
        "default": the device's fastest, one bfloat16 pass on TPUs, TF32 on GPUs. CPUs compute float32 at every level.
    """
    return _level(level)


def in_full_precision(function: Function) -> Function:
    """Decorator: all matrix products, also those written `a @ b`, are float32 at every level of `float32_products`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped
