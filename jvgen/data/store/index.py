"""The index of a split: one row per record, in columns, so that plans are made without reading records."""

import dataclasses
import functools
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np

from jvgen import storage
from jvgen.data.store.records import KINDS, Record
from jvgen.storage import Path, StorageError, as_path

# Columns and dtypes on disk. `checksum` makes the digest depend on the content of the records.
COLUMNS = {
    "id": np.str_,
    "kind": np.uint8,
    "frames": np.int32,
    "height": np.int32,
    "width": np.int32,
    "views": np.int32,
    "frames_per_second": np.float32,
    "has_camera": np.bool_,
    "has_action": np.bool_,
    "captions": np.int32,
    "latent_frames": np.int32,
    "checksum": np.uint64,
}

# What reading a corrupt npz raises.
_READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Columns of equal length; row r describes record r of the split.

    Attributes:
      id: record ids (numpy unicode).
      kind: index into `jvgen.data.store.records.KINDS`.
      frames, height, width, views: int32.
      frames_per_second: float32, 0 for images.
      has_camera, has_action: bool.
      captions: int32, number of captions.
      latent_frames: int32, frames of the cached latents, 0 without.
      checksum: uint64 of the record's serialized bytes.
    """

    id: np.ndarray
    kind: np.ndarray
    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    views: np.ndarray
    frames_per_second: np.ndarray
    has_camera: np.ndarray
    has_action: np.ndarray
    captions: np.ndarray
    latent_frames: np.ndarray
    checksum: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in COLUMNS.items():
            column = np.asarray(getattr(self, name))
            if name != "id":
                column = column.astype(dtype, copy=False)
            elif column.dtype.kind != "U":
                column = column.astype(np.str_)
            assert column.shape == (len(self),), f"column {name} has shape {column.shape}, not ({len(self)},)"
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.id)

    @functools.cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over all columns: equal for the same records in the same order."""
        state = hashlib.sha256()
        for name in COLUMNS:
            column = getattr(self, name)
            state.update(f"{name}:{len(self)}\n".encode())
            # Joined, not raw: the width of a numpy string column is not a property of the data.
            state.update(
                "\0".join(column.tolist()).encode() if name == "id" else np.ascontiguousarray(column).tobytes()
            )
        return state.hexdigest()

    def kind_name(self, row: int) -> str:
        """Name of the kind of a row."""
        return KINDS[int(self.kind[row])]

    @classmethod
    def of(cls, rows: Iterable[tuple[Record, int]]) -> "Index":
        """The index of (record, checksum) pairs, in the given order."""
        lists: dict[str, list] = {name: [] for name in COLUMNS}
        for record, checksum in rows:
            for name, value in describe(record, checksum).items():
                lists[name].append(value)
        return cls.of_columns(lists)

    @classmethod
    def of_columns(cls, columns: dict[str, list]) -> "Index":
        """The index of one list per column."""
        return cls(**{name: np.asarray(columns[name], dtype) for name, dtype in COLUMNS.items()})

    def take(self, rows: np.ndarray) -> "Index":
        """The index of the given rows."""
        return Index(**{name: getattr(self, name)[rows] for name in COLUMNS})

    def save(self, folder: str | Path, split: str) -> Path:
        """Write `index-<split>.npz` into the folder and return its path."""
        path = path_of(folder, split)
        with storage.local_file(path) as partial, partial.open("wb") as file:
            np.savez(file, digest=np.str_(self.digest), **{name: getattr(self, name) for name in COLUMNS})
        return path

    @classmethod
    def load(cls, folder: str | Path, split: str) -> "Index":
        """Read the index of a split of a data set.

        Raises:
          ValueError: no index, missing columns, or a digest that does not match the content.
        """
        path = path_of(folder, split)
        if not path.is_file():
            raise ValueError(
                f"{folder}: the data set has no {path.name}, so it was not written by `jvgen data build` or is "
                "incomplete. Build it again."
            )
        return _read(storage.absolute(path), storage.stamp(path))

    @classmethod
    def _read_verified(cls, path: Path) -> "Index":
        """The index in a file, whose digest is computed again: it takes a minute for ten million records."""
        try:
            content = io.BytesIO(storage.read_bytes(path))
            with np.load(content, allow_pickle=False) as stored:
                columns = {name: stored[name] for name in COLUMNS}
                digest = str(stored["digest"])
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise ValueError(f"{path}: cannot be read as an index ({error}). Build the data set again.") from error
        index = cls(**columns)
        if index.digest != digest:
            raise ValueError(
                f"{path}: corrupt; its digest is {index.digest[:12]}, but {digest[:12]} was written. "
                "Build the data set again."
            )
        return index


# Checks and training open the same data sets, one after the other. A process has the index in memory once.
@functools.lru_cache(maxsize=16)
def _read(path: Path, stamp: tuple[float, ...]) -> Index:
    return Index._read_verified(path)


def path_of(folder: str | Path, split: str) -> Path:
    """Path of the index of a split."""
    return as_path(folder) / f"index-{split}.npz"


def describe(record: Record, checksum: int) -> dict[str, object]:
    """The row of one record."""
    return {
        "id": record.id,
        "kind": KINDS.index(record.kind),
        "frames": record.frames,
        "height": record.height,
        "width": record.width,
        "views": record.views,
        "frames_per_second": record.frames_per_second,
        "has_camera": record.has_camera,
        "has_action": record.has_action,
        "captions": len(record.captions),
        "latent_frames": record.latents.shape[1] if record.latents.size else 0,
        "checksum": checksum,
    }


def checksum_of(serialized: bytes) -> int:
    """64-bit checksum of a record's serialized bytes."""
    return int.from_bytes(hashlib.blake2b(serialized, digest_size=8).digest(), "little")
