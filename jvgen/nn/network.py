"""A network as plain data: an NNX module split once into structure and a nested dict of parameters."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from jvgen.nn.parameter_keys import ParameterKeys
from jvgen.parallel import axes

Parameters = dict[str, Any]
# `jax.named_scope` around networks in a step that have no backward pass: compiled programs name what belongs to them.
FROZEN_SCOPE = "frozen"


def run_frozen(run: Callable[[], jax.Array], examples: int, *split: str) -> jax.Array:
    """What a network without a backward pass makes, with its batch spread over all devices that would repeat the work.

    Args:
      run: calls the network; its result has the batch in front.
      examples, split: see `jvgen.parallel.axes.spread_examples`.
    """
    with jax.named_scope(FROZEN_SCOPE):
        with axes.spread_examples(examples, *split):
            made = run()
        # Else the trained network would take over the sharding.
        return axes.constrain(made, axes.BATCH, *[None] * (made.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Network:
    """The structure of a module, separate from its parameters.

    `init` and `apply` are pure functions of arrays, made for `jax.jit`, `jax.grad` and `lax.scan`. Parameters are a
    nested dict with string keys ("blocks" -> "layers" -> "attention" -> "query" -> "kernel"); members of a list are
    named "0", "1", ...

    Attributes:
      graph: NNX's description of the module without arrays.
      state: its variables with their metadata and abstract values.
      shapes: nested dict of `jax.ShapeDtypeStruct`, one per parameter.
      axes: the same nested dict with each parameter's logical axis names (see `jvgen.parallel.axes`).
    """

    constructor: Callable[[nnx.Rngs], nnx.Module]
    graph: Any
    state: Any
    shapes: Parameters
    axes: Parameters

    @classmethod
    def of(cls, constructor: Callable[[nnx.Rngs], nnx.Module]) -> "Network":
        """The structure of `constructor(rngs)`, traced without allocating arrays."""
        graph, state = nnx.split(nnx.eval_shape(lambda: constructor(ParameterKeys(0))))
        shapes, axes = {}, {}
        for path, variable in _variables(state):
            names = variable.get_metadata().get("logical_axes")
            shape = variable.get_value()
            assert names is not None, f"parameter {'/'.join(path)} has no logical_axes"
            assert len(names) == len(shape.shape), f"{'/'.join(path)}: axes {names} for shape {shape.shape}"
            _put(shapes, path, jax.ShapeDtypeStruct(shape.shape, shape.dtype))
            _put(axes, path, tuple(names))
        return cls(constructor=constructor, graph=graph, state=state, shapes=shapes, axes=axes)

    def freeze(self) -> None:
        """Mark the variables as those of a network that is not trained, see `jvgen.parallel.axes.fsdp_all_gather`."""
        for _, variable in nnx.to_flat_state(self.state):
            variable.set_metadata(frozen=True)

    def init(self, key: jax.Array) -> Parameters:
        """Random parameters, float32, as a nested dict."""
        parameters: Parameters = {}
        for path, variable in _variables(nnx.state(self.constructor(ParameterKeys(key)))):
            _put(parameters, path, variable.get_value())
        return parameters

    def bind(self, parameters: Parameters) -> Any:
        """The module with these parameters in it, for calls of its methods inside a traced function."""
        flat = []
        for path, variable in nnx.to_flat_state(self.state):
            value: Any = parameters
            for part in path:
                value = value[str(part)]
            flat.append((path, variable.replace(value)))
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def apply(self, parameters: Parameters, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Call a method of the module with these parameters."""
        return getattr(self.bind(parameters), method)(*args, **kwargs)


def _variables(state: Any) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    for path, variable in nnx.to_flat_state(state):
        yield tuple(str(part) for part in path), variable


def _put(tree: Parameters, path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
