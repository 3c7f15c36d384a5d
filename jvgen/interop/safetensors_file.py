"""The safetensors format, written and read one tensor at a time.

Layout (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header
`{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {...}}`, then the tensors, little endian and without gaps.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jvgen.storage import UnreadableFile, reading, unreadable

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_PROBLEM = "is not a valid safetensors file"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors in the order of `specs`, one at a time, and sync the file to disk.

    Args:
      path: file to create.
      specs: name, shape and dtype of every tensor.
      tensors: `(name, array)` in the same order; an iterator converts them one at a time.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        entry = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape)}
        header[name] = {**entry, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pending = iter(tensors)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            found, array = next(pending)
            assert (found, array.shape, array.dtype) == (name, spec.shape, spec.dtype), (found, array.shape, name, spec)
            # As bytes, because not every dtype has a buffer interface.
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file by name, each read on access.

    Raises:
      UnreadableFile: not a safetensors file, or a truncated one; names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._specs: dict[str, tuple[TensorSpec, int]] = {}
        size = self.path.stat().st_size
        with self.path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise self._bad(f"its first bytes ask for a header of {length} bytes")
            text = stream.read(length)
        with reading(self.path, f"{_PROBLEM}: its header is not JSON"):
            header = json.loads(text)
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        # Texts by name, from whatever wrote the file.
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        if not header:
            raise self._bad("it holds no tensors")
        for name, entry in header.items():
            self._specs[name] = self._parse(name, entry, 8 + length, size)
        self._check_places(8 + length, size)

    def _parse(self, name: str, entry: object, data_start: int, size: int) -> tuple[TensorSpec, int]:
        try:
            spec = TensorSpec(tuple(int(length) for length in entry["shape"]), DTYPES[entry["dtype"]])
            start, stop = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise self._bad(f"the header's entry about {name} cannot be read: {entry!r}") from error
        if min((0, *spec.shape)) < 0 or start < 0 or stop - start != spec.nbytes:
            raise self._bad(f"{name} has shape {spec.shape} and {stop - start} bytes")
        if data_start + stop > size:
            raise self._bad(f"it is truncated: {name} ends at byte {data_start + stop} of {size}")
        return spec, data_start + start

    def _check_places(self, data_start: int, size: int) -> None:
        """The tensors follow each other without gaps, as the format demands: a damaged offset gives other weights."""
        end, previous = data_start, "the header"
        for name, (spec, start) in sorted(self._specs.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
            if start != end:
                raise self._bad(f"{name} starts at byte {start}, but {previous} ends at {end}")
            end, previous = start + spec.nbytes, name
        if end != size:
            raise self._bad(f"{previous} ends at byte {end}, but the file has {size}")

    def _bad(self, reason: str) -> UnreadableFile:
        return unreadable(self.path, _PROBLEM, reason)

    def __getitem__(self, name: str) -> np.ndarray:
        spec, offset = self._specs[name]
        with reading(self.path, _PROBLEM):
            raw = np.fromfile(self.path, np.uint8, count=spec.nbytes, offset=offset)
            return raw.view(spec.dtype).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._specs[name][0].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header."""
        return self._specs[name][0].dtype
