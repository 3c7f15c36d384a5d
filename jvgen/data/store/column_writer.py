"""Writes the columns of an index: `.npy` arrays one after the other in one file, which is named by its content."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jvgen.data.store.index import COLUMNS, NUMBERS, Column, Index
from jvgen.data.store.strings import Strings, Text

HEADER = 128  # bytes before the content of an array in a .npy file
CHUNK = 1 << 20  # rows, or bytes, moved at a time
_ALIGNMENT = 64


class ColumnWriter:
    """Writes the columns of a split, a piece of the rows after the other; `close` it in any case.

    Attributes:
      folder: where the file will be.
      rows: number of rows so far.
      caption_names: number of captions by name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = 0
        self._partial = folder / f".{os.getpid()}.partial"
        self.caption_names: dict[str, int] = {}
        self._files: dict[tuple[str, str], _ColumnFile] = {}
        self._codes: dict[str, dict[str, int]] = {}  # of texts in the order in which they came
        self._id_bytes = 0

    def append(self, piece: Index) -> None:
        """Append rows to all columns.

        Raises:
          ValueError: a column with numbers here and texts before, or the other way round.
        """
        for start in range(0, len(piece), CHUNK):
            part = slice(start, start + CHUNK)
            for name in NUMBERS:
                self._file(name).write(getattr(piece, name)[part])
            ids = piece.id[part]
            self._file("id").write(ids.content)
            self._file("id", "starts").write(ids.starts[:-1] + self._id_bytes)
            self._id_bytes += len(ids.content)
        for name in sorted(piece.columns.keys() | self._codes.keys() | self._free_numbers()):
            self.append_column(name, piece.columns.get(name, np.full(len(piece), np.nan)))
        for name, count in piece.caption_names.items():
            self.caption_names[name] = self.caption_names.get(name, 0) + count
        self.rows += len(piece)

    def append_column(self, name: str, column: Column) -> None:
        """Append values of a free column; rows that it did not have are missing values."""
        is_text = isinstance(column, Text)
        known_text, known_number = name in self._codes, name in self._free_numbers()
        if is_text and known_number and self._file(name).only_nan:
            self._files.pop((name, "column")).close()
            known_number = False
        elif not is_text and known_text:
            if not np.all(np.isnan(column)):
                raise ValueError(f"column {name}: has numbers in some shards and texts in others; build them alike.")
            column, is_text = Text(np.zeros(len(column), np.int32), Strings.of([""])), True
        if is_text and known_number:
            raise ValueError(f"column {name}: has numbers in some shards and texts in others; build them alike.")
        if is_text:
            if not known_text:
                self._codes[name] = {"": 0}
                self._file(name, "codes").fill(0, self.rows, np.int32)
            codes = self._codes[name]
            places = [codes.setdefault(value, len(codes)) for value in column.values]
            self._file(name, "codes").write(np.array(places, np.int32)[column.codes])
            return
        file = self._file(name, "column")
        file.fill(np.nan, self.rows - file.count, np.float64)
        file.write(np.asarray(column, np.float64))

    def finish(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Join the arrays in one file; returns where each is, by column and part."""
        if self._id_bytes or ("id", "starts") in self._files:
            self._file("id", "starts").write(np.array([self._id_bytes], np.int64))
        for name, codes in self._codes.items():
            values = sorted(codes)
            places = {value: place for place, value in enumerate(values)}
            self._file(name, "codes").map(np.array([places[value] for value in codes], np.int32))
            strings = Strings.of(values)
            self._file(name, "values").write(strings.content)
        spans: dict[str, dict[str, dict[str, Any]]] = {}
        offset, whole = 0, hashlib.sha256()
        with self._partial.open("wb") as target:
            for (name, part), file in sorted(self._files.items()):
                size, digest = file.copy_to(target)
                spans.setdefault(name, {})[part] = {
                    "offset": offset, "bytes": size, "sha256": digest, "dtype": file.dtype.str
                }  # fmt: skip
                offset = target.write(b"\0" * (-(offset + size) % _ALIGNMENT)) + offset + size
                whole.update(digest.encode())
            target.flush()
            os.fsync(target.fileno())
        name = f"{self.folder.name}/{whole.hexdigest()[:12]}.npy"
        self._partial.replace(self.folder.parent / name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for parts in spans.values():
            for span in parts.values():
                span["file"] = name
        return spans

    def close(self) -> None:
        """Remove what is left besides the finished file."""
        for file in self._files.values():
            file.close()
        self._partial.unlink(missing_ok=True)

    def _free_numbers(self) -> set[str]:
        return {name for name, part in self._files if part == "column" and name not in COLUMNS}

    def _file(self, name: str, part: str = "column") -> "_ColumnFile":
        if (name, part) not in self._files:
            self._files[name, part] = _ColumnFile(self.folder, name if part == "column" else f"{name}.{part}")
        return self._files[name, part]


class _ColumnFile:
    """A one-dimensional .npy file that is written a piece at a time."""

    def __init__(self, folder: Path, name: str):
        self._path = folder / f".{name}.{os.getpid()}.partial"
        self._name, self._file = name, self._path.open("wb+")
        self._file.write(b"\0" * HEADER)
        self.dtype = np.dtype(np.float64)
        self.count = 0
        self.only_nan = True

    def write(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        self.dtype = self.dtype if self.count else values.dtype
        assert values.dtype == self.dtype and values.ndim == 1, (self._name, values.dtype, values.shape)
        self.only_nan = self.only_nan and values.dtype.kind == "f" and bool(np.all(np.isnan(values)))
        self._file.write(values.data)
        self.count += len(values)

    def fill(self, value: float, count: int, dtype: type) -> None:
        for start in range(0, count, CHUNK):
            self.write(np.full(min(CHUNK, count - start), value, dtype))

    def map(self, table: np.ndarray) -> None:
        """Replace each code by its element of a table."""
        self._file.flush()
        if self.count:
            codes = np.memmap(self._path, table.dtype, "r+", HEADER, (self.count,))
            for start in range(0, self.count, CHUNK):
                codes[start : start + CHUNK] = table[codes[start : start + CHUNK]]
            codes.flush()

    def copy_to(self, target: BinaryIO) -> tuple[int, str]:
        """Write the header, and copy all to a file; returns the bytes and their SHA-256."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"shape": (self.count,), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(self.dtype)}
        )
        assert header.tell() == HEADER
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.seek(0)
        size, state = 0, hashlib.sha256()
        while chunk := self._file.read(CHUNK):
            target.write(chunk)
            state.update(chunk)
            size += len(chunk)
        return size, state.hexdigest()

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
