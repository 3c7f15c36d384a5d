"""Tables of how our parameters are named and laid out in a PyTorch state dict, for both directions.

A table is a tuple of `Entry` rows. It is plain data over numpy, independent of networks, files and torch. Tensors are
converted one at a time, so that converting needs little more memory than the largest of them.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jvgen import exit_codes
from jvgen.nested import flatten, unflatten

LAYER = "{layer}"


class WeightError(ValueError):
    """Weights that do not fit a network; the message lists every tensor that is missing, unexpected or unsuitable."""

    exit_code = exit_codes.USER_ERROR


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse functions of one array, which move elements and do not change their values."""

    name: str
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def permute(name: str, *axes: int) -> Transform:
    """The transform whose `to_torch` is `array.transpose(axes)`."""
    inverse = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(name, lambda array: array.transpose(axes), lambda array: array.transpose(inverse))


IDENTITY = Transform("identity", lambda array: array, lambda array: array)
LINEAR = permute("linear", 1, 0)  # (in, out) <-> (out, in)
CONV2D = permute("conv2d", 3, 2, 0, 1)  # HWIO <-> OIHW
CONV3D = permute("conv3d", 4, 3, 0, 1, 2)  # DHWIO <-> OIDHW


def pointwise(spatial_axes: int) -> Transform:
    """A linear layer here, (in, out), that is a convolution with kernels of size one there, (out, in, 1, ...)."""
    tail = (None,) * spatial_axes
    return Transform(
        f"pointwise{spatial_axes}d",
        lambda array: array.transpose(1, 0)[(..., *tail)],
        lambda array: array.reshape(array.shape[:2]).transpose(1, 0),
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the named chunks that a fused tensor consists of along one axis.

    Attributes:
      chunks: chunks in this part, in their order in the part.
      all_chunks: chunks in the fused tensor, in their order there.
      axis: axis of the fused tensor in its own layout, not counting the layers axis.
      sizes: lengths of `all_chunks`; None if they are equal.
    """

    chunks: tuple[str, ...]
    all_chunks: tuple[str, ...]
    axis: int = 0
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert set(self.chunks) <= set(self.all_chunks), f"chunks {self.chunks} are not among {self.all_chunks}"
        assert self.sizes is None or len(self.sizes) == len(self.all_chunks), (
            f"{len(self.all_chunks)} chunks, sizes {self.sizes}"
        )

    def bounds(self, total: int) -> dict[str, tuple[int, int]]:
        """Start and stop of every chunk in a fused axis of length `total`."""
        if self.sizes is None and total % len(self.all_chunks):
            raise WeightError(
                f"an axis of length {total} cannot be cut into {len(self.all_chunks)} equal chunks {self.all_chunks}."
            )
        sizes = self.sizes or (total // len(self.all_chunks),) * len(self.all_chunks)
        stops = [int(stop) for stop in np.cumsum(sizes)]
        return {name: (stop - size, stop) for name, size, stop in zip(self.all_chunks, sizes, stops, strict=True)}

    def total(self, piece: int) -> int:
        """Length of the fused axis, given the length of the part."""
        return sum(self.sizes) if self.sizes else piece // len(self.chunks) * len(self.all_chunks)

    def read(self, fused: np.ndarray) -> np.ndarray:
        """The part of a fused array; a view if it is one chunk."""
        bounds = self.bounds(fused.shape[self.axis])
        pieces = [fused[self._index(fused.ndim, *bounds[name])] for name in self.chunks]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

    def write(self, fused: np.ndarray, piece: np.ndarray) -> None:
        """Write the part into a fused array."""
        bounds, offset = self.bounds(fused.shape[self.axis]), 0
        for name in self.chunks:
            start, stop = bounds[name]
            source = self._index(fused.ndim, offset, offset + stop - start)
            fused[self._index(fused.ndim, start, stop)] = piece[source]
            offset += stop - start
        assert offset == piece.shape[self.axis], f"piece of {piece.shape[self.axis]} for chunks of {offset}"

    def shape(self, fused: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part, given the shape of the fused tensor."""
        bounds = self.bounds(fused[self.axis])
        length = sum(bounds[name][1] - bounds[name][0] for name in self.chunks)
        return _with_length(fused, self.axis, length)

    def _index(self, rank: int, start: int, stop: int) -> tuple[slice, ...]:
        return tuple(slice(start, stop) if axis == self.axis % rank else slice(None) for axis in range(rank))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row: the PyTorch tensor of one parameter.

    Attributes:
      ours: path of the parameter, "blocks/layers/attention/query/kernel".
      theirs: name of the tensor. With `{layer}` in it, the parameter has a leading axis of layers, and there is one
        tensor per layer, numbered from 0.
      transform: layout of one tensor (without the layers axis).
      ours_part: the row is for these chunks of the parameter only; other rows with the same `ours` have the others.
      theirs_part: the same for the tensor.
      aliases: names of the tensor in some files; read, never written.
    """

    ours: str
    theirs: str
    transform: Transform = IDENTITY
    ours_part: Part | None = None
    theirs_part: Part | None = None
    aliases: tuple[str, ...] = ()


def fused(theirs: str, ours: Mapping[str, str], transform: Transform = IDENTITY, *, axis: int = 0) -> tuple[Entry, ...]:
    """Rows for one tensor that holds several of our parameters, `{chunk: our path}`, along `axis` of the tensor."""
    names = tuple(ours)
    return tuple(
        Entry(path, theirs, transform, theirs_part=Part((chunk,), names, axis)) for chunk, path in ours.items()
    )


def joined(
    ours: str, theirs: Mapping[str, str], transform: Transform = IDENTITY, *, axis: int = -1
) -> tuple[Entry, ...]:
    """Rows for one of our parameters that holds several tensors, `{chunk: name}`, along `axis` of the parameter."""
    names = tuple(theirs)
    return tuple(Entry(ours, name, transform, ours_part=Part((chunk,), names, axis)) for chunk, name in theirs.items())


@dataclasses.dataclass(frozen=True)
class _Row:
    """An entry at one layer (None when it is not stacked)."""

    entry: Entry
    layer: int | None

    @property
    def theirs(self) -> str:
        return self._named(self.entry.theirs)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs, *(self._named(alias) for alias in self.entry.aliases))

    def _named(self, name: str) -> str:
        return name if self.layer is None else name.replace(LAYER, str(self.layer))


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """How the parameters of one network are stored in a PyTorch state dict.

    Attributes:
      entries: one row per parameter, or per part of one.
      ignored: regular expressions of tensor names to skip: buffers and other networks in the file.
    """

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    def covers(self, path: str) -> bool:
        """Whether the parameter at this path has a row."""
        return any(entry.ours == path for entry in self.entries)

    def torch_shapes(self, shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order in which `to_torch` yields them.

        Args:
          shapes: nested dict of anything with `.shape` (`Network.shapes` or the parameters).
        """
        return {name: self._torch_shape(rows, flatten(shapes)) for name, rows in self._tensors(shapes).items()}

    def to_torch(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield `(name, array)` for every tensor, one at a time, in the dtype of the parameters.

        Args:
          parameters: nested dict of numpy or JAX arrays.

        Raises:
          WeightError: the parameters are not those of the table.
        """
        flat = flatten(parameters)
        for name, rows in self._tensors(parameters).items():
            if rows[0].entry.theirs_part is None:
                yield name, np.ascontiguousarray(_piece(rows[0], flat))
                continue
            whole = np.empty(self._torch_shape(rows, flat), flat[rows[0].entry.ours].dtype)
            for row in rows:
                row.entry.theirs_part.write(whole, _piece(row, flat))
            yield name, whole

    def from_torch(
        self,
        reader: Mapping[str, Any],
        shapes: Mapping[str, Any],
        place: Callable[[str, np.ndarray], Any] | None = None,
        *,
        finite: bool = True,
    ) -> dict[str, Any]:
        """The nested dict of parameters, as numpy arrays in the shapes and dtypes of `shapes`.

        Args:
          reader: tensor names to arrays; reading an item may read a file. If it has methods `shape(name)` and
            `dtype(name)`, these come from there, and each tensor is read only when it is converted.
          shapes: nested dict of `jax.ShapeDtypeStruct` (`Network.shapes`).
          place: `(path, array) -> array` on a device, called for each parameter as soon as it is complete, so that
            host memory holds one stack of layers at a time.
          finite: refuse NaN and infinity.

        Raises:
          WeightError: lists all tensors that are missing, not expected, of another shape or without floating-point
            numbers; or all that hold NaN or infinity in the dtype of `shapes`.
        """
        self._check_size(reader, shapes)
        wanted, flat_shapes = self._tensors(shapes), flatten(shapes)
        source = self._check(reader, wanted, flat_shapes)
        not_finite: dict[str, str] = {}
        flat: dict[str, Any] = {}
        missing = collections.Counter(row.entry.ours for rows in wanted.values() for row in rows)
        for name, rows in wanted.items():
            for row in rows:
                path = row.entry.ours
                placed = _place(row, reader[source[name]], flat, flat_shapes)
                if finite and not np.isfinite(placed).all():
                    not_finite[source[name]] = f"  {source[name]} in {placed.dtype}"
                missing[path] -= 1
                if place is not None and not missing[path]:
                    flat[path] = place(path, flat[path])
        if not_finite:
            lines = [f"{len(not_finite)} tensors hold NaN or infinity:", *not_finite.values()]
            raise WeightError("\n".join([*lines, "Get the weights again, or read them in a wider dtype."]))
        return unflatten({path: flat[path] for path in flat_shapes})

    def check(self, reader: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        """Raise `WeightError` as `from_torch` does; reads no tensor."""
        self._check_size(reader, shapes)
        self._check(reader, self._tensors(shapes), flatten(shapes))

    def _check(
        self, reader: Mapping[str, Any], wanted: Mapping[str, list[_Row]], flat_shapes: Mapping[str, Any]
    ) -> dict[str, str]:
        present = set(reader.keys())
        shape_of = getattr(reader, "shape", None) or (lambda name: reader[name].shape)
        dtype_of = getattr(reader, "dtype", None) or (lambda name: np.asarray(reader[name]).dtype)
        known, source, missing, misshaped, integers = set(), {}, [], [], []
        for name, rows in wanted.items():
            known.update(rows[0].names)
            found = next((candidate for candidate in rows[0].names if candidate in present), None)
            expected = self._torch_shape(rows, flat_shapes)
            if found is None:
                missing.append(f"{name} {expected}")
                continue
            source[name] = found
            shape = tuple(int(size) for size in shape_of(found))
            if shape != expected:
                misshaped.append(f"{found}: is {shape}, expected {expected}")
            # Dtypes of ml_dtypes (bfloat16, float8) are of kind "V".
            if dtype_of(found).kind in "biuc" and flat_shapes[rows[0].entry.ours].dtype.kind not in "biuc":
                integers.append(f"{found}: {dtype_of(found)}")
        extra = sorted(name for name in present - known if not self._is_ignored(name))
        groups = {
            "missing": missing,
            "not expected": extra,
            "wrongly shaped": misshaped,
            "without floating-point numbers, as in quantized weights, which are to be dequantized first": integers,
        }
        lines = [
            line
            for title, names in groups.items()
            if names
            for line in (f"{len(names)} {title}:", *(f"  {name}" for name in names))
        ]
        if lines:
            raise WeightError("\n".join(["the weights do not fit this network.", *lines]))
        return source

    def _check_size(self, reader: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        """Raise `WeightError` for a network with many times the layers in the file, before rows are made for each."""
        flat = flatten(shapes)
        rows = sum(
            flat[entry.ours].shape[0] if LAYER in entry.theirs else 1 for entry in self.entries if entry.ours in flat
        )
        if rows > 100 * (len(reader) + 100):
            raise WeightError(f"the network has {rows} tensors, the weights {len(reader)}: is config.json damaged?")

    def _is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def _tensors(self, tree: Mapping[str, Any]) -> dict[str, list[_Row]]:
        """The tensors by name, each with its rows."""
        flat = flatten(tree)
        ours = {entry.ours for entry in self.entries}
        problems = [f"the network has no parameter {path}" for path in sorted(ours - set(flat))]
        problems += [f"no row of the table is for {path}" for path in sorted(set(flat) - ours)]
        if problems:
            raise WeightError("\n".join(["parameters and weight table disagree.", *problems]))
        tensors: dict[str, list[_Row]] = {}
        for entry in self.entries:
            stacked = LAYER in entry.theirs
            for layer in range(flat[entry.ours].shape[0]) if stacked else (None,):
                row = _Row(entry, layer)
                tensors.setdefault(row.theirs, []).append(row)
        for name, rows in tensors.items():
            _assert_whole(name, [row.entry.theirs_part for row in rows])
        for path in ours:
            parts = {entry.theirs: entry.ours_part for entry in self.entries if entry.ours == path}
            _assert_whole(path, list(parts.values()))
        return tensors

    def _torch_shape(self, rows: list[_Row], flat: Mapping[str, Any]) -> tuple[int, ...]:
        row = rows[0]
        shape = _piece_shape(row, flat)
        part = row.entry.theirs_part
        return shape if part is None else _with_length(shape, part.axis, part.total(shape[part.axis]))


def _piece(row: _Row, flat: Mapping[str, Any]) -> np.ndarray:
    """The part of a tensor that one row has, in PyTorch's layout; moves one layer from a device, not the stack."""
    value = flat[row.entry.ours]
    array = np.asarray(value if row.layer is None else value[row.layer])
    if row.entry.ours_part is not None:
        array = row.entry.ours_part.read(array)
    return row.entry.transform.to_torch(array)


def _piece_shape(row: _Row, flat: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(flat[row.entry.ours].shape)
    shape = shape if row.layer is None else shape[1:]
    if row.entry.ours_part is not None:
        shape = row.entry.ours_part.shape(shape)
    # An array with zero strides has the shape and needs no memory.
    return row.entry.transform.to_torch(np.broadcast_to(np.zeros((), np.uint8), shape)).shape


def _place(row: _Row, tensor: np.ndarray, flat: dict[str, Any], flat_shapes: Mapping[str, Any]) -> np.ndarray:
    """Write the part of a tensor that one row has into our parameter; returns it in the parameter's dtype."""
    entry, target = row.entry, flat_shapes[row.entry.ours]
    piece = np.asarray(tensor)
    if entry.theirs_part is not None:
        piece = entry.theirs_part.read(piece)
    piece = entry.transform.from_torch(piece)
    if row.layer is None and entry.ours_part is None:
        # A copy: a view would keep a file mapped or a fused tensor alive.
        flat[entry.ours] = _cast(piece, target.dtype, copy=True)
        return flat[entry.ours]
    if entry.ours not in flat:
        flat[entry.ours] = np.empty(target.shape, target.dtype)
    slot = flat[entry.ours] if row.layer is None else flat[entry.ours][row.layer]
    piece = _cast(piece, target.dtype)
    if entry.ours_part is None:
        slot[...] = piece
    else:
        entry.ours_part.write(slot, piece)
    return piece


def _cast(array: np.ndarray, dtype: np.dtype, *, copy: bool = False) -> np.ndarray:
    """Rounded to a dtype, in C order; values beyond its range become infinite, for the caller to report."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype, order="C", copy=copy)


def _with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    axis %= len(shape)
    return (*shape[:axis], length, *shape[axis + 1 :])


def _assert_whole(name: str, parts: list[Part | None]) -> None:
    if len(parts) == 1 and parts[0] is None:
        return
    assert None not in parts, f"{name} is written by several rows without parts"
    taken = sorted(chunk for part in parts for chunk in part.chunks)
    assert taken == sorted(parts[0].all_chunks), f"rows for {name} cover {taken}, not the chunks {parts[0].all_chunks}"
    assert all(
        (part.all_chunks, part.axis, part.sizes) == (parts[0].all_chunks, parts[0].axis, parts[0].sizes)
        for part in parts
    ), name
