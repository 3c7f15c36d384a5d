"""Convolutions of images and clips sharded over devices: each device exchanges halos with its neighbors.

XLA can shard convolutions, but (jax 0.10) it then doubles the gradient of the kernel on some meshes. Here the
communication is explicit: one permutation per halo, whose transpose sends gradients back.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jvgen.parallel.axes import Axes, Partitioner


@dataclasses.dataclass(frozen=True)
class Split:
    """Sharding of one spatial axis.

    Attributes:
      mesh_axes: the mesh axes that it is sharded over, outermost first.
      parts: number of shards.
      before, after: size of the halo that a shard needs from the previous and from the next one.
    """

    mesh_axes: tuple[str, ...]
    parts: int
    before: int
    after: int


def splits(
    partitioner: Partitioner,
    names: Axes,
    shape: Sequence[int],
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> tuple[Split | None, ...]:
    """Sharding of each spatial axis of `B *spatial C`; None if it is not sharded, or not evenly.

    Args:
      names: logical names of all axes of the inputs.
      shape, kernel_shape: of inputs and kernel.
      strides, padding: of the convolution.
    """
    found = []
    for axis, (stride, (before, after)) in enumerate(zip(strides, padding, strict=True)):
        size, window = shape[axis + 1], kernel_shape[axis]
        # Queried one axis at a time: the mesh axes of an axis that cannot be sharded are not given to another.
        asked = tuple(name if index in (0, axis + 1) else None for index, name in enumerate(names))
        mesh_axes = _mesh_axes(partitioner, asked, shape)[axis + 1]
        parts = math.prod(partitioner.mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        needed = window - stride - before
        even = size % (parts * stride) == 0 and (size + before + after - window) // stride + 1 == size // stride
        found.append(
            Split(mesh_axes, parts, before, needed)
            if parts > 1 and even and needed >= 0 and size // parts >= max(before, needed)
            else None
        )
    used: set[str] = set()
    for axis, split in enumerate(found):
        if split is not None and used & set(split.mesh_axes):
            found[axis] = None
        elif split is not None:
            used |= set(split.mesh_axes)
    return tuple(found)


def convolve(
    local: Callable[..., jax.Array],
    partitioner: Partitioner,
    splits: Sequence[Split | None],
    names: Axes,
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: Sequence[tuple[int, int]],
    borders: Sequence[str],
) -> jax.Array:
    """A convolution with its spatial axes sharded according to `splits`; `local` convolves the arrays of one device."""
    batch = _mesh_axes(partitioner, (names[0], *(None for _ in names[1:])), inputs.shape)[0]
    spec = PartitionSpec(batch or None, *(split.mesh_axes if split else None for split in splits), None)
    kept = tuple((0, 0) if split else pair for split, pair in zip(splits, padding, strict=True))

    def run(block: jax.Array, kernel: jax.Array) -> jax.Array:
        for axis, (split, border) in enumerate(zip(splits, borders, strict=True)):
            if split is not None:
                block = _exchange_halo(block, axis + 1, split, border)
        return local(block, kernel, strides, kept, borders)

    mapped = jax.shard_map(
        run, mesh=partitioner.mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )
    return mapped(inputs, kernel)


def _exchange_halo(block: jax.Array, axis: int, split: Split, border: str) -> jax.Array:
    """A shard with the halos of its neighbors along an axis; at the ends of the axis, zeros or copies of the edge."""
    size, last = block.shape[axis], split.parts - 1
    index = jax.lax.axis_index(split.mesh_axes)
    pieces = [block]
    if split.before:
        sent = jax.lax.slice_in_dim(block, size - split.before, size, axis=axis)
        # Devices that receive nothing get zeros.
        halo = jax.lax.ppermute(sent, split.mesh_axes, [(i, i + 1) for i in range(last)])
        if border == "repeat":
            first = jnp.repeat(jax.lax.slice_in_dim(block, 0, 1, axis=axis), split.before, axis=axis)
            halo = jnp.where(index == 0, first, halo)
        pieces.insert(0, halo)
    if split.after:
        sent = jax.lax.slice_in_dim(block, 0, split.after, axis=axis)
        halo = jax.lax.ppermute(sent, split.mesh_axes, [(i + 1, i) for i in range(last)])
        if border == "repeat":
            end = jnp.repeat(jax.lax.slice_in_dim(block, size - 1, size, axis=axis), split.after, axis=axis)
            halo = jnp.where(index == last, end, halo)
        pieces.append(halo)
    return jnp.concatenate(pieces, axis=axis)


def _mesh_axes(partitioner: Partitioner, names: Axes, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """The mesh axes of each array axis."""
    spec: Sequence[Any] = partitioner.activation(names, tuple(shape)).spec
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
