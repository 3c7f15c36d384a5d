"""Sharding rules from logical axis names to mesh axes: one table for stored parameters, one for computation."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvgen.config import Config
from jvgen.parallel import axes
from jvgen.parallel.axes import Axes
from jvgen.parallel.chips import GIB, chip_of
from jvgen.parallel.mesh import DATA, FSDP, MESH_AXES, SEQ, TENSOR
from jvgen.value_rules import Bounds

Rules = dict[str, tuple[str, ...]]

STORAGE: Rules = {
    axes.EMBED: (FSDP, SEQ),
    axes.HEADS: (TENSOR,),
    axes.MLP: (TENSOR,),
    axes.VOCABULARY: (TENSOR,),
    axes.CONDITION: (FSDP, SEQ),
    axes.CONV_OUT: (FSDP, SEQ),
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
# Compute tables for autoencoders of large clips, whose layers have no heads and no tokens. Each clip is split by rows
# over `seq` and by columns over `tensor`, or by frames over `seq` and by rows over `tensor`. Convolutions exchange
# halos (`jvgen.nn.halo`).
SPATIAL_SHARDING: Rules = COMPUTE | {axes.HEIGHT: (SEQ,), axes.WIDTH: (TENSOR,)}
TEMPORAL_SHARDING: Rules = COMPUTE | {axes.FRAMES: (SEQ,), axes.HEIGHT: (TENSOR,)}

# The kind of memory of `host_offload`, as JAX names it.
HOST_MEMORY = "pinned_host"
# Frozen networks are held whole where they take at most this share of a device's memory.
FROZEN_SHARE = 0.1
# Gradients of weights up to this size are summed whole: a reduce-scatter saves less than XLA's loop over shards costs
# (`docs/measured.md`: the world model's are smaller, those of the video transformers larger).
SUMMED_WHOLE_BYTES = 6 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig(Config):
    """Two tables from logical axis names to mesh axes. A name that is in neither table is replicated.

    FSDP is the difference between the two: storage splits `embed` over `fsdp` and `seq` and compute does not, so each
    layer's parameters are all-gathered where they are used and their gradients are reduce-scattered. (Devices along
    `seq` work on the same examples with the same parameters: without it they would hold copies of the state.)

    Attributes:
      storage: sharding of parameters, optimizer state and EMA between uses.
      compute: sharding of parameters and activations while a layer runs.
      replicate_below: parameters with fewer elements than this (norms, biases) are not split over `fsdp` and the mesh
        axes that `storage` names together with it.
      frozen: networks that are not trained (a text encoder, a VAE): "sharded" as the state is, so that their weights
        travel in every step that uses them; "replicated", whole on every device but for the mesh axes `tensor`; "auto":
        replicated where the devices' memory is known and all of them together take at most a tenth of it.
      whole_examples: where the examples of a microbatch divide over `seq` too (and over `tensor`, if neither heads nor
        feed-forward units are split over it), each device takes whole examples of that batch shape, and no tokens are
        split: short clips and images send none.
      host_offload: parts of the state that are in the memory of the hosts between their uses ("optimizer": moments;
        "ema"): less device memory, and a transfer to the devices and back in every step.
    """

    storage: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(STORAGE))
    compute: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(COMPUTE))
    replicate_below: Annotated[int, Bounds(at_least=0, fix="a number of elements")] = 2**16
    frozen: Literal["auto", "sharded", "replicated"] = "auto"
    whole_examples: bool = True
    host_offload: tuple[Literal["optimizer", "ema"], ...] = ()

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


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The two tables applied to a mesh: implements `jvgen.parallel.axes.Partitioner`.

    Attributes:
      mesh: devices.
      config: the tables.
      frozen_replicated: whether the `state_axes` leave frozen networks whole, see `holding`.
      spread_parts: devices that take whole examples instead of parts of one, see `spreading`.
    """

    mesh: Mesh
    config: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    frozen_replicated: bool = False
    spread_parts: int = 1

    def holding(self, axes_tree: Any, shapes_tree: Any) -> "Sharding":
        """The sharding of a run with these frozen networks: decides `frozen_replicated`."""
        whole = dataclasses.replace(self, frozen_replicated=True)
        if self.config.frozen == "auto":
            chip = chip_of(self.mesh.devices.flat[0]) if isinstance(self.mesh, Mesh) else None
            fits = chip is not None and whole.frozen_bytes(axes_tree, shapes_tree) <= (
                FROZEN_SHARE * chip.device_hbm_bytes
            )
            return whole if fits else self
        return whole if self.config.frozen == "replicated" else self

    def frozen_bytes(self, axes_tree: Any, shapes_tree: Any) -> int:
        """Bytes of frozen networks per device; leaves of the second tree have a `.shape` and a `.dtype`."""
        sizes = _map_axes(
            lambda names, leaf: (
                math.prod(self.frozen_of(names, leaf.shape).shard_shape(leaf.shape)) * leaf.dtype.itemsize
            ),
            axes_tree,
            shapes_tree,
        )
        return sum(jax.tree.leaves(sizes))

    def describe_frozen(self, axes_tree: Any, shapes_tree: Any) -> str:
        """One line for the start of a run: whether frozen networks are replicated, and what they take."""
        how = "replicated" if self.frozen_replicated else "sharded as the state"
        size = self.frozen_bytes(axes_tree, shapes_tree)
        return f"frozen networks: {how}, {size / GIB:.2f} GiB per device (sharding.frozen = {self.config.frozen})"

    @property
    def replicated(self) -> NamedSharding:
        """The sharding in which every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def storage(self, axes_tree: Any, shapes_tree: Any) -> Any:
        """Sharding of each stored parameter. The trees have equal structure; leaves of the second have a `.shape`."""
        return _map_axes(lambda names, leaf: self.storage_of(names, leaf.shape), axes_tree, shapes_tree)

    def frozen(self, axes_tree: Any, shapes_tree: Any) -> Any:
        """Sharding of each stored parameter of frozen networks."""
        return _map_axes(lambda names, leaf: self.frozen_of(names, leaf.shape), axes_tree, shapes_tree)

    def compute(self, axes_tree: Any, shapes_tree: Any) -> Any:
        """Sharding of each parameter while it is used."""
        return _map_axes(lambda names, leaf: self.activation(names, leaf.shape), axes_tree, shapes_tree)

    @functools.cached_property
    def state_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the state: `fsdp`, and those that a rule of the storage table names beside it."""
        named = self._named_with_fsdp
        return tuple(axis for axis in MESH_AXES if axis in named and (axis == FSDP or self.mesh.shape[axis] > 1))

    @functools.cached_property
    def _named_with_fsdp(self) -> frozenset[str]:
        return frozenset(axis for rule in self.config.storage.values() if FSDP in rule for axis in rule)

    @property
    def state_shards(self) -> int:
        """Into how many shards the `state_axes` can split a parameter."""
        return math.prod(self.mesh.shape[axis] for axis in self.state_axes)

    def storage_of(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of one stored parameter.

        Mesh axes are assigned to the dimensions that the storage table names. A mesh axis that does not divide its
        dimension is dropped. A mesh axis of the state (`state_axes`) that is still unassigned goes to the largest
        dimension that it divides (the first of equals, never `layers`), unless one layer's parameter has fewer than
        `replicate_below` elements. If it divides none, it is split over several, each by the largest factor that
        divides it: 1920 x 1920 over 256 devices becomes shards of 15 x 960. Only factors that are left then are
        replicated, see `replicas_of`.
        """
        return self._stored(names, shape, split=self.splits(names, shape))

    def frozen_of(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of one stored parameter of a frozen network."""
        return self._stored(names, shape, split=self.splits(names, shape) and not self.frozen_replicated)

    def _stored(self, names: Axes, shape: tuple[int, ...], *, split: bool) -> NamedSharding:
        skipped = {axis for axis in self._named_with_fsdp if not split or axis not in self.state_axes}
        table = {
            name: tuple(axis for axis in rule if axis not in skipped) for name, rule in self.config.storage.items()
        }
        spec = self._place(names, shape, table)
        if not split:
            return self._sharding(spec)
        left = {
            index: shape[index] // math.prod(self.mesh.shape[axis] for axis in spec[index])
            for index in sorted(range(len(shape)), key=lambda i: (-shape[i], i))
            if names[index] != axes.LAYERS
        }
        factors: dict[str, tuple[int, ...]] = {}
        for axis in self.state_axes:
            if any(axis in entry for entry in spec):
                continue
            size = self.mesh.shape[axis]
            whole = next((index for index, length in left.items() if length % size == 0), None)
            if whole is not None:
                spec[whole], left[whole] = (*spec[whole], axis), left[whole] // size
                continue
            found, untried = [], list(left)
            while untried:
                index = max(untried, key=lambda i, size=size: math.gcd(left[i], size))
                untried.remove(index)
                factor = math.gcd(left[index], size)
                if factor > 1:
                    spec[index] = (*spec[index], f"{axis}_{len(found)}")
                    left[index], size = left[index] // factor, size // factor
                    found.append(factor)
            if found:
                factors[axis] = (*found, size)
        return self._sharding(spec, _factored(self.mesh, tuple(factors.items())) if factors else None)

    def replicas_of(self, names: Axes, shape: tuple[int, ...]) -> int:
        """How many copies of a stored parameter there are along the `state_axes`.

        It is 1 except for a parameter below `replicate_below`, and for one whose dimensions have too few factors in
        common with the sizes of these mesh axes.
        """
        place = self.storage_of(names, shape)
        used = [axis for entry in place.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        shards = math.prod(place.mesh.shape[axis] for axis in used if axis.split("_")[0] in self.state_axes)
        return self.state_shards // shards

    def splits(self, names: Axes, shape: tuple[int, ...]) -> bool:
        """Whether the `state_axes` split a stored parameter at all: not if one layer's is small, or without `fsdp`."""
        layer_size = math.prod(n for name, n in zip(names, shape, strict=True) if name != axes.LAYERS)
        return bool(self.state_axes) and layer_size >= self.config.replicate_below

    def activation(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of an activation or of a parameter in use; mesh axes that do not divide are dropped."""
        return self._sharding(self._place(names, shape, self.config.compute))

    @property
    def batch_replicas(self) -> int:
        """Number of replicas of the parameters with their own examples: the size of `data`, if it splits batches."""
        return self.mesh.shape[DATA] if DATA in self.config.compute.get(axes.BATCH, ()) else 1

    def within_replica(self) -> "Sharding":
        """The same tables without the axis `data`, for code that is mapped over replicas."""
        tables = {
            table: {
                name: tuple(axis for axis in rule if axis != DATA) for name, rule in getattr(self.config, table).items()
            }
            for table in ("storage", "compute")
        }
        return dataclasses.replace(self, config=self.config.replace(**tables))

    def spreading(self, examples: int, split: Sequence[str] = ()) -> "Sharding":
        """The same tables with a batch of so many examples also over `seq` and `tensor`, where they divide it.

        Args:
          split: logical axes whose mesh axes are left to them.
        """
        compute = self.config.compute
        over = compute.get(axes.BATCH, ())
        taken = {*over, *(axis for name in split for axis in compute.get(name, ()))}
        parts = math.prod(self.mesh.shape[axis] for axis in over)
        added: list[str] = []
        for axis in (SEQ, TENSOR):
            size = self.mesh.shape[axis]
            if size > 1 and axis not in taken and examples % (parts * size) == 0:
                parts *= size
                added.append(axis)
        if not added:
            return self
        table = {name: tuple(axis for axis in rule if axis not in added) for name, rule in compute.items()}
        config = self.config.replace(compute=table | {axes.BATCH: (*over, *added)})
        spread = math.prod(self.mesh.shape[axis] for axis in added)
        return dataclasses.replace(self, config=config, spread_parts=self.spread_parts * spread)

    def batch(self, spec: Any) -> NamedSharding | Any:
        """Sharding of batch arrays, whose first axis is BATCH: one for a single shape, a tree for a tree of shapes."""
        return jax.tree.map(
            lambda leaf: self.activation((axes.BATCH, *[None] * (len(leaf.shape) - 1)), leaf.shape), spec
        )

    def constrain(self, value: jax.Array, names: Axes) -> jax.Array:
        """Constrain an activation to its sharding in the compute table."""
        assert len(names) == value.ndim, f"{len(names)} axis names {names} for an array of shape {value.shape}"
        return jax.lax.with_sharding_constraint(value, self.activation(names, value.shape))

    def fsdp_all_gather(self, parameters: Any, axes_tree: Any, *, frozen: bool = False) -> Any:
        """All-gather parameters from storage to compute sharding; their gradients are reduce-scattered to storage."""
        if self.mesh.size == 1:
            # Constraints would make them other arrays, of which a scan over layers keeps a copy for its backward pass.
            return parameters
        stored = self.frozen_of if frozen else self.storage_of
        return _map_axes(
            lambda names, leaf: _all_gather(
                self.activation(names, leaf.shape), stored(names, leaf.shape), _summed_whole(names, leaf), leaf
            ),
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

    def _sharding(self, spec: list[tuple[str, ...]], mesh: Mesh | None = None) -> NamedSharding:
        entries = [entry[0] if len(entry) == 1 else (entry or None) for entry in spec]
        return NamedSharding(self.mesh if mesh is None else mesh, PartitionSpec(*entries))


@functools.lru_cache
def _factored(mesh: Mesh, factors: tuple[tuple[str, tuple[int, ...]], ...]) -> Mesh:
    """The same devices in the same order, with an axis such as `fsdp` as axes `fsdp_0`, `fsdp_1` ... of these sizes."""
    sizes: dict[str, int] = {}
    for axis, size in mesh.shape.items():
        parts = dict(factors).get(axis)
        sizes |= {axis: size} if parts is None else {f"{axis}_{number}": part for number, part in enumerate(parts)}
    devices = mesh.devices.reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _map_axes(function: Any, axes_tree: Any, tree: Any) -> Any:
    """Map over two trees of the same structure; the leaves of the first are tuples of axis names."""
    leaves, structure = jax.tree.flatten(tree)
    names = jax.tree.leaves(axes_tree, is_leaf=_is_axes)
    return structure.unflatten([function(n, leaf) for n, leaf in zip(names, leaves, strict=True)])


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def _summed_whole(names: Axes, leaf: jax.Array) -> bool:
    """Whether devices sum a parameter's whole gradient and keep their shards of it, instead of a reduce-scatter.

    XLA makes the shards of a kernel's gradient one after the other, and reads all activations again for each: with 16
    devices three quarters of a tokenizer's step.
    """
    return axes.CONV_OUT in names or leaf.nbytes <= SUMMED_WHOLE_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _all_gather(compute: NamedSharding, storage: NamedSharding, summed_whole: bool, value: jax.Array) -> jax.Array:
    # Two constraints in a row pin the all-gather to this point instead of where the value was made.
    value = jax.lax.with_sharding_constraint(value, storage)
    return jax.lax.with_sharding_constraint(value, compute)


def _all_gather_forward(
    compute: NamedSharding, storage: NamedSharding, summed_whole: bool, value: jax.Array
) -> tuple[jax.Array, None]:
    return _all_gather(compute, storage, summed_whole, value), None


def _all_gather_backward(
    compute: NamedSharding, storage: NamedSharding, summed_whole: bool, residuals: None, gradient: jax.Array
) -> tuple[jax.Array]:
    if summed_whole:
        gradient = jax.lax.with_sharding_constraint(gradient, compute)
    # Without this the transpose would leave the whole gradient on every device: all-reduce, not reduce-scatter.
    return (jax.lax.with_sharding_constraint(gradient, storage),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)
