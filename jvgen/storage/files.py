"""Whole files and folders: read, written, copied and removed, on local disks and in buckets."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar

from jvgen.config import ConfigError
from jvgen.storage.cache import FileCache, default_cache
from jvgen.storage.errors import StorageError
from jvgen.storage.paths import Path, as_path, is_remote
from jvgen.storage.retries import Retries

T = TypeVar("T")
RETRIES = Retries()


def read_bytes(path: Path, retries: Retries = RETRIES) -> bytes:
    """Content of a file.

    Raises:
      FileNotFoundError: no such file.
      StorageError: a bucket that cannot be read.
    """
    if not is_remote(path):
        return path.read_bytes()
    return _remote(path, "read", lambda fs, key: fs.cat_file(key), retries)


def read_text(path: Path, retries: Retries = RETRIES) -> str:
    """Content of a UTF-8 file; raises as `read_bytes`."""
    return read_bytes(path, retries).decode()


def write_bytes(path: Path, content: bytes, retries: Retries = RETRIES) -> None:
    """Write a file completely or not at all: renamed into place locally, one upload in a bucket. Creates its folder.

    Raises:
      OSError: the file cannot be written (`StorageError` in a bucket).
    """
    if is_remote(path):
        _remote(path, "write", lambda fs, key: fs.pipe_file(key, content), retries)
        return
    with local_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str, retries: Retries = RETRIES) -> None:
    """Write a UTF-8 file; see `write_bytes`."""
    write_bytes(path, content.encode(), retries)


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[pathlib.Path]:
    """A local file to write, which becomes `path` when the context ends without an error. Creates its folder.

    It has the suffix of `path`. For libraries that write by seeking, or to names only.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="jvgen-") as folder:
            partial = pathlib.Path(folder) / path.name
            yield partial
            _put(partial, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def local_copy(path: str | os.PathLike[str], cache: FileCache | None = None) -> pathlib.Path:
    """The path itself if it is local; else a copy of the file, or of all files of the folder, in the local cache.

    For libraries that map files into memory or open them by name. What is not there is returned as a path that does not
    exist, so that callers report it as they do for local files; its name is the same.

    Raises:
      StorageError: a bucket that cannot be read.
    """
    path = as_path(path)
    if not is_remote(path):
        return path
    cache = cache or default_cache()
    if path.is_file():
        return cache.fetch(path)
    names = _remote(path, "list", lambda fs, key: [name[len(key) :].strip("/") for name in fs.find(key)], RETRIES)
    return cache.fetch_folder(path, sorted(names))


def upload_folder(folder: pathlib.Path, path: Path, last: tuple[str, ...] = ()) -> None:
    """Upload all files of a local folder.

    Args:
      path: folder in a bucket.
      last: names of files by which readers tell that the folder is complete: they are uploaded after all others.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.name in last):
        _put(file, path / file.relative_to(folder).as_posix())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file between any of local disks and buckets; within gs:// or s3:// nothing passes through this machine.

    Raises:
      FileNotFoundError: no such file.
      StorageError: a bucket that cannot be read or written.
    """
    if is_remote(source) and is_remote(target):
        scheme, _, to = str(target).partition("://")
        if str(source).startswith(f"{scheme}://"):
            _remote(source, "copy", lambda fs, key: fs.cp_file(key, to), RETRIES)
            return
        with tempfile.TemporaryDirectory() as folder:
            here = pathlib.Path(folder, "file")
            copy_file(source, here)
            copy_file(here, target)
    elif is_remote(target):
        _put(pathlib.Path(source), target)
    elif is_remote(source):
        with local_file(target) as partial:
            _remote(source, "read", lambda fs, key: fs.get_file(key, str(partial)), RETRIES)
    else:
        with local_file(target) as partial:
            shutil.copyfile(source, partial)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it; nothing happens if it does not exist."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        _remote(path, "remove", lambda fs, key: fs.rm(key, recursive=True), RETRIES)


def move_tree(path: Path, target: Path) -> None:
    """Move a folder within its file system; in a bucket it is copied and removed."""
    if not is_remote(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        return
    names = _remote(path, "list", lambda fs, key: [name[len(key) :].strip("/") for name in fs.find(key)], RETRIES)
    for name in names:
        destination = str(target / name).partition("://")[2]
        _remote(path / name, "copy", lambda fs, key, to=destination: fs.cp_file(key, to), RETRIES)
    remove_tree(path)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A text file with a file descriptor, open for appending. In a bucket the file is written anew at the end."""
    if not is_remote(path):
        with path.open("a") as file:
            yield file
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        yield file
        file.flush()
        file.seek(0)
        write_text(path, (read_text(path) if path.exists() else "") + file.read())


def stamp(path: Path, retries: Retries = RETRIES) -> tuple[float, ...]:
    """What changes when a file is written again: size and time, and its number on a disk; raises as `read_bytes`."""
    if is_remote(path):
        stat = retries.call(path.stat, path, "read")
        return stat.length, stat.mtime
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def is_empty(path: Path) -> bool:
    """Whether a folder has no files, or does not exist."""
    return not path.is_dir() or next(iter(path.iterdir()), None) is None


def check_checkpoint_folder(path: str | os.PathLike[str]) -> None:
    """Check that Orbax can write to a folder in a bucket, by its name alone.

    Raises:
      ConfigError: it cannot.
    """
    if not os.fspath(path).startswith("gs://"):
        raise ConfigError(
            f"{path}: Orbax writes checkpoints to gs:// and to local folders only; use one of these, for example a "
            "mounted bucket (Mountpoint for S3 cannot rename: take a file system that can)."
        )


def check_run_directory(path: Path) -> None:
    """Check that a remote folder can hold a run: write a small file to it and remove it.

    Raises:
      ConfigError: checkpoints cannot be written there, or nothing can; the message names the cause.
    """
    check_checkpoint_folder(path)
    probe = path / f".jvgen-probe-{uuid.uuid4().hex[:8]}"
    try:
        _remote(probe, "write", lambda fs, key: fs.pipe_file(key, b"jvgen"), Retries(attempts=2))
        _remote(probe, "remove", lambda fs, key: fs.rm_file(key), Retries(attempts=2))
    except StorageError as error:
        raise ConfigError(str(error)) from error


def _put(file: pathlib.Path, path: Path) -> None:
    _remote(path, "write", lambda fs, key: fs.put_file(str(file), key), RETRIES)


def _remote(path: Path, verb: str, action: Callable[[Any, str], T], retries: Retries) -> T:
    import fsspec

    def attempt() -> T:
        fs, key = fsspec.core.url_to_fs(str(path))
        return action(fs, key)

    return retries.call(attempt, path, verb)
