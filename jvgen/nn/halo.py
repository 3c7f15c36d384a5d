"""Convolutions of images and clips that are split over devices: each gets the edges of its neighbours' parts.

XLA can split convolutions by itself, but (jax 0.10) it doubles the gradient of the kernel on some meshes when it does.
Here what moves is written out: one permutation an edge, whose transpose sends gradients back where they belong.
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
    """How one spatial axis is split.

    Attributes:
      mesh_axes: the mesh axes that it is split over, outermost first.
      parts: how many parts there are.
      before, after: elements that a part needs of the one before and of the one after it.
    """

    mesh_axes: tuple[str, ...]
    parts: int
    before: int
    after: int


def splits(
    partitioner: Partitioner,
    places: Axes,
    shape: Sequence[int],
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> tuple[Split | None, ...]:
    """How each spatial axis of `B *spatial C` can be split; None where it is not, or not evenly.

    Args:
      places: logical names of all axes of the inputs.
      shape, kernel_shape: of inputs and kernel.
      strides, padding: of the convolution.
    """
    found = []
    for axis, (stride, (before, after)) in enumerate(zip(strides, padding, strict=True)):
        size, window = shape[axis + 1], kernel_shape[axis]
        # Asked for one axis at a time: an axis that cannot be split leaves its devices to no other.
        names = tuple(place if index in (0, axis + 1) else None for index, place in enumerate(places))
        mesh_axes = _mesh_axes(partitioner, names, shape)[axis + 1]
        parts = math.prod(partitioner.mesh.shape[name] for name in mesh_axes)
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
    places: Axes,
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: Sequence[tuple[int, int]],
    borders: Sequence[str],
) -> jax.Array:
    """The convolution with its spatial axes split as `splits` says; `local` convolves what one device holds."""
    batch = _mesh_axes(partitioner, (places[0], *(None for _ in places[1:])), inputs.shape)[0]
    spec = PartitionSpec(batch or None, *(split.mesh_axes if split else None for split in splits), None)
    kept = tuple((0, 0) if split else pair for split, pair in zip(splits, padding, strict=True))

    def run(block: jax.Array, kernel: jax.Array) -> jax.Array:
        for axis, (split, border) in enumerate(zip(splits, borders, strict=True)):
            if split is not None:
                block = _with_edges(block, axis + 1, split, border)
        return local(block, kernel, strides, kept, borders)

    mapped = jax.shard_map(
        run, mesh=partitioner.mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )
    return mapped(inputs, kernel)


def _with_edges(block: jax.Array, axis: int, split: Split, border: str) -> jax.Array:
    """A part of an axis between the edges of its neighbours; at the ends of the axis, between what lies beyond."""
    size, last = block.shape[axis], split.parts - 1
    index = jax.lax.axis_index(split.mesh_axes)
    pieces = [block]
    if split.before:
        edge = jax.lax.slice_in_dim(block, size - split.before, size, axis=axis)
        # Who is sent nothing has zeros.
        got = jax.lax.ppermute(edge, split.mesh_axes, [(i, i + 1) for i in range(last)])
        if border == "repeat":
            first = jnp.repeat(jax.lax.slice_in_dim(block, 0, 1, axis=axis), split.before, axis=axis)
            got = jnp.where(index == 0, first, got)
        pieces.insert(0, got)
    if split.after:
        edge = jax.lax.slice_in_dim(block, 0, split.after, axis=axis)
        got = jax.lax.ppermute(edge, split.mesh_axes, [(i + 1, i) for i in range(last)])
        if border == "repeat":
            end = jnp.repeat(jax.lax.slice_in_dim(block, size - 1, size, axis=axis), split.after, axis=axis)
            got = jnp.where(index == last, end, got)
        pieces.append(got)
    return jnp.concatenate(pieces, axis=axis)


def _mesh_axes(partitioner: Partitioner, names: Axes, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """The mesh axes of each array axis."""
    spec: Sequence[Any] = partitioner.activation(names, tuple(shape)).spec
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
