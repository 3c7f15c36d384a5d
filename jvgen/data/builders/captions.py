"""Reads captions of media files: one table per folder, or one text file per clip."""

import contextlib
import csv
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jvgen import storage
from jvgen.data.builders.recorded_files import Ambiguous, Names, name_of
from jvgen.data.store.index import COLUMNS
from jvgen.data.store.records import MAX_TEXT

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl")
ACCEPTED = (
    "captions.csv or captions.tsv with the columns file,caption; captions.jsonl with "
    '{"file": ..., "caption": "..." or ["...", ...]} on each line; or <clip>.txt beside each clip, one caption per line'
)
_SHOWN = 10  # of a list of mistakes
_LONGEST_CELL = 16 << 20  # characters
# 007 is a name: as a number it would lose its zeros.
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")


class Captions(NamedTuple):
    """What is known of files besides their pixels.

    Attributes:
      texts: captions by file; files without captions are left out.
      columns: by file, the other columns of the table.
      unreadable: by file, why its text file cannot be read.
      unmatched: rows of the table that name no file.
      warning: how many these are, with an example; "" without any.
    """

    texts: dict[Path, tuple[str, ...]]
    columns: dict[Path, dict[str, Any]] = {}
    unreadable: dict[Path, str] = {}
    unmatched: int = 0
    warning: str = ""


class Row(NamedTuple):
    """One row of a table: its line, and its cells by column."""

    line: int
    cells: Mapping[str, Any]


def read_captions(
    folder: Path, files: Iterable[Path], table: Path | None = None, *, optional: bool = False
) -> Captions:
    """Captions of media files, and the other columns of the table.

    Args:
      folder: file names in a table are relative to it; see `jvgen.data.builders.recorded_files.Names`.
      files: the media files in the folder.
      table: captions table; by default one of `TABLES` in the folder.
      optional: do not require any captions.

    Raises:
      ValueError: no captions, a table that cannot be read, names that fit several files, or a table that lists none of
        the files.
    """
    files = list(files)
    if table is None:
        table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    elif not table.is_file():
        raise ValueError(f"captions = {str(table)!r}: no such file. Accepted: {ACCEPTED}.")
    if table is not None:
        return _from_table(folder, files, _rows(table), table)
    found, unreadable = {}, {}
    for file in files:
        beside = file.with_suffix(".txt")
        if beside.is_file():
            try:
                text = storage.read_utf8(beside)
            except storage.UnreadableFile as error:
                unreadable[file] = str(error)
                continue
            # str.splitlines would also split at characters that captions may have (U+2028, U+0085).
            lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
            if any(lines):
                found[file] = tuple(line for line in lines if line)
    if not found and not unreadable and not optional:
        raise ValueError(
            f"{folder} has no captions. Accepted: {ACCEPTED}. Or declare captions optional (--captions-optional)."
        )
    return Captions(found, unreadable=unreadable)


def _rows(table: Path) -> list[Row]:
    if table.suffix == ".jsonl":
        return read_jsonl(table)
    if table.suffix not in (".csv", ".tsv"):
        raise ValueError(f"captions = {str(table)!r}: a .csv, .tsv or .jsonl file. Accepted: {ACCEPTED}.")
    return read_csv(table, ("file", "caption"), delimiter="\t" if table.suffix == ".tsv" else ",")


def read_jsonl(table: Path) -> list[Row]:
    """The rows that `iterate_jsonl` finds."""
    return list(iterate_jsonl(table))


def iterate_jsonl(table: Path) -> Iterator[Row]:
    """The objects of a table with one JSON object per line.

    Raises:
      UnreadableFile: not UTF-8.
      ValueError: a line that is not an object.
    """
    # Strings in JSON may have the characters at which Python splits lines besides line feeds.
    with _text(table, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{table}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {number}: needs a file and a caption, got {row!r}.")
            yield Row(number, row)


def read_csv(table: Path, columns: Sequence[str], delimiter: str = ",") -> list[Row]:
    """The rows that `iterate_csv` finds."""
    return list(iterate_csv(table, columns, delimiter))


def iterate_csv(table: Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[Row]:
    """The rows of a table whose first line names the columns.

    Raises:
      UnreadableFile: not UTF-8, or not a table: a quote that is not closed or followed by text.
      ValueError: it lacks a column, or rows have more or fewer cells than columns; names the lines, at the end.
    """
    wrong = []
    names: list[str] = []
    # Cells with the captions and times of all parts of a long video are longer than the 128 KiB of Python's default.
    csv.field_size_limit(_LONGEST_CELL)
    # Cells may have line breaks, so lines are not split before.
    with _text(table, newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        line = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                fix = "Save it again as CSV, with quotes in cells doubled."
                raise storage.unreadable(table, "is not a table of text", f"line {line}: {error}", fix) from error
            if cells is None:
                break
            if not names:
                names = cells
                if not set(columns) <= set(names):
                    break
            elif cells and len(cells) != len(names):
                wrong.append(f"line {line} has {len(cells)} cells")
            elif cells:
                yield Row(line, dict(zip(names, cells, strict=True)))
            line = reader.line_num + 1
    if not set(columns) <= set(names):
        missing = next(name for name in columns if name not in names)
        near = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
        hint = f" Is {near[0]!r} meant to be {missing!r}?" if near else ""
        raise ValueError(f"{table}: its columns are {names}; it needs {' and '.join(columns)}.{hint}")
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"{table}: {', '.join(wrong[:_SHOWN])}{more}, for {len(names)} columns ({', '.join(names)}). Put "
            f"cells with {'tabs' if delimiter != ',' else 'commas'} in double quotes."
        )


@contextlib.contextmanager
def _text(path: Path, newline: str) -> Iterator[TextIO]:
    """A text file that may be larger than memory.

    Raises:
      UnreadableFile: not UTF-8; names the line.
    """
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError:
            storage.read_utf8(path)
            raise


def other_columns(rows: Sequence[Row], used: Sequence[str]) -> list[dict[str, Any]]:
    """The columns of each row besides those that are used, as numbers where all cells of a column are numbers.

    Names get lower-case letters, digits and underscores. Empty cells, NaN among numbers, and texts too long for a
    column, are left out.

    Raises:
      ValueError: two columns that would have the same name.
    """
    written: dict[str, str] = {}
    for column in dict.fromkeys(name for row in rows for name in row.cells if name not in used):
        other = written.setdefault(column_name(column), column)
        if other != column:
            raise ValueError(f"columns {other!r} and {column!r} are both {column_name(column)!r}: rename one of them.")
    names = {column: name for name, column in written.items()}
    kept = [{names[k]: v for k, v in row.cells.items() if k not in used and not is_missing(v)} for row in rows]
    texts = {name for cells in kept for name, value in cells.items() if _number(value) is None}
    return [
        {
            name: str(value) if name in texts else _number(value)
            for name, value in cells.items()
            if (len(str(value)) <= MAX_TEXT if name in texts else not math.isnan(_number(value)))
        }
        for cells in kept
    ]


def is_missing(cell: Any) -> bool:
    """Whether a cell has no value: NaN is what Python's tables write for texts, too."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def column_name(written: str) -> str:
    """The name of a column of a data set: lower-case letters, digits and underscores, and none that every one has."""
    name = re.sub(r"[^a-z0-9]+", "_", str(written).lower()).strip("_")
    return name if name[:1].isalpha() and name not in COLUMNS else f"table_{name}"


def _number(value: Any) -> float | None:
    """A cell as a number; None for texts, such as identifiers that Python would read as a number or would round."""
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) or abs(value) <= 2**53 else None
    written = value.strip().lower() if isinstance(value, str) else ""
    if written == "nan":
        return math.nan
    if not _NUMBER.fullmatch(written) or (_INTEGER.fullmatch(written) and abs(int(written)) > 2**53):
        return None
    return float(written)


def _from_table(folder: Path, files: list[Path], rows: list[Row], table: Path) -> Captions:
    by_name = {name_of(file, folder): file for file in files}
    names = Names(list(by_name))
    texts: dict[Path, list[str]] = {}
    columns: dict[Path, dict[str, Any]] = {}
    unmatched, ambiguous = [], []
    try:
        others_of = other_columns(rows, ("file", "caption"))
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from None
    for row, others in zip(rows, others_of, strict=True):
        if not row.cells.get("file") or "caption" not in row.cells:
            raise ValueError(f"{table}, line {row.line}: needs a file and a caption, got {dict(row.cells)!r}.")
        try:
            found = names.find(str(row.cells["file"]))
        except Ambiguous as error:
            ambiguous.append(f"line {row.line}: {error}")
            continue
        if found is None:
            unmatched.append(str(row.cells["file"]))
            continue
        caption = row.cells["caption"]
        listed = caption if isinstance(caption, list) else [caption]
        kept = [str(text).strip() for text in listed if text and not is_missing(text) and str(text).strip()]
        texts.setdefault(by_name[found], []).extend(kept)
        columns.setdefault(by_name[found], {}).update(others)
    if ambiguous:
        raise ValueError(f"{table}: {len(ambiguous)} rows fit several files:\n  " + "\n  ".join(ambiguous[:_SHOWN]))
    if files and not texts:
        raise ValueError(
            f"{table} lists none of the {len(files)} files in {folder}: it has "
            f"{', '.join(unmatched[:3]) or 'no rows'}, the folder {', '.join(file.name for file in files[:3])}."
        )
    warning = ""
    if unmatched:
        warning = f"{len(unmatched)} of {len(rows)} rows of {table} name none of the files, such as {unmatched[0]!r}"
    texts = {file: tuple(found) for file, found in texts.items() if found}
    return Captions(texts, columns, unmatched=len(unmatched), warning=warning)
