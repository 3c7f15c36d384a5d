"""Index files: columns as `.npy` arrays that readers map into memory, so that ten million rows open at once and all
processes of a machine share them. `.npy` because NumPy alone reads and maps it, and nothing else of Arrow is needed.

    index-train.json                     shards, digests, and where the columns are; replaced in one rename
    index-train/3f2a91c04e5b.npy         `.npy` arrays one after the other, named by their content and never changed

Arrays share a file because a mapped file keeps a file descriptor. Indices of 0.1.0, one `index-train.npz`, are read as
well. Rows of a single shard are kept in such a file, too.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path as LocalPath
from typing import Any, BinaryIO, Literal

import numpy as np

from jvgen import storage
from jvgen.data.store.index import COLUMNS, NUMBERS, Column, Index, ShardInfo
from jvgen.data.store.strings import Strings, Text
from jvgen.storage import FileCache, Path, StorageError, as_path, default_cache, is_remote

FORMAT = 2  # of index files; incremented when older versions of jvgen cannot read them
_HEADER = 128  # bytes before the content of an array in a .npy file
_ALIGNMENT = 64
_CHUNK = 1 << 20  # rows, or bytes, moved at a time
# What reading a corrupt npz or json raises.
_READ_ERRORS = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, SyntaxError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


class CorruptIndex(ValueError):
    """An index file that is damaged, incomplete or of a later version; the message names it."""


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
    _verify(
        path, tuple((part["file"], part["offset"], part["bytes"], part["sha256"]) for part in arrays), cache, threads
    )


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
      checksums: what the column `checksum` is of: the fields of a record, or its bytes in the shard (0.1.0).

    Raises:
      ValueError: an id that occurs twice, or a column with numbers in one piece and texts in another.
    """
    target = folder / f"index-{split}"
    target.mkdir(exist_ok=True)
    writers = _Writers(target)
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
    writers = _Writers(folder / f"index-{split}")
    try:
        for name, column in columns.items():
            writers.append_column(name, column)
        arrays = writers.finish()
    finally:
        writers.close()
    kinds = {name: "text" if isinstance(column, Text) else "number" for name, column in columns.items()}
    changed = {"columns": {**description["columns"], **kinds}, "arrays": {**description["arrays"], **arrays}}
    _write_description(path_of(folder, split), {**description, **changed})
    _remove_unused(folder, split)
    return load_index(folder, split)


def save_rows(path: LocalPath, index: Index, **more: Any) -> None:
    """Write the rows of one shard, with JSON values of your own, into one file."""
    arrays: dict[str, np.ndarray] = {name: getattr(index, name) for name in NUMBERS}
    arrays["id"] = index.id.content
    for name, column in index.columns.items():
        if isinstance(column, Text):
            arrays |= {f"column.{name}.codes": column.codes, f"column.{name}.values": column.values.content}
        else:
            arrays[f"column.{name}"] = column
    document = {**more, "digest": index.digest, "caption_names": dict(index.caption_names), "arrays": _sha256(arrays)}
    content = io.BytesIO()
    np.savez(content, document=np.str_(json.dumps(document, sort_keys=True)), **arrays)
    storage.write_bytes(path, content.getvalue())


def load_rows(path: Path) -> tuple[Index, dict[str, Any]]:
    """What `save_rows` wrote.

    Raises:
      CorruptIndex: the file cannot be read, or its content is not what was written.
    """
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as stored:
            document = json.loads(str(stored["document"]))
            arrays = {name: stored[name] for name in stored.files if name != "document"}
        if _sha256(arrays) != document["arrays"]:
            raise ValueError("its content is not what was written")
        columns: dict[str, Column] = {}
        for name in arrays:
            kind, _, rest = name.partition(".")
            if kind == "column" and rest.endswith(".codes"):
                values = _strings(arrays[name.removesuffix("codes") + "values"])
                columns[rest.removesuffix(".codes")] = Text(arrays[name], values)
            elif kind == "column" and not rest.endswith(".values"):
                columns[rest] = arrays[name]
        index = Index(
            id=_strings(arrays["id"]),
            **{name: arrays[name] for name in NUMBERS},
            columns=columns,
            caption_names=document["caption_names"],
            saved_digest=document["digest"],
        )
    except StorageError:
        raise
    except _READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read as the rows of a shard ({error}). Make the shard again.") from error
    return index, document


def checksums_are_of_content(index: Index) -> bool:
    """Whether the checksums of an opened index are of fields of records, not of their bytes in the shard (0.1.0)."""
    if index.opened is None or index.opened[0] is not _mapped_again:
        return False
    return _description(index.opened[1][0])["checksums"] == "content"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays to a file, completely or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    storage.write_bytes(path, content.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote; raises `CorruptIndex`."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except StorageError:
        raise
    except _READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read ({error}). Remove it.") from error


class _Writers:
    """The column files of a folder while they are written, a piece of the rows after the other."""

    def __init__(self, folder: LocalPath):
        self.folder = folder
        self.rows = 0
        self.caption_names: dict[str, int] = {}
        self._files: dict[tuple[str, str], _ColumnFile] = {}
        self._codes: dict[str, dict[str, int]] = {}  # of texts in the order in which they came
        self._id_bytes = 0

    def append(self, piece: Index) -> None:
        for start in range(0, len(piece), _CHUNK):
            part = slice(start, start + _CHUNK)
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
        partial = self.folder / f".{os.getpid()}.partial"
        with partial.open("wb") as target:
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
        partial.replace(self.folder.parent / name)
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
        for file in self._files.values():
            file.close()

    def _free_numbers(self) -> set[str]:
        return {name for name, part in self._files if part == "column" and name not in COLUMNS}

    def _file(self, name: str, part: str = "column") -> "_ColumnFile":
        if (name, part) not in self._files:
            self._files[name, part] = _ColumnFile(self.folder, name if part == "column" else f"{name}.{part}")
        return self._files[name, part]


class _ColumnFile:
    """A one-dimensional .npy file that is written a piece at a time."""

    def __init__(self, folder: LocalPath, name: str):
        self._path = folder / f".{name}.{os.getpid()}.partial"
        self._name, self._file = name, self._path.open("wb+")
        self._file.write(b"\0" * _HEADER)
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
        for start in range(0, count, _CHUNK):
            self.write(np.full(min(_CHUNK, count - start), value, dtype))

    def map(self, table: np.ndarray) -> None:
        """Replace each code by its element of a table."""
        self._file.flush()
        if self.count:
            codes = np.memmap(self._path, table.dtype, "r+", _HEADER, (self.count,))
            for start in range(0, self.count, _CHUNK):
                codes[start : start + _CHUNK] = table[codes[start : start + _CHUNK]]
            codes.flush()

    def copy_to(self, target: BinaryIO) -> tuple[int, str]:
        """Write the header, and copy all to a file; returns the bytes and their SHA-256."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"shape": (self.count,), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(self.dtype)}
        )
        assert header.tell() == _HEADER
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.seek(0)
        size, state = 0, hashlib.sha256()
        while chunk := self._file.read(_CHUNK):
            target.write(chunk)
            state.update(chunk)
            size += len(chunk)
        return size, state.hexdigest()

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


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
            columns[name] = Text(part(name, "codes"), _strings(part(name, "values", None)))
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
    array = content[span["offset"] + _HEADER : span["offset"] + span["bytes"]]
    if len(array) + _HEADER != span["bytes"]:
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
    except _READ_ERRORS as error:
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
def _verify(path: Path, arrays: tuple[tuple[str, int, int, str], ...], cache: FileCache | None, threads: int) -> None:
    def check(span: tuple[str, int, int, str]) -> None:
        name, offset, size, digest = span
        state, left = hashlib.sha256(), size
        # Read, not mapped: pages that are read once would count as memory of the process.
        with _opened(path.parent / name, cache) as file:
            file.seek(offset)
            while left and (chunk := file.read(min(left, _CHUNK))):
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
    except _READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read as an index ({error}). Build the data set again.") from error
    if index.digest != digest:
        raise CorruptIndex(
            f"{path}: corrupt; its digest is {index.digest[:12]}, but {digest[:12]} was written. "
            "Build the data set again."
        )
    return index


def _npz_again(path: Path) -> Index:
    return _load(path, storage.stamp(path), None)


def _strings(content: np.ndarray) -> Strings:
    return Strings(content, np.concatenate([np.zeros(1, np.int64), np.flatnonzero(content == 0) + 1]))


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        state.update(np.ascontiguousarray(arrays[name]))
    return state.hexdigest()


def _shard(shards: Sequence[ShardInfo], row: int) -> str:
    for shard in shards:
        if row < shard.records:
            return shard.file
        row -= shard.records
    return "another file"
