"""Writes one shard: an ArrayRecord file, and the rows of its records beside it when it is complete."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jvgen import storage
from jvgen.data.store import array_files, records
from jvgen.data.store.index import CorruptIndex, Index, RowLists
from jvgen.data.store.records import Record

_ROWS = ".rows.npz"


class WrittenShard(NamedTuple):
    """A complete shard that is not part of a data set yet.

    Attributes:
      path: of the ArrayRecord file.
      index: its rows.
      bytes: of its records.
    """

    path: Path
    index: Index
    bytes: int


class ShardWriter:
    """Writes records to one ArrayRecord file. The same records give the same bytes in every process.

    Args:
      path: of the file; its folder must exist.
    """

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = path
        self.bytes = 0
        self._rows = RowLists()
        # Left by a build that was killed.
        rows_path(path).unlink(missing_ok=True)
        # Media are already compressed; groups of one record give the fastest random access.
        self._file = ArrayRecordWriter(str(path), "group_size:1,uncompressed")

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: Record) -> None:
        """Append a record.

        Raises:
          ValueError: inconsistent fields, or a column with a number here and a text before.
          OSError: the file cannot be written.
        """
        record.validate()
        serialized = records.serialize(record)
        self._rows.add(record, records.checksum_of(record))
        self._guarded(self._file.write, serialized)
        self.bytes += len(serialized)

    def close(self) -> WrittenShard:
        """Flush the file to disk, then write its rows beside it: a shard is complete if its rows are there."""
        self._guarded(self._file.close)
        self._file = None
        size = self.path.stat().st_size
        # ArrayRecord does not always report a full disk: a file smaller than its records is incomplete.
        if size < self.bytes:
            raise OSError(f"{self.path}: {size} bytes on disk of {self.bytes} written; is the disk full?")
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        index = self._rows.index()
        array_files.save_rows(rows_path(self.path), index, bytes=self.bytes, size=size)
        return WrittenShard(self.path, index, self.bytes)

    def abandon(self) -> None:
        """Close the file, which will be removed, ignoring errors."""
        if self._file is not None:
            with contextlib.suppress(RuntimeError):
                self._file.close()
            self._file = None

    def _guarded(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            raise OSError(f"{self.path.parent}: cannot write ({error}).") from error


def rows_path(path: Path) -> Path:
    """The file with the rows of a shard."""
    return path.with_name(path.name + _ROWS)


def is_complete(path: Path) -> bool:
    """Whether a shard was written to its end."""
    return rows_path(path).is_file()


def read_shard(path: storage.Path) -> WrittenShard:
    """A shard that `ShardWriter` wrote; it may have been copied to a bucket, with its rows.

    Raises:
      CorruptIndex: its rows are missing or damaged, or its file has another size than when it was written.
    """
    if not is_complete(path):
        raise CorruptIndex(f"{path}: not written to its end (no {rows_path(path).name}). Make it again.")
    index, document = array_files.load_rows(rows_path(path))
    size = storage.size(path) if path.is_file() else None
    if size != document["size"]:
        found = "missing" if size is None else f"{size} bytes"
        raise CorruptIndex(f"{path}: {found}, {document['size']} were written. Make the shard again.")
    return WrittenShard(path, index, document["bytes"])
