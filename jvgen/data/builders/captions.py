"""Reads captions of media files: one table per folder, or one text file per clip."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jvgen import storage

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl")
ACCEPTED = (
    "captions.csv or captions.tsv with the columns file,caption; captions.jsonl with "
    '{"file": ..., "caption": "..." or ["...", ...]} on each line; or <clip>.txt beside each clip, one caption per line'
)


def read_captions(
    folder: Path, files: Iterable[Path], table: Path | None = None, *, optional: bool = False
) -> dict[Path, tuple[str, ...]]:
    """Captions of media files.

    Args:
      folder: file names in a table are relative to it (bare names and names without extension match too).
      files: the media files in the folder.
      table: captions table; by default one of `TABLES` in the folder.
      optional: do not require any captions.

    Returns:
      Captions by file; files without captions are left out.

    Raises:
      ValueError: no captions, a table that cannot be read, or a table that lists none of the files.
    """
    files = list(files)
    if table is None:
        table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    elif not table.is_file():
        raise ValueError(f"captions = {str(table)!r}: no such file. Accepted: {ACCEPTED}.")
    if table is not None:
        return _from_table(folder, files, _read_table(table), table)
    found = {}
    for file in files:
        beside = file.with_suffix(".txt")
        if beside.is_file():
            lines = [line.strip() for line in storage.read_utf8(beside).splitlines()]
            if any(lines):
                found[file] = tuple(line for line in lines if line)
    if not found and not optional:
        raise ValueError(
            f"{folder} has no captions. Accepted: {ACCEPTED}. Or declare captions optional (--captions-optional)."
        )
    return found


def _read_table(table: Path) -> dict[str, list[str]]:
    """Captions by file name as written in the table."""
    rows: dict[str, list[str]] = {}
    text = storage.read_utf8(table)
    if table.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{table}, line {number}: not JSON ({error}).") from error
            _add(rows, row, table, number)
        return rows
    if table.suffix not in (".csv", ".tsv"):
        raise ValueError(f"captions = {str(table)!r}: a .csv, .tsv or .jsonl file. Accepted: {ACCEPTED}.")
    for number, row in read_csv(table, ("file", "caption"), delimiter="\t" if table.suffix == ".tsv" else ","):
        _add(rows, row, table, number)
    return rows


def read_csv(table: Path, columns: Sequence[str], delimiter: str = ",") -> list[tuple[int, dict[str, str]]]:
    """Line number and cells by column of every row of a table.

    Raises:
      UnreadableFile: not UTF-8, or not a table.
      ValueError: it lacks a column.
    """
    text = storage.read_utf8(table)
    with storage.reading(table, "is not a table of text", "Save it again as CSV."):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = reader.fieldnames or ()
        rows = [(reader.line_num, row) for row in reader]
    if not set(columns) <= set(names):
        raise ValueError(f"{table}: its columns are {list(names)}; it needs {' and '.join(columns)}.")
    return rows


def _add(rows: dict[str, list[str]], row: object, table: Path, number: int) -> None:
    if not isinstance(row, Mapping) or not row.get("file") or "caption" not in row:
        raise ValueError(f"{table}, line {number}: needs a file and a caption, got {row!r}.")
    captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
    rows.setdefault(str(row["file"]), []).extend(str(c).strip() for c in captions if c and str(c).strip())


def _from_table(
    folder: Path, files: list[Path], rows: dict[str, list[str]], table: Path
) -> dict[Path, tuple[str, ...]]:
    found = {}
    for file in files:
        relative = file.relative_to(folder)
        names = (relative.as_posix(), relative.with_suffix("").as_posix(), file.name, file.stem)
        captions = next((rows[name] for name in names if rows.get(name)), None)
        if captions:
            found[file] = tuple(captions)
    if files and not found:
        raise ValueError(
            f"{table} lists none of the {len(files)} files in {folder}: "
            f"it has {', '.join(list(rows)[:3]) or 'no rows'}, the folder {', '.join(file.name for file in files[:3])}."
        )
    return found
