"""Index files: columns as `.npy` arrays that readers map into memory, so that ten million rows open at once and all
processes of a machine share them. `.npy` because NumPy alone reads and maps it, and nothing else of Arrow is needed.

    index-train.json                     shards, digests, and where the columns are; replaced in one rename
    index-train/3f2a91c04e5b.npy         `.npy` arrays one after the other, named by their content and never changed

Arrays share a file because a mapped file keeps a file descriptor. Indices of 0.1.0, one `index-train.npz`, are read as
well.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path as LocalPath
from typing import Any, BinaryIO, Literal

import numpy as np

from jvgen import storage
from jvgen.data.store.array_files import READ_ERRORS
from jvgen.data.store.column_writer import CHUNK, HEADER, ColumnWriter
from jvgen.data.store.index import COLUMNS, NUMBERS, Column, CorruptIndex, Index, ShardInfo
from jvgen.data.store.strings import Strings, Text
from jvgen.storage import FileCache, Path, StorageError, as_path, default_cache, is_remote

FORMAT = 2  # of index files; incremented when older versions of jvgen cannot read them


def path_of(folder: str | Path, split: str) -> Path:
    """Path of the index of a split."""
    return as_path(folder) / f"index-{split}.json"


def load_index(folder: str | Path, split: str, cache: FileCache | None = None) -> Index:
    """Open the index of a split of a data set; copies of remote files are in `cache`.

    Sizes of the files are checked, and their content by `verify_index`.

    Raises:
      ValueError: no index, a file that is missing or damaged.
    """
    path = path_of(folder, split)
    if not path.is_file():
        path = path.with_suffix(".npz")
    if not path.is_file():
        raise ValueError(
            f"{folder}: the data set has no index-{split}.json, so it was not written by `jvgen data build` or is "
            "incomplete. Build it again."
        )
    path = storage.absolute(path)
    # Checks and training open the same data sets, one after the other. A process has the index in memory once.
    return _load(path, storage.stamp(path), cache)


def verify_index(index: Index, threads: int = 4) -> None:
    """Compare the files of an opened index with the digests that they were written with: about 1 GB/s a thread.

    Raises:
      CorruptIndex: names the file that differs.
    """
    if index.opened is None or index.opened[0] is not _mapped_again:
        return  # 0.1.0's are verified when they are read.
    path, cache = index.opened[1]
    arrays = [part for parts in _description(path)["arrays"].values() for part in parts.values()]
    spans = tuple((part["file"], part["offset"], part["bytes"], part["sha256"]) for part in arrays)
    stamps = tuple(storage.stamp(path.parent / name) for name in sorted({part["file"] for part in arrays}))
    _verify(path, spans, stamps, cache, threads)


@dataclasses.dataclass(frozen=True)
class IndexDraft:
    """Column files that no index names yet; `commit` makes them the index of the split, in one rename."""

    folder: LocalPath
    split: str
    description: dict[str, Any]

    def commit(self) -> Index:
        _write_description(path_of(self.folder, self.split), self.description)
        _remove_unused(self.folder, self.split)
        # Not kept open: a folder that is built is moved.
        return _mapped(path_of(self.folder, self.split), (), None)


def draft_index(
    folder: LocalPath,
    split: str,
    pieces: Iterable[Index],
    shards: Sequence[ShardInfo],
    checksums: Literal["content", "serialized"] = "content",
) -> IndexDraft:
    """Write the column files of a split of a local data set.

    Args:
      pieces: indices of consecutive rows; all of them together are never in memory.
      shards: files of the split.
      checksums: what the column `checksum` is of. "content": the fields of a record. "serialized": its bytes in the
        shard, in rows of 0.1.0; the fields, in rows that were appended since.

    Raises:
      ValueError: an id that occurs twice, or a column with numbers in one piece and texts in another.
    """
    target = folder / f"index-{split}"
    target.mkdir(exist_ok=True)
    writers = ColumnWriter(target)
    try:
        for piece in pieces:
            writers.append(piece)
        arrays = writers.finish()
    finally:
        writers.close()
    free = {name: "text" if "values" in parts else "number" for name, parts in arrays.items() if name not in COLUMNS}
    description: dict[str, Any] = {
        "format": FORMAT,
        "records": writers.rows,
        "digest": None,
        "checksums": checksums,
        "caption_names": writers.caption_names,
        "shards": [dataclasses.astuple(shard) for shard in shards],
        "columns": free,
        "arrays": arrays,
    }
    index = _index(path_of(folder, split), description, None)
    repeated = index.id.first_repeated()
    if repeated is not None:
        (folder / arrays["id"]["column"]["file"]).unlink()
        first, second = (_shard(shards, row) for row in repeated)
        raise ValueError(
            f"record id {index.id[repeated[0]]!r} occurs twice in split {split!r}, in {first} and in {second}; ids "
            "must be unique."
        )
    return IndexDraft(folder, split, {**description, "digest": index.computed_digest()})


def set_columns(folder: LocalPath, split: str, columns: Mapping[str, Column]) -> Index:
    """Add free columns to the index of a local data set, or replace those of these names; records stay as they are.

    The digest of the data set does not change, so runs resume.

    Raises:
      ValueError: as `load_index`; a column with another number of rows, or the name of one that every index has.
    """
    index = load_index(folder, split)
    for name, column in columns.items():
        if name in COLUMNS:
            raise ValueError(f"column {name}: every index has one of that name; use another name.")
        if len(column) != len(index):
            raise ValueError(f"column {name}: {len(column)} rows, {folder} [{split}] has {len(index)}.")
    if index.opened is None or index.opened[0] is not _mapped_again:
        raise ValueError(f"{folder}: its index is of 0.1.0; run `jvgen data upgrade {folder}` first.")
    description = _description(path_of(folder, split))
    writers = ColumnWriter(folder / f"index-{split}")
    try:
        for name, column in columns.items():
            writers.append_column(name, column)
        arrays = writers.finish()
    finally:
        writers.close()
    kinds = {name: "text" if isinstance(column, Text) else "number" for name, column in columns.items()}
    if _description(path_of(folder, split)) != description:
        raise ValueError(f"{folder} [{split}]: another process changed it meanwhile; nothing is written. Try again.")
    changed = {"columns": {**description["columns"], **kinds}, "arrays": {**description["arrays"], **arrays}}
    _write_description(path_of(folder, split), {**description, **changed})
    _remove_unused(folder, split)
    return load_index(folder, split)


def checksums_are_of_content(index: Index) -> bool:
    """Whether all checksums of an opened index are of fields of records, and none of bytes in the shard (0.1.0)."""
    if index.opened is None or index.opened[0] is not _mapped_again:
        return False
    return _description(index.opened[1][0])["checksums"] == "content"


@functools.lru_cache(maxsize=16)
def _load(path: Path, stamp: tuple[float, ...], cache: FileCache | None) -> Index:
    return _read_npz(path, stamp) if path.suffix == ".npz" else _mapped(path, stamp, cache)


def _mapped(path: Path, stamp: tuple[float, ...], cache: FileCache | None) -> Index:
    return _index(path, _description(path), (_mapped_again, (path, cache)))


def _mapped_again(path: Path, cache: FileCache | None) -> Index:
    return _load(path, storage.stamp(path), cache)


def _index(path: Path, description: Mapping[str, Any], opened: Any) -> Index:
    cache = opened[1][1] if opened else None
    rows, files = description["records"], {}

    def part(name: str, part: str = "column", count: int | None = rows) -> np.ndarray:
        span = description["arrays"].get(name, {}).get(part)
        if span is None:
            raise CorruptIndex(f"{path}: names no array for column {name}. Build the data set again.")
        file = path.parent / span["file"]
        if file not in files:
            files[file] = _map(file, cache)
        array = _array(file, files[file], span)
        if count is not None and len(array) != count:
            raise CorruptIndex(f"{file}: column {name} has {len(array)} rows, not {count}. Build the data set again.")
        return array

    starts = part("id", "starts", rows + 1)
    columns: dict[str, Column] = {}
    for name, kind in description["columns"].items():
        if kind == "text":
            columns[name] = Text(part(name, "codes"), Strings.of_content(part(name, "values", None)))
        else:
            columns[name] = part(name)
    return Index(
        id=Strings(part("id", count=int(starts[-1])), starts),
        **{name: part(name) for name in NUMBERS},
        columns=columns,
        caption_names=description["caption_names"],
        shards=tuple(ShardInfo(*shard) for shard in description["shards"]),
        opened=opened,
        saved_digest=description["digest"],
    )


def _map(path: Path, cache: FileCache | None) -> memoryview:
    try:
        # A mapped file can be read after the cache removed it.
        with _opened(path, cache) as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise CorruptIndex(f"{path}: no such file; the index needs it. Copy or build the data set again.") from error
    except ValueError as error:
        raise CorruptIndex(f"{path}: cannot be mapped ({error}). Build the data set again.") from error


@contextlib.contextmanager
def _opened(path: Path, cache: FileCache | None) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        local = stack.enter_context((cache or default_cache()).opening(path)) if is_remote(path) else path
        yield stack.enter_context(local.open("rb"))


def _array(path: Path, content: memoryview, span: Mapping[str, Any]) -> np.ndarray:
    array = content[span["offset"] + HEADER : span["offset"] + span["bytes"]]
    if len(array) + HEADER != span["bytes"]:
        raise CorruptIndex(f"{path}: ends early. Copy or build the data set again.")
    return np.frombuffer(array, span["dtype"]) if len(array) else np.zeros(0, span["dtype"])


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(storage.read_text(path))
        if description["format"] > FORMAT:
            raise CorruptIndex(
                f"{path}: format {description['format']}, of a later version of jvgen; this reads {FORMAT}."
            )
        saved = description.pop("sha256")
        if saved != _document_digest(description):
            raise ValueError("its content is not what was written")
    except (StorageError, CorruptIndex):
        raise
    except READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read as an index ({error}). Build the data set again.") from error
    return description


def _write_description(path: Path, description: dict[str, Any]) -> None:
    document = {**description, "sha256": _document_digest(description)}
    storage.write_text(path, json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


def _remove_unused(folder: LocalPath, split: str) -> None:
    """Remove column files of earlier indices; who has them mapped can go on reading them."""
    used = {
        span["file"] for parts in _description(path_of(folder, split))["arrays"].values() for span in parts.values()
    }
    for file in (folder / f"index-{split}").glob("*.npy"):
        if f"{file.parent.name}/{file.name}" not in used:
            file.unlink()


def _document_digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _verify(
    path: Path,
    arrays: tuple[tuple[str, int, int, str], ...],
    stamps: tuple[tuple[float, ...], ...],
    cache: FileCache | None,
    threads: int,
) -> None:
    """`stamps` tell files from others that were at their paths before: a process verifies each once."""

    def check(span: tuple[str, int, int, str]) -> None:
        name, offset, size, digest = span
        state, left = hashlib.sha256(), size
        # Read, not mapped: pages that are read once would count as memory of the process.
        with _opened(path.parent / name, cache) as file:
            file.seek(offset)
            while left and (chunk := file.read(min(left, CHUNK))):
                state.update(chunk)
                left -= len(chunk)
        if state.hexdigest() != digest:
            raise CorruptIndex(
                f"{path.parent / name}: corrupt; its content is not what was written. Build the data set again."
            )

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(check, arrays))


def _read_npz(path: Path, stamp: tuple[float, ...]) -> Index:
    """The index in a file of 0.1.0, whose digest is computed again: it takes a minute for ten million records."""
    try:
        content = io.BytesIO(storage.read_bytes(path))
        with np.load(content, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in COLUMNS}
            digest = str(stored["digest"])
        index = Index(**columns, opened=(_npz_again, (path,)))
    except StorageError:
        raise
    except READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read as an index ({error}). Build the data set again.") from error
    if index.digest != digest:
        raise CorruptIndex(
            f"{path}: corrupt; its digest is {index.digest[:12]}, but {digest[:12]} was written. "
            "Build the data set again."
        )
    return index


def _npz_again(path: Path) -> Index:
    return _load(path, storage.stamp(path), None)


def _shard(shards: Sequence[ShardInfo], row: int) -> str:
    for shard in shards:
        if row < shard.records:
            return shard.file
        row -= shard.records
    return "another file"
