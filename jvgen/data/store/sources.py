"""Reads data sets on disk: random access to the records of one split, from any thread or process."""

import difflib
import threading
from typing import Any

from jvgen.data.store import dataset_info, records
from jvgen.data.store.example import NotAnExample
from jvgen.data.store.index import Index, ShardInfo
from jvgen.data.store.index_files import load_index
from jvgen.data.store.records import Record
from jvgen.data.store.shards import CorruptShard, Shard, ShardedRecords
from jvgen.storage import FileCache, Path, StorageError, as_path, default_cache, is_remote, read_json_object

METADATA = "jvgen.json"  # metadata of the builder, beside TFDS's own files


class Source:
    """Records of one split of a data set, by row. Thread-safe; pickled copies open their own files.

    Args:
      folder: of the data set; may be in a bucket.
      split: its split.
      cache: where copies of remote shards are kept; `jvgen.storage.default_cache` if None.
    """

    def __init__(self, folder: Path, split: str, cache: FileCache | None = None):
        self.folder = folder
        self.split = split
        self.cache = cache
        self.index = load_index(folder, split, cache)
        self._opened: ShardedRecords | None = None

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row: int) -> Record:
        """The record of a row, 0 <= row < len(self), with its free columns.

        Raises:
          IndexError: the row is out of range.
          CorruptShard: the record, or its file, is damaged, or is not the one that the index has in this row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.folder} [{self.split}], which has {len(self)} records")
        try:
            record = records.parse(self.serialized(row))
        except NotAnExample as error:
            raise CorruptShard(f"{self.folder} [{self.split}]: record {row} is corrupt: {error}") from error
        if not self.index.describes(row, record):
            raise CorruptShard(
                f"{self.folder} [{self.split}]: record {row} is {record.id!r} ({_size(record)}), in the index it is "
                f"{self.index.id[row]!r}: shards and index are of two builds. Copy or build the data set again; if it "
                "was built again while this was reading, start again."
            )
        return record.replace(columns=self.index.values(row)) if self.index.columns else record

    def serialized(self, row: int) -> bytes:
        """The bytes of a row in its shard; raises as `read`."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened[int(row)]

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the builder (origin, options, digests); see `jvgen.data.store.writer`."""
        return read_metadata(self.folder)

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The files of the split, in order."""
        return self._split().shards

    @property
    def stored(self) -> tuple[int, int]:
        """Number of shards, and their bytes, by the data set's own metadata."""
        split = self._split()
        return len(split.shards), split.bytes

    def read_ahead(self) -> None:
        """Start copying the shards of a remote split to the cache, in a thread, if the cache holds all of them."""
        cache, split = self.cache or default_cache(), self._split()
        if is_remote(self.folder) and split.bytes <= cache.limit:
            files = [self.folder / shard.file for shard in split.shards]
            threading.Thread(target=_copy_all, args=(files, cache), name="read-ahead", daemon=True).start()

    def _split(self) -> dataset_info.Split:
        return _split_of(self.folder, self.split, self.index)

    def _open(self) -> ShardedRecords:
        shards = [Shard(str(self.folder / shard.file), 0, shard.records) for shard in self._split().shards]
        opened = ShardedRecords(shards, self.cache)
        if len(opened) != len(self.index):
            raise ValueError(
                f"{self.folder} [{self.split}]: the index has {len(self.index)} rows, the data set {len(opened)} "
                "records. Build it again."
            )
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split, "cache": self.cache, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=None)

    def __repr__(self) -> str:
        return f"Source({str(self.folder)!r}, {self.split!r}, {len(self)} records)"


def open_source(path: str | Path, split: str, cache: FileCache | None = None) -> Source:
    """Open one split of the data set in a folder (or of the only data set in its subfolders); see `Source`.

    Raises:
      ValueError: no folder, a folder without a data set (or with several), an unknown split or a missing index; the
        message lists the alternatives.
    """
    folder = find_dataset(path)
    names = splits(folder)
    if split not in names:
        known = ", ".join(f"{name} ({count} records)" for name, count in names.items()) or "none"
        raise ValueError(f"{folder} has no split {split!r}. Its splits: {known}. Name one of these as its split.")
    return Source(folder, split, cache)


def find_dataset(path: str | Path) -> Path:
    """The folder with `dataset_info.json`: `path` itself, or the only one in its subfolders (two levels deep).

    Raises:
      ValueError: as `open_source`.
    """
    path = as_path(path)
    if not path.exists():
        names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]
        hint = f"Did you mean {' or '.join(near)}?" if near else "Make a data set with `jvgen data build`."
        raise ValueError(f"data set folder {str(path)!r} does not exist. {hint}")
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; a data set is a folder with dataset_info.json.")
    if (path / "dataset_info.json").is_file():
        return path
    # Folders whose names start with a dot are unfinished builds.
    found = sorted(
        info.parent
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
        for info in path.glob(pattern)
        if not any(part.startswith(".") for part in info.relative_to(path).parts)
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} contains {len(found)} data sets; choose one: {', '.join(str(p) for p in found[:8])}.")
    names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} contains no data set (no dataset_info.json in it or its subfolders; it has: {names}). "
        "Make one with `jvgen data build`."
    )


def splits(folder: str | Path) -> dict[str, int]:
    """Number of records of each split of a data set."""
    return {name: split.records for name, split in _splits(find_dataset(folder)).items()}


def bytes_of(folder: str | Path, split: str) -> int:
    """Bytes of the records of a split."""
    return _splits(find_dataset(folder))[split].bytes


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Metadata that the builder wrote about the data set.

    Raises:
      ValueError: the data set was not written by `jvgen data build`.
    """
    path = as_path(folder) / METADATA
    if not path.is_file():
        if not path.parent.is_dir():
            raise ValueError(f"{folder}: no such folder.")
        raise ValueError(f"{folder} has no {METADATA}: it was not written by `jvgen data build`.")
    return read_json_object(path)


def _splits(folder: Path) -> dict[str, dataset_info.Split]:
    """By the indices, where they name the files; an append that was killed may have left TFDS's metadata behind."""
    found = dataset_info.read(folder)
    for path in folder.glob("index-*.json"):
        split = path.name.removeprefix("index-").removesuffix(".json")
        found[split] = _split_of(folder, split, load_index(folder, split))
    return found


def _split_of(folder: Path, split: str, index: Index) -> dataset_info.Split:
    if index.shards:
        return dataset_info.Split(index.shards, sum(shard.bytes for shard in index.shards))
    return dataset_info.read(folder)[split]


def _size(record: Record) -> str:
    return f"{record.views} x {record.frames} frames of {record.width}x{record.height}"


def _copy_all(files: list[Path], cache: FileCache) -> None:
    for file in files:
        try:
            cache.fetch(file)
        except (StorageError, FileNotFoundError):
            return  # Whoever needs the file reports it.
