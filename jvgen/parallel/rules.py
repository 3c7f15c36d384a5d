"""From logical axis names to mesh axes: one table for how parameters are stored, one for how they are computed with."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvgen.config import Config
from jvgen.parallel import axes
from jvgen.parallel.axes import Axes
from jvgen.parallel.mesh import DATA, FSDP, MESH_AXES, SEQ, TENSOR

Rules = dict[str, tuple[str, ...]]

STORAGE: Rules = {
    axes.EMBED: (FSDP,),
    axes.HEADS: (TENSOR,),
    axes.MLP: (TENSOR,),
    axes.VOCABULARY: (TENSOR,),
    axes.CONDITION: (FSDP,),
    axes.CONV_OUT: (FSDP,),
}
COMPUTE: Rules = {
    axes.HEADS: (TENSOR,),
    axes.MLP: (TENSOR,),
    axes.VOCABULARY: (TENSOR,),
    axes.BATCH: (DATA, FSDP),
    axes.LENGTH: (SEQ,),
    axes.ACTIVATION_HEADS: (TENSOR,),
    axes.ACTIVATION_MLP: (TENSOR,),
}
# For autoencoders of large clips, whose layers have no heads and no tokens: one clip over `seq` by rows and over
# `tensor` by columns, or over `seq` in time and over `tensor` by rows. Convolutions exchange edges (`jvgen.nn.halo`).
COMPUTE_IN_SPACE: Rules = COMPUTE | {axes.HEIGHT: (SEQ,), axes.WIDTH: (TENSOR,)}
COMPUTE_IN_TIME: Rules = COMPUTE | {axes.FRAMES: (SEQ,), axes.HEIGHT: (TENSOR,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig(Config):
    """Two tables from logical axis names to mesh axes. A name that is in neither is replicated.

    FSDP is the difference between them: storage splits `embed` over `fsdp`, compute does not, so each layer's
    parameters are gathered where they are used and their gradients are scattered back.

    Attributes:
      storage: how parameters, optimizer state and averages lie in memory between uses.
      compute: how parameters and activations lie while a layer runs.
      replicate_below: parameters with fewer elements than this (norms, biases) are not split over `fsdp`.
    """

    storage: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(STORAGE))
    compute: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(COMPUTE))
    replicate_below: int = 2**16

    def validate(self) -> None:
        for table in ("storage", "compute"):
            for name, mesh_axes in getattr(self, table).items():
                if name not in axes.ALL:
                    known = ", ".join(sorted(axes.ALL))
                    raise ValueError(f"{table}: {name!r} is not a logical axis; they are {known}.")
                unknown = [axis for axis in mesh_axes if axis not in MESH_AXES]
                if name == axes.LAYERS and mesh_axes:
                    raise ValueError(f"{table}.layers = {mesh_axes}: layers are scanned over, never split; use ().")
                if unknown:
                    known = ", ".join(MESH_AXES)
                    raise ValueError(f"{table}.{name}: {unknown[0]!r} is not a mesh axis; they are {known}.")
        if self.replicate_below < 0:
            raise ValueError(f"replicate_below = {self.replicate_below}: a number of elements, 0 or more.")


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The tables applied to a mesh: implements `jvgen.parallel.axes.Partitioner`."""

    mesh: Mesh
    config: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def storage(self, axes_tree: Any, shapes_tree: Any) -> Any:
        """Sharding of each parameter between uses; the trees have the same structure, leaves with `.shape`."""
        return _map_axes(lambda names, leaf: self.storage_of(names, leaf.shape), axes_tree, shapes_tree)

    def compute(self, axes_tree: Any, shapes_tree: Any) -> Any:
        """Sharding of each parameter while it is used."""
        return _map_axes(lambda names, leaf: self.activation(names, leaf.shape), axes_tree, shapes_tree)

    def storage_of(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of one stored parameter.

        Mesh axes go to the dimensions that the storage table names. A mesh axis that does not divide its dimension is
        dropped. `fsdp`, if it is not placed by then, goes to the largest dimension that it divides (the first of
        equals, never `layers`), unless one layer's parameter is smaller than `replicate_below`.
        """
        of_a_layer = math.prod(n for name, n in zip(names, shape, strict=True) if name != axes.LAYERS)
        small = of_a_layer < self.config.replicate_below
        table = self.config.storage
        if small:
            table = {name: tuple(a for a in mesh_axes if a != FSDP) for name, mesh_axes in table.items()}
        spec = self._place(names, shape, table)
        placed = {axis for entry in spec for axis in entry}
        wants_fsdp = any(FSDP in mesh_axes for mesh_axes in table.values())
        if wants_fsdp and not small and FSDP not in placed:
            size = self.mesh.shape[FSDP]
            for index in sorted(range(len(shape)), key=lambda i: (-shape[i], i)):
                split = math.prod(self.mesh.shape[axis] for axis in spec[index])
                if names[index] != axes.LAYERS and shape[index] % (split * size) == 0:
                    spec[index] = (*spec[index], FSDP)
                    break
        return self._sharding(spec)

    def activation(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of an activation, or of a parameter in use; mesh axes that do not divide are dropped."""
        return self._sharding(self._place(names, shape, self.config.compute))

    def batch(self, spec: Any) -> NamedSharding | Any:
        """Sharding of batch arrays, whose first axis is BATCH: one for a single shape, a tree for a tree of shapes."""
        return jax.tree.map(
            lambda leaf: self.activation((axes.BATCH, *[None] * (len(leaf.shape) - 1)), leaf.shape), spec
        )

    def constrain(self, value: jax.Array, names: Axes) -> jax.Array:
        """Lay an activation over the mesh by the compute table."""
        assert len(names) == value.ndim, f"{len(names)} axis names {names} for an array of shape {value.shape}"
        return jax.lax.with_sharding_constraint(value, self.activation(names, value.shape))

    def constrain_parameters(self, parameters: Any, axes_tree: Any) -> Any:
        """Move parameters from storage to compute sharding; their gradients go back to storage sharding."""
        return _map_axes(
            lambda names, leaf: _gather(self.activation(names, leaf.shape), self.storage_of(names, leaf.shape), leaf),
            axes_tree,
            parameters,
        )

    def _place(self, names: Axes, shape: tuple[int, ...], table: Mapping[str, tuple[str, ...]]) -> list[tuple]:
        assert len(names) == len(shape), f"{len(names)} axis names {names} for shape {shape}"
        used: set[str] = set()
        spec: list[tuple[str, ...]] = []
        for name, size in zip(names, shape, strict=True):
            entry: tuple[str, ...] = ()
            split = 1
            for axis in table.get(name, ()) if name is not None else ():
                if axis not in used and size % (split * self.mesh.shape[axis]) == 0:
                    entry, split = (*entry, axis), split * self.mesh.shape[axis]
                    used.add(axis)
            spec.append(entry)
        return spec

    def _sharding(self, spec: list[tuple[str, ...]]) -> NamedSharding:
        entries = [entry[0] if len(entry) == 1 else (entry or None) for entry in spec]
        return NamedSharding(self.mesh, PartitionSpec(*entries))


def _map_axes(function: Any, axes_tree: Any, tree: Any) -> Any:
    """Map over two trees of the same structure, where the leaves of the first are tuples of names."""
    leaves, structure = jax.tree.flatten(tree)
    names = jax.tree.leaves(axes_tree, is_leaf=_is_axes)
    return structure.unflatten([function(n, leaf) for n, leaf in zip(names, leaves, strict=True)])


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(compute: NamedSharding, storage: NamedSharding, value: jax.Array) -> jax.Array:
    # The two constraints in a row pin the point of the all-gather: here, and not where the value was made.
    value = jax.lax.with_sharding_constraint(value, storage)
    return jax.lax.with_sharding_constraint(value, compute)


def _gather_forward(compute: NamedSharding, storage: NamedSharding, value: jax.Array) -> tuple[jax.Array, None]:
    return _gather(compute, storage, value), None


def _gather_backward(
    compute: NamedSharding, storage: NamedSharding, residuals: None, gradient: jax.Array
) -> tuple[jax.Array]:
    # Without this the transpose would leave the gradient whole on every device: an all-reduce, not a reduce-scatter.
    return (jax.lax.with_sharding_constraint(gradient, storage),)


_gather.defvjp(_gather_forward, _gather_backward)
