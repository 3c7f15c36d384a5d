"""JSON-lines files: one object per line, readable while a run writes them and after it was killed."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class JsonLinesFile:
    """A JSON-lines file with one object per step, floats at full precision, flushed after every row.

    Opening it drops the rows of `start_step` and later, because a run that resumes at `start_step` writes them again;
    without a `start_step` all rows stay.
    """

    def __init__(self, path: Path, start_step: int | None = None):
        kept = [row for row in read_rows(path) if start_step is None or row["step"] < start_step]
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, which has a "step"."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line (of a killed run) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}) + "\n"


def _plain(value: Any) -> Any:
    # JSON has no NaN: it is written as text, so that strict parsers can read the file.
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
