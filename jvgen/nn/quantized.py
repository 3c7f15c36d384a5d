"""Products of the linear layers of repeated blocks in 8 bits, by the package qwix, which is optional.

Operands are scaled by their largest absolute value, activations per token and kernels per output; so are the gradients
that the backward pass multiplies. Parameters, activations between layers and everything else keep their dtypes. The
module that is used is not part of qwix's stable interface: `TESTED` names the version that this was tested with.
"""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from jvgen.config import ConfigError
from jvgen.parallel.axes import EMBED, HEADS, LAYERS, MLP, Axes

Kind = Literal["none", "int8", "fp8"]
TESTED = "0.1.8"
_MODULE = "qwix._src.core.dot_general_qt"
# Types of the operands of the forward pass, and of the gradients.
_TYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}

# Part of the key under which JAX caches traces: a function traced with one kind is not reused with another.
_kind = jax.make_user_context("none")


@contextlib.contextmanager
def products(kind: Kind) -> Iterator[None]:
    """A context: the linear layers of trained blocks that are traced in it multiply in this type.

    Raises:
      ConfigError: qwix is not installed, or not as in the version that was tested.
    """
    if kind == "none":
        yield
        return
    _qwix()
    # qwix multiplies integers by scales of other dtypes, which strict promotion (tests) refuses, backward as well.
    with _kind(kind), jax.numpy_dtype_promotion("standard"):
        yield


def check_installed(kind: Kind) -> None:
    """Raise `ConfigError` unless `products` of this kind can be made here."""
    if kind != "none":
        _qwix()


def kind_for(names: Axes, *, frozen: bool) -> Kind:
    """The type of the product with a kernel of these logical axes: that of the context, if it is one of a block.

    Kernels of stacked layers that have the axis `layers`, and no other axes than the residual stream, heads and hidden
    units; networks that are not trained stay as they are.
    """
    block = names[:1] == (LAYERS,) and set(names[1:]) <= {EMBED, HEADS, MLP}
    return _kind.value if block and not frozen else "none"


def product(inputs: jax.Array, kernel: jax.Array, kind: Kind) -> jax.Array:
    """`inputs @ kernel` over the last axis of the inputs, in the dtype of the inputs."""
    module, (forward, backward) = _qwix(), _TYPES[kind]
    config = module.DotGeneralQtConfig(
        lhs_qtype=jnp.dtype(forward),
        rhs_qtype=jnp.dtype(forward),
        dlhs_grad_qtype=jnp.dtype(backward),
        drhs_grad_qtype=jnp.dtype(backward),
    )
    dimensions = (((inputs.ndim - 1,), (0,)), ((), ()))
    return module.dot_general_qt(inputs, kernel, dimensions, config).astype(inputs.dtype)


def _qwix() -> ModuleType:
    try:
        version = importlib.metadata.version("qwix")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "training.precision.quantized: the package qwix is not installed; install jvgen[quantized], or use none."
        ) from None
    try:
        module = importlib.import_module(_MODULE)
        module.DotGeneralQtConfig, module.dot_general_qt  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"training.precision.quantized: qwix {version} has no quantized product where version {TESTED} has it "
            f"({error}); install jvgen[quantized], or use none."
        ) from error
    return module
