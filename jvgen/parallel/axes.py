"""The logical names of array axes: what layers say about their parameters and activations.

A layer knows these names and nothing of meshes. `jvgen.parallel.rules` maps them to mesh axes.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax

# Parameter axes.
LAYERS = "layers"  # stacked layers under a scan
EMBED = "embed"  # width of the residual stream
MLP = "mlp"  # hidden width of a feed-forward block
HEADS = "heads"  # attention heads times head width, or heads alone
KV = "kv"  # head width
VOCABULARY = "vocabulary"
CODES = "codes"  # entries of a codebook: computed with in float32 whatever the compute dtype
CONDITION = "condition"  # width of a conditioning vector (timestep embedding)
CONV_IN = "conv_in"  # input channels of a convolution
CONV_OUT = "conv_out"  # output channels of a convolution
# Activation axes.
BATCH = "batch"
VIEWS = "views"
FRAMES = "frames"
HEIGHT = "height"
WIDTH = "width"
LENGTH = "length"  # tokens of the sequence, split by sequence parallelism
KEY_LENGTH = "key_length"  # tokens that attention reads, never split
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_MLP = "activation_mlp"
ACTIVATION_HEADS = "activation_heads"

ALL = frozenset(value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str))

Axes = tuple[str | None, ...]


@runtime_checkable
class Partitioner(Protocol):
    """What the current run knows about placing arrays (see `jvgen.parallel.rules.Sharding`)."""

    mesh: jax.sharding.Mesh

    def activation(self, axes: Axes, shape: tuple[int, ...]) -> jax.sharding.NamedSharding: ...

    def constrain(self, value: jax.Array, axes: Axes) -> jax.Array: ...

    def constrain_parameters(self, parameters: Any, axes: Any) -> Any: ...


_current: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar("partitioner", default=None)


@contextlib.contextmanager
def partitioned(partitioner: Partitioner | None) -> Iterator[None]:
    """Within this context (while a step is traced) `constrain` places activations by the given partitioner."""
    token = _current.set(partitioner)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Partitioner | None:
    """The partitioner of the enclosing `partitioned` context; None for single-device code."""
    return _current.get()


def platform() -> str:
    """What the traced program will run on ("cpu", "gpu", "tpu"): a described pod's when compiled ahead of time."""
    partitioner = _current.get()
    return jax.default_backend() if partitioner is None else partitioner.mesh.devices.flat[0].platform


def constrain(value: jax.Array, *axes: str | None) -> jax.Array:
    """Say how an activation lies over the mesh, one logical name (or None) an axis. Identity without a context."""
    partitioner = _current.get()
    return value if partitioner is None else partitioner.constrain(value, axes)


def constrain_parameters(parameters: Any, axes: Any) -> Any:
    """Move the parameters of one layer from storage to compute sharding (the all-gather of FSDP)."""
    partitioner = _current.get()
    return parameters if partitioner is None else partitioner.constrain_parameters(parameters, axes)
