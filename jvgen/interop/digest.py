"""Content hashes of weight files: whether a run resumes with the frozen weights that it started with."""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

from jvgen import storage
from jvgen.interop.weights_names import PICKLES, is_index
from jvgen.storage import Path, local_copy

CHUNK = 1 << 24
# Digests that an export has of its own files (`jvgen.interop.file_digests`); no part of the content.
DIGESTS_FILE = "jvgen_digests.json"
# For people, who edit it: it has no digest.
CARD_FILE = "README.md"
# Digests of files that were hashed before, in the folder of `jvgen.storage.default_cache`.
CACHE_FILE = "digests.json"
# Less is hashed faster than it is looked up.
MIN_CACHED_BYTES = 1 << 20
# A file that has just been written can change again without a new time of modification.
MIN_AGE_SECONDS = 2.0


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's .json and .safetensors files by name; without .safetensors also of pickles.

    The digest of large files is kept in the user's cache folder (`JVGEN_CACHE`) and taken from there as long as their
    names, sizes, times of modification and inodes stay what they are.

    Raises:
      ValueError: no such path.
    """
    given, path = path, local_copy(path)
    if not path.exists():
        raise ValueError(f"weights {str(given)!r}: no such file or folder.")
    # The index of shards stands for its folder.
    folder = path.parent if path.is_file() and is_index(path.name) else path
    files = [path] if folder.is_file() else content_files(folder)
    return _known_or_hashed(str(path.resolve()), files, _hash)


def file_digest(path: pathlib.Path, *, reread: bool = False) -> str:
    """SHA-256 of the bytes of a local file; from the cache as in `content_digest`, unless it is to be read again."""
    if reread:
        return _hash_bytes([path])
    # Another key than that of `content_digest`, which is also of the name.
    return _known_or_hashed(f"{path.resolve()} bytes", [path], _hash_bytes)


def content_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a local folder that `content_digest` is of, by name."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", *PICKLES))
    # Beside .safetensors, pickles are not read.
    pickles = () if any(p.suffix == ".safetensors" for p in files) else PICKLES
    return [p for p in files if p.suffix in (".json", ".safetensors", *pickles) and p.name != DIGESTS_FILE]


def _known_or_hashed(key: str, files: Sequence[Path], make: Callable[[Sequence[Path]], str]) -> str:
    """The digest of files from the cache, or made and added to it."""
    stats = [(file.name, file.stat()) for file in files]
    cacheable = sum(stat.st_size for _, stat in stats) >= MIN_CACHED_BYTES
    state = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats]
    if cacheable:
        known = _read_cache().get(key)
        if isinstance(known, dict) and known.get("files") == state:
            return known["digest"]
    digest = make(files)
    if cacheable and time.time() - max(stat.st_mtime for _, stat in stats) > MIN_AGE_SECONDS:
        _add_to_cache(key, {"files": state, "digest": digest})
    return digest


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _update(digest, file)
    return digest.hexdigest()


def _hash_bytes(files: Sequence[Path]) -> str:
    with files[0].open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _update(digest: "hashlib._Hash", file: Path) -> None:
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)


def _cache_file() -> pathlib.Path:
    return storage.default_cache().folder / CACHE_FILE


def _read_cache() -> dict[str, object]:
    try:
        cache = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _add_to_cache(key: str, entry: dict[str, object]) -> None:
    """Add an entry; one that another process adds at the same time may be lost, and is made again when needed."""
    file = _cache_file()
    # Without a cache folder that can be written, files are hashed at every start.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}-{os.getpid()}")
        partial.write_text(json.dumps(_read_cache() | {key: entry}, indent=1))
        partial.replace(file)
