"""Logical names of array axes, with which layers annotate their parameters and activations.

A layer uses these names only and never names a mesh axis. `jvgen.parallel.rules` maps them to mesh axes.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

# Parameter axes.
LAYERS = "layers"  # stacked layers under a scan
EMBED = "embed"  # width of the residual stream
MLP = "mlp"  # hidden width of a feed-forward block
HEADS = "heads"  # attention heads times head width, or heads alone
KV = "kv"  # head width
VOCABULARY = "vocabulary"
CODES = "codes"  # entries of a codebook: always float32, whatever the compute dtype
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
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_MLP = "activation_mlp"
ACTIVATION_HEADS = "activation_heads"

ALL = frozenset(value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str))

Axes = tuple[str | None, ...]


@runtime_checkable
class Partitioner(Protocol):
    """Places arrays while a step is traced; implemented by `jvgen.parallel.rules.Sharding`."""

    mesh: jax.sharding.Mesh

    def activation(self, axes: Axes, shape: tuple[int, ...]) -> jax.sharding.NamedSharding: ...

    def constrain(self, value: jax.Array, axes: Axes) -> jax.Array: ...

    def fsdp_all_gather(self, parameters: Any, axes: Any, *, frozen: bool = False) -> Any: ...

    def spreading(self, examples: int, split: Sequence[str] = ()) -> "Partitioner": ...

    @property
    def spread_parts(self) -> int: ...


_current: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar("partitioner", default=None)


@contextlib.contextmanager
def partitioned(partitioner: Partitioner | None) -> Iterator[None]:
    """Within this context `constrain` and `fsdp_all_gather` use the given partitioner; enter it to trace a step."""
    token = _current.set(partitioner)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def spread_examples(examples: int, *split: str) -> Iterator[None]:
    """Within this context a batch is over more mesh axes, as far as they divide it. Identity outside of a context.

    For a network of whole examples: devices that share an example would all compute the same.

    Args:
      examples: size of the batch.
      split: logical axes that the network's layers split, whose mesh axes stay theirs.
    """
    partitioner = _current.get()
    with contextlib.nullcontext() if partitioner is None else partitioned(partitioner.spreading(examples, split)):
        yield


def spread_parts() -> int:
    """Number of devices that take whole examples instead of parts of one; 1 outside of a context."""
    partitioner = _current.get()
    return 1 if partitioner is None else partitioner.spread_parts


def current() -> Partitioner | None:
    """The partitioner of the enclosing `partitioned` context; None outside of one (single-device code)."""
    return _current.get()


def device() -> jax.Device:
    """A device that the traced program is for: of the described pod when compiling ahead of time."""
    partitioner = _current.get()
    return jax.local_devices()[0] if partitioner is None else partitioner.mesh.devices.flat[0]


def platform() -> str:
    """Target of the traced program ("cpu", "gpu", "tpu")."""
    return device().platform


def constrain(value: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation's sharding by one logical name (or None) per axis. Identity outside of a context."""
    partitioner = _current.get()
    return value if partitioner is None else partitioner.constrain(value, axes)


def fsdp_all_gather(parameters: Any, axes: Any, *, frozen: bool = False) -> Any:
    """All-gather the parameters of one layer from storage to compute sharding. Identity outside of a context.

    Args:
      frozen: whether they are of a network that is not trained, which may be stored in another way.
    """
    partitioner = _current.get()
    return parameters if partitioner is None else partitioner.fsdp_all_gather(parameters, axes, frozen=frozen)
