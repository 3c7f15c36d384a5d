"""JSON-lines files: one object per line, readable while a run writes them and after it was killed."""

import json
import math
from collections.abc import Mapping
from typing import Any, TextIO

from jvgen import storage
from jvgen.storage import Path


class JsonLinesFile:
    """A JSON-lines file with one object per step, floats at full precision, flushed after every row.

    Opening it drops the rows of `start_step` and later, because a run that resumes at `start_step` writes them again;
    without a `start_step` all rows stay. A file in a bucket is written locally and uploaded at intervals.
    """

    def __init__(self, path: Path, start_step: int | None = None):
        kept = [row for row in read_rows(path) if start_step is None or row["step"] < start_step]
        self._mirror = storage.Mirror(path)
        storage.write_text(self._mirror.local, "".join(_line(row) for row in kept))
        self._file: TextIO = self._mirror.local.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, which has a "step"."""
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Upload the rows so far; nothing for a local file."""
        self._mirror.sync()

    def close(self) -> None:
        """Close the file; in a bucket, upload the last rows."""
        self._file.close()
        self._mirror.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line (of a killed run) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in storage.read_text(path).splitlines():
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
