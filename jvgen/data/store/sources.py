"""Reads data sets on disk: random access to the records of one split, from any thread or process."""

import difflib
import threading
from typing import Any

from jvgen.data.store import records
from jvgen.data.store.index import Index
from jvgen.data.store.records import Record
from jvgen.data.store.shards import Shard, ShardedRecords
from jvgen.storage import FileCache, Path, StorageError, as_path, default_cache, is_remote, read_json_object

METADATA = "jvgen.json"  # metadata of the builder, beside TFDS's own files
# Opening imports TFDS, whose lazy modules share one lock (functools.cached_property of Python 3.11): two threads that
# import at the same time would deadlock.
_OPEN_LOCK = threading.Lock()


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
        self.index = Index.load(folder, split)
        self._opened: tuple[ShardedRecords, Any] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row: int) -> Record:
        """The record of a row, 0 <= row < len(self).

        Raises:
          IndexError: the row is out of range.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.folder} [{self.split}], which has {len(self)} records")
        shards, features = self._open()
        return records.decode(features.deserialize_example_np(shards[int(row)]))

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the builder (origin, options, digests); see `jvgen.data.store.writer`."""
        return read_metadata(self.folder)

    @property
    def stored(self) -> tuple[int, int]:
        """Number of shards, and their bytes, by the data set's own metadata."""
        info = _builder(self.folder).info.splits[self.split]
        return info.num_shards, info.num_bytes

    def read_ahead(self) -> None:
        """Start copying the shards of a remote split to the cache, in a thread, if the cache holds all of them."""
        cache = self.cache or default_cache()
        info = _builder(self.folder).info.splits[self.split]
        if is_remote(self.folder) and info.num_bytes <= cache.limit:
            files = [as_path(instruction.filename) for instruction in info.file_instructions]
            threading.Thread(target=_copy_all, args=(files, cache), name="read-ahead", daemon=True).start()

    def _open(self) -> tuple[ShardedRecords, Any]:
        """The serialized records, and what parses one."""
        if self._opened is None:
            with _OPEN_LOCK:
                if self._opened is None:
                    info = _builder(self.folder).info
                    instructions = info.splits[self.split].file_instructions
                    shards = [Shard(str(i.filename), i.skip, i.skip + i.take) for i in instructions]
                    shards = ShardedRecords(shards, self.cache)
                    if len(shards) != len(self.index):
                        raise ValueError(
                            f"{self.folder} [{self.split}]: the index has {len(self.index)} rows, the data set "
                            f"{len(shards)} records. Build it again."
                        )
                    self._opened = shards, info.features
        return self._opened

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
        raise ValueError(f"{folder} has no split {split!r}. Its splits: {known}.")
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
    return {name: int(split.num_examples) for name, split in _builder(find_dataset(folder)).info.splits.items()}


def bytes_of(folder: str | Path, split: str) -> int:
    """Bytes of the records of a split."""
    return int(_builder(find_dataset(folder)).info.splits[split].num_bytes)


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


def _builder(folder: Path) -> Any:
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        return tfds.builder_from_directory(str(folder))
    except (FileNotFoundError, ValueError, KeyError, ParseError) as error:
        raise ValueError(
            f"{folder}: dataset_info.json or features.json cannot be read as TFDS metadata ({error})."
        ) from error


def _copy_all(files: list[Path], cache: FileCache) -> None:
    for file in files:
        try:
            cache.fetch(file)
        except (StorageError, FileNotFoundError):
            return  # Whoever needs the file reports it.
