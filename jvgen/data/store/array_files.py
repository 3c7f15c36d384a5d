"""Named arrays in one `.npz` file: the rows of a shard that is not part of a data set yet, results of long work."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen import storage
from jvgen.data.store.index import NUMBERS, Column, CorruptIndex, Index
from jvgen.data.store.strings import Strings, Text
from jvgen.storage import Path, StorageError

# What reading a corrupt npz or json raises.
READ_ERRORS = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, SyntaxError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def save_rows(path: Path, index: Index, **more: Any) -> None:
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
                values = Strings.of_content(arrays[name.removesuffix("codes") + "values"])
                columns[rest.removesuffix(".codes")] = Text(arrays[name], values)
            elif kind == "column" and not rest.endswith(".values"):
                columns[rest] = arrays[name]
        index = Index(
            id=Strings.of_content(arrays["id"]),
            **{name: arrays[name] for name in NUMBERS},
            columns=columns,
            caption_names=document["caption_names"],
            saved_digest=document["digest"],
        )
    except StorageError:
        raise
    except READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read as the rows of a shard ({error}). Make the shard again.") from error
    return index, document


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
    except READ_ERRORS as error:
        raise CorruptIndex(f"{path}: cannot be read ({error}). Remove it.") from error


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        state.update(np.ascontiguousarray(arrays[name]))
    return state.hexdigest()
