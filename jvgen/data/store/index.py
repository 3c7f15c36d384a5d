"""The index of a split: one row per record, in columns, so that plans are made without reading records."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jvgen.data.store.records import KINDS, Record
from jvgen.data.store.strings import Strings, Text

# The columns that every index has, and their dtypes. `checksum` makes the digest depend on the content of the records.
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
NUMBERS = tuple(name for name in COLUMNS if name != "id")

Column = np.ndarray | Text


class CorruptIndex(ValueError):
    """An index file that is damaged, incomplete or of a later version; the message names it."""


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One file of a split.

    Attributes:
      file: its name, in the folder of the data set.
      records: how many it has.
      bytes: of its records.
      digest: `Index.digest` of its rows; "" where it is not known.
    """

    file: str
    records: int
    bytes: int
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Columns of equal length; row r describes record r of the split.

    Opened from a folder they are mapped into memory, and a pickled copy opens the folder again.

    Attributes:
      id: record ids.
      kind: index into `jvgen.data.store.records.KINDS`.
      frames, height, width, views: int32.
      frames_per_second: float32, 0 for images.
      has_camera, has_action: bool.
      captions: int32, number of captions.
      latent_frames: int32, frames of the cached latents, 0 without.
      checksum: uint64 of the record's content.
      columns: free columns by name: float64 with NaN where a value is missing, or texts with "".
      caption_names: number of captions by name (`Record.caption_names`).
      shards: files of the split, in order; empty if the data set's own metadata names them.
      opened: function and arguments that open the index again; None for one that is not on disk.
    """

    id: Strings
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
    columns: Mapping[str, Column] = dataclasses.field(default_factory=dict)
    caption_names: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shards: tuple[ShardInfo, ...] = ()
    opened: tuple[Callable[..., "Index"], tuple[Any, ...]] | None = None
    saved_digest: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, Strings):
            object.__setattr__(self, "id", Strings.of(np.asarray(self.id, np.str_).tolist()))
        for name in NUMBERS:
            column = np.asarray(getattr(self, name)).astype(COLUMNS[name], copy=False)
            assert column.shape == (len(self),), f"column {name} has shape {column.shape}, not ({len(self)},)"
            object.__setattr__(self, name, column)
        for name, column in self.columns.items():
            assert len(column) == len(self), f"column {name} has {len(column)} rows, not {len(self)}"

    def __len__(self) -> int:
        return len(self.id)

    @functools.cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over the columns that every index has: equal for the same records in the same order."""
        return self.saved_digest or self.computed_digest()

    def computed_digest(self) -> str:
        """As `digest`, from the content also if it was saved with the index."""
        state = hashlib.sha256()
        for name in COLUMNS:
            state.update(f"{name}:{len(self)}\n".encode())
            # Joined, not raw: how ids are stored is not a property of the data.
            state.update(self.id.joined if name == "id" else np.ascontiguousarray(getattr(self, name)))
        return state.hexdigest()

    def kind_name(self, row: int) -> str:
        """Name of the kind of a row."""
        return KINDS[int(self.kind[row])]

    def values(self, row: int) -> dict[str, float | str]:
        """What the free columns have for a row, without missing values."""
        found = {name: column[row] for name, column in self.columns.items()}
        found = {name: value if isinstance(value, str) else float(value) for name, value in found.items()}
        return {name: value for name, value in found.items() if value == value and value != ""}

    def describes(self, row: int, record: Record) -> bool:
        """Whether a row may be that of a record: all columns agree but the checksum, which takes long to compute."""
        facts = {name: value for name, value in _described(record, 0).items() if name != "checksum"}
        return all(getattr(self, name)[row] == COLUMNS[name](value) for name, value in facts.items())

    @classmethod
    def of(cls, rows: Iterable[tuple[Record, int]]) -> "Index":
        """The index of (record, checksum) pairs, in the given order."""
        lists = RowLists()
        for record, checksum in rows:
            lists.add(record, checksum)
        return lists.index()

    def take(self, rows: np.ndarray | slice) -> "Index":
        """The index of the given rows."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Index(**{name: getattr(self, name)[rows] for name in COLUMNS}, columns=columns)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.opened is not None:
            function, arguments = self.opened
            return _reopened, (function, arguments, self.digest)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _rebuilt, (fields,)


class RowLists:
    """Collects rows of records."""

    def __init__(self) -> None:
        self._rows: dict[str, list] = {name: [] for name in COLUMNS}
        self._columns: dict[str, list] = {}
        self._types: dict[str, tuple[Any, str]] = {}  # a value of each column, and its record
        self._caption_names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows["id"])

    def add(self, record: Record, checksum: int) -> None:
        """Append the row of a record.

        Raises:
          ValueError: a free column with the name of another one, or a number and texts in one column.
        """
        for name, value in record.columns.items():
            self._check(record, name, value)
        for name, value in _described(record, checksum).items():
            self._rows[name].append(value)
        for name in record.columns.keys() - self._columns.keys():
            self._columns[name] = [None] * (len(self) - 1)
        for name, column in self._columns.items():
            column.append(record.columns.get(name))
        for name in record.caption_names:
            self._caption_names[name] = self._caption_names.get(name, 0) + 1

    def index(self) -> Index:
        """The index of the rows so far."""
        rows: dict[str, Any] = {name: np.asarray(self._rows[name], COLUMNS[name]) for name in NUMBERS}
        columns = {name: _column(values) for name, values in sorted(self._columns.items())}
        return Index(id=Strings.of(self._rows["id"]), **rows, columns=columns, caption_names=self._caption_names)

    def _check(self, record: Record, name: str, value: Any) -> None:
        if name in COLUMNS:
            raise ValueError(
                f"record {record.id!r}: column {name}: every index has one of that name; use another name."
            )
        if value is None or value == "":
            return
        other, where = self._types.setdefault(name, (value, record.id))
        if isinstance(other, str) != isinstance(value, str):
            raise ValueError(
                f"column {name}: {value!r} in record {record.id!r} and {other!r} in {where!r}; a column has either "
                "numbers or texts."
            )


def _column(values: list) -> Column:
    if any(isinstance(value, str) and value for value in values):
        return Text.of(value or "" for value in values)
    return np.array([np.nan if value is None or value == "" else float(value) for value in values], np.float64)


def _described(record: Record, checksum: int) -> dict[str, object]:
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


def _reopened(function: Callable[..., Index], arguments: tuple[Any, ...], digest: str) -> Index:
    index = function(*arguments)
    if index.digest != digest:
        raise ValueError(
            f"{arguments[0]}: the data set was changed while a run was reading it (digest {index.digest[:12]}, was "
            f"{digest[:12]}); start the run again."
        )
    return index


def _rebuilt(fields: dict[str, Any]) -> Index:
    return Index(**fields)
