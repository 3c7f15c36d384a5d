"""Random access to the records of a split's ArrayRecord files, with a bounded number of files open in a process."""

import bisect
import errno
import itertools
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from jvgen.config import ConfigError
from jvgen.storage import FileCache, StorageError, as_path, default_cache, is_remote, stamp

# Files open at a time in a process, over all data sets: a quarter of the usual `ulimit -n`.
MAX_OPEN_SHARDS = 256
# Limit of open files that is asked for: programs that close all possible descriptors take long with a higher one.
MAX_OPEN_FILES = 2**16


def raise_open_files_limit() -> None:
    """Raise the limit of open files of this process, and of those that it starts, to the most that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class CorruptShard(ValueError):
    """A shard is damaged or truncated; the message names the file."""


class Shard(NamedTuple):
    """Records [start, stop) of one ArrayRecord file."""

    path: str
    start: int
    stop: int


class OpenShards:
    """Least-recently-used readers of ArrayRecord files; thread-safe.

    A reader that is dropped while another thread reads from it is closed when that thread is done.

    Args:
      limit: readers kept open.
    """

    def __init__(self, limit: int = MAX_OPEN_SHARDS):
        self.limit = limit
        self._lock = threading.Lock()
        self._readers: OrderedDict[tuple[str, Hashable], Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._readers)

    def reader(self, path: str, version: Hashable = None, cache: FileCache | None = None) -> Any:
        """The reader of a file, opened if it is not open; a remote file is read from its copy in the cache.

        Args:
          path: of the file.
          version: tells it from another file that was at the path before.
          cache: of remote files; `jvgen.storage.default_cache` if None.
        """
        key = (path, version)
        with self._lock:
            if key in self._readers:
                self._readers.move_to_end(key)
                return self._readers[key]
        reader = _open(path, cache)
        dropped = []
        with self._lock:
            # Another thread may have opened it meanwhile.
            reader = self._readers.setdefault(key, reader)
            self._readers.move_to_end(key)
            while len(self._readers) > self.limit:
                dropped.append(self._readers.popitem(last=False))
        return reader

    def drop(self, path: str, version: Hashable = None) -> None:
        """Close a file: a reader does not recover from an error."""
        with self._lock:
            self._readers.pop((path, version), None)


# One per process, since open files are counted per process. Worker processes are spawned with their own.
_OPEN_SHARDS = OpenShards()


class ShardedRecords(Sequence[bytes]):
    """The serialized records of several shards, in order. Remote ones are read from copies in `cache`.

    Reading one raises `CorruptShard` for damaged files, and `StorageUnavailable` if reading fails again and again.
    """

    def __init__(self, shards: Sequence[Shard], cache: FileCache | None = None):
        self._shards, self._cache = list(shards), cache
        self._versions: dict[int, tuple[float, ...]] = {}
        self._ends = list(itertools.accumulate(shard.stop - shard.start for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        number = bisect.bisect_right(self._ends, row)
        shard = self._shards[number]
        position = shard.stop - (self._ends[number] - row)
        if number not in self._versions:
            # Another one if a data set was built again at its path.
            self._versions[number] = stamp(as_path(shard.path))
        key = shard.path, self._versions[number]
        retries = (self._cache or default_cache()).retries
        found = retries.call(lambda: _read(key, position, self._cache), as_path(shard.path), "read")
        if isinstance(found, Exception):
            raise found
        return found


def _read(key: tuple[str, Hashable], position: int, cache: FileCache | None) -> bytes | Exception:
    """A serialized record, or an error that stays when it is tried again; raises `OSError` for one that may pass."""
    path, version = key
    try:
        reader = _OPEN_SHARDS.reader(path, version, cache)
    except (StorageError, FileNotFoundError, ConfigError) as error:
        return error
    try:
        [record] = reader.read([position])
    except RuntimeError as error:
        _OPEN_SHARDS.drop(path, version)
        reason = str(error).splitlines()[0][:200]
        # "read() failed: Input/output error": the system's; all else is about what is in the file.
        if not re.search(r"\w\(\) failed", reason):
            return CorruptShard(f"{path} is corrupt: {reason}")
        for number in (errno.EACCES, errno.ENOENT):
            if os.strerror(number) in reason:
                return OSError(number, os.strerror(number), path)
        raise OSError(reason) from error
    # Of some truncated files the reader says that they are empty.
    return record or CorruptShard(f"{path} is corrupt: it has no record {position}")


def _open(path: str, cache: FileCache | None) -> Any:
    if is_remote(path):
        # An open file can be read after the cache removed it.
        with (cache or default_cache()).opening(as_path(path)) as copy:
            return _open(str(copy), None)
    from array_record.python import array_record_module

    # As `array_record_data_source` opens files for random access: no reading ahead, small buffers.
    return array_record_module.ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
