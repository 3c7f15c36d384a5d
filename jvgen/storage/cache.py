"""A cache of remote files on the local disk, with a size limit, shared by the processes of a machine."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from jvgen.config import ConfigError
from jvgen.storage.paths import Path
from jvgen.storage.retries import Retries

FOLDER_VARIABLE, SIZE_VARIABLE = "JVGEN_CACHE", "JVGEN_CACHE_GIB"
DEFAULT_GIB = 100.0
GIB = 2**30
_PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class FileCache:
    """Copies of remote files, the least recently used of which are removed when the limit is reached.

    Each file has a lock: it is downloaded once however many processes want it, and not removed while one opens it. A
    file appears when it is complete. A file that changes in the bucket (size or time) is downloaded again.

    Attributes:
      folder: local folder; created when it is first used.
      limit: bytes of all files together. A file that is larger by itself is refused.
    """

    folder: pathlib.Path
    limit: int
    retries: Retries = Retries()

    @property
    def _files(self) -> pathlib.Path:
        return self.folder / "files"

    @contextlib.contextmanager
    def opening(self, path: Path) -> Iterator[pathlib.Path]:
        """The local copy of a file, which stays where it is inside the context; an opened file can be read after it.

        Raises:
          FileNotFoundError: no such file in the bucket.
          StorageError: a bucket that cannot be read.
          ConfigError: the file is larger than the cache.
        """
        stat = self.retries.call(path.stat, path, "read")
        entry = self._files / f"{_key(path, stat.length, stat.mtime)}-{path.name}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock(entry, fcntl.LOCK_SH))
            while not entry.exists():
                stack.close()
                self._download(path, entry, stat.length)
                stack.enter_context(self._lock(entry, fcntl.LOCK_SH))
            os.utime(entry)
            yield entry

    def fetch(self, path: Path) -> pathlib.Path:
        """The local copy of a file; it may be removed by later downloads of any process. Raises as `opening`."""
        with self.opening(path) as entry:
            return entry

    def fetch_folder(self, path: Path, names: Sequence[str]) -> pathlib.Path:
        """A local folder with copies of the named files below a remote folder; raises as `opening`.

        The copies are links to the cached files, so that they stay when those are removed, until a person removes them.
        """
        parts = []
        for name in names:
            stat = self.retries.call((path / name).stat, path / name, "read")
            parts.append(f"{name} {stat.length} {stat.mtime}")
        folder = self.folder / "folders" / hashlib.sha256("\n".join([str(path), *parts]).encode()).hexdigest()[:16]
        folder = folder / path.name
        for name in names:
            target = folder / name
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.opening(path / name) as entry, contextlib.suppress(FileExistsError):
                os.link(entry, target)
        return folder

    def _download(self, path: Path, entry: pathlib.Path, size: int) -> None:
        import fsspec

        if size > self.limit:
            raise ConfigError(
                f"{path} has {size / GIB:.2f} GiB, more than the cache of {self.limit / GIB:.2f} GiB in {self.folder}; "
                f"raise data.cache_gib or {SIZE_VARIABLE}."
            )
        with self._lock(entry, fcntl.LOCK_EX):
            if entry.exists():
                return
            partial = self._reserve(size, entry)
            try:
                fs, key = fsspec.core.url_to_fs(str(path))
                self.retries.call(lambda: fs.get_file(key, str(partial)), path, "read")
                got = partial.stat().st_size
                if got != size:
                    raise OSError(f"{path}: {got} of {size} bytes were downloaded.")
                partial.replace(entry)
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, size: int, entry: pathlib.Path) -> pathlib.Path:
        """Make room by removing the least recently used files; returns the file to download to, named with its size.

        There is room for the limit, or for less where the disk has less. Files that a process is opening stay, so it
        may be exceeded by these.
        """
        partial = entry.with_name(f".{entry.name}.{size}{_PARTIAL}")
        with self._lock(self.folder / "evict", fcntl.LOCK_EX):
            found, total, kept = [], size, 0
            for file in self._files.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if file.name.endswith(_PARTIAL):
                        total += self._reserved(file)
                    elif file.is_file():
                        stat = file.stat()
                        found.append((stat.st_mtime_ns, stat.st_size, file))
                        total += stat.st_size
                        kept += stat.st_size
            limit = min(self.limit, kept + shutil.disk_usage(self._files).free)
            for _, bytes_, file in sorted(found):
                if total <= limit:
                    break
                with contextlib.suppress(BlockingIOError), self._lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    file.unlink(missing_ok=True)
                    total -= bytes_
            partial.touch()
        return partial

    def _reserved(self, partial: pathlib.Path) -> int:
        """Bytes that a download under way will take; what a killed process left is removed."""
        name, _, size = partial.name.removeprefix(".").removesuffix(_PARTIAL).rpartition(".")
        try:
            with self._lock(self._files / name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                partial.unlink(missing_ok=True)
        except BlockingIOError:
            return int(size)
        return 0

    @contextlib.contextmanager
    def _lock(self, entry: pathlib.Path, kind: int) -> Iterator[None]:
        """A lock of the operating system: it is released when the process ends, however it ends."""
        self._files.mkdir(parents=True, exist_ok=True)
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        descriptor = os.open(locks / f"{entry.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)


def cache_of(folder: str | None, gib: float | None) -> FileCache:
    """The cache that a config asks for; `JVGEN_CACHE` and `JVGEN_CACHE_GIB` replace both, so that a machine can say.

    Raises:
      ConfigError: `JVGEN_CACHE_GIB` is not a positive number.
    """
    folder = (
        os.environ.get(FOLDER_VARIABLE) or folder or os.path.join(tempfile.gettempdir(), f"jvgen-cache-{os.getuid()}")
    )
    text = os.environ.get(SIZE_VARIABLE)
    try:
        number = float(text) if text else gib if gib is not None else DEFAULT_GIB
    except ValueError:
        number = 0.0
    if number <= 0:
        raise ConfigError(f"{SIZE_VARIABLE} = {text!r}: the size of the cache in GiB, a number above 0.")
    return FileCache(pathlib.Path(folder).expanduser().absolute(), int(number * GIB))


@functools.cache
def _default(folder: str | None, gib: str | None) -> FileCache:
    return cache_of(None, None)


def default_cache() -> FileCache:
    """The cache of files that no config describes: weights, exports."""
    return _default(os.environ.get(FOLDER_VARIABLE), os.environ.get(SIZE_VARIABLE))


def _key(path: Path, size: int, time: int) -> str:
    return hashlib.sha256(f"{path} {size} {time}".encode()).hexdigest()[:16]
