"""Builds data sets of videos or images that tables list: CSV, JSON lines or Parquet, with the files on local disks.

Columns are found by the names that published tables use (Panda-70M, OpenVid, Koala-36M, img2dataset), or named. Rows
may say which part of a video they are about; lists in a row are about several parts of one video.
"""

import ast
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from jvgen.data.builders.build_loop import Execution, Progress, Summary
from jvgen.data.builders.captions import Row, is_missing, iterate_csv, iterate_jsonl, other_columns
from jvgen.data.builders.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Media,
    VideoOptions,
    build_media,
    media_records,
)
from jvgen.data.builders.recorded_files import Ambiguous, Names, files_in, name_of, suffixed
from jvgen.storage import reading, recordings

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Names of columns in lower case, the first that a table has is taken.
FILES = ("path", "file", "file_path", "file_name", "filename", "video_path", "video", "image", "videoid", "video_id",
         "clip_id", "id", "key", "url")  # fmt: skip
URLS = ("url", "contenturl", "video_url", "image_url")
CAPTIONS = ("caption", "captions", "text", "description")
TIMES = ("timestamp", "timestamps")
STARTS = ("start", "start_time", "start_sec", "clip_start")
ENDS = ("end", "end_time", "end_sec", "clip_end")


@dataclasses.dataclass(frozen=True)
class TableColumns:
    """Names of the columns of a table; None for those that published tables use.

    Attributes:
      file: path, name or id of the file.
      caption: the caption, or a list of one for each part.
      times: "cut" the parts of videos that the table has times of, or "ignore" times, where the files are these parts.
        A table with times needs one of both.
    """

    file: str | None = None
    caption: str | None = None
    times: Literal["cut", "ignore"] | None = None

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        if self.times not in (None, "cut", "ignore"):
            raise ValueError(f"times = {self.times!r}: cut or ignore.")


class _Roles(NamedTuple):
    """Columns of a table by what they are for."""

    file: str
    caption: str | None
    url: str | None
    times: tuple[str, ...]  # one with both, or start and end; none


class _Part(NamedTuple):
    """What a row says of a file, or of a part of it."""

    span: tuple[float, float] | None
    captions: tuple[str, ...]
    cells: dict[str, Any]


class _Clip(NamedTuple):
    path: Path
    part: _Part
    line: int
    problem: str = ""
    source: str = ""


def build_table(
    table: str | Path,
    files: str | Path,
    out: str | Path,
    columns: TableColumns | None = None,
    options: VideoOptions | None = None,
    *,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of the videos and images of a table that have been downloaded.

    Rows whose file is not there are counted in the warnings of the summary. The other columns become columns of the
    data set.

    Args:
      table: .csv, .tsv, .jsonl or .parquet, or a folder of such files with the same columns.
      files: folder of the files, at any depth. None outside of it is read.
      out: folder of the data set.
      columns: which columns are what.
      options: which clips are taken, and how they are stored. Parts of videos are encoded again, and all parts of one
        are in one split.
      error_budget, workers, overwrite, progress, execution: as in `jvgen.data.builders.folders.build_videos`.

    Raises:
      BuildError: more unusable files than the budget allows.
      ValueError: no table, a table that cannot be read, a missing column, times without `columns.times`, no folder, or
        no file of the table in it.
    """
    columns = columns or TableColumns()
    columns.validate()
    options = options or VideoOptions()
    options.validate()
    if columns.times == "cut" and options.scenes == "cut":
        raise ValueError("scenes = 'cut', times = 'cut': the times of the table say already where clips begin and end.")
    folder = recordings(files)
    if not folder.is_dir():
        raise ValueError(f"files = {str(folder)!r} is not a folder.")
    listed = _Listed(folder, columns)
    for path in _tables(recordings(table)):
        listed.add(path)
    media = listed.media()
    if not media:
        shown = ", ".join(listed.names[:3]) or "no videos or images"
        raise ValueError(
            f"{folder} contains none of the {listed.rows} files of {table}, such as {listed.example!r}; it has {shown}."
        )
    summary = build_media(
        media, functools.partial(media_records, options=options), out, options,
        description="Videos or images that a table lists.", origin="table", folder=folder,
        stored={**dataclasses.asdict(columns), **options.stored()}, error_budget=error_budget, workers=workers,
        overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip
    missing = f"{listed.without_file} of {listed.rows} rows have no file in {folder}, such as {listed.example!r}"
    return summary.warned(missing if listed.without_file else "")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a table, one after the other.

    Raises:
      UnreadableFile: not such a table.
      ValueError: rows that do not fit its columns.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".jsonl":
        return iterate_jsonl(path)
    return iterate_csv(path, (), "\t" if path.suffix == ".tsv" else ",")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with reading(path, "cannot be read as Parquet"):
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, cells)


def _tables(path: Path) -> list[Path]:
    if path.is_dir():
        found = suffixed(files_in(path), SUFFIXES)
        if not found:
            raise ValueError(f"table = {str(path)!r}: the folder has no files ending in {', '.join(SUFFIXES)}.")
        return found
    if not path.is_file():
        raise ValueError(f"table = {str(path)!r}: no such file.")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"table = {str(path)!r}: a file ending in {', '.join(SUFFIXES)}, or a folder of them.")
    return [path]


class _Listed:
    """The rows of tables that have a file in a folder.

    Attributes:
      names: of the files in the folder.
      rows: number of rows so far.
      without_file: those without a file.
      example: what one of these calls its file.
    """

    def __init__(self, folder: Path, columns: TableColumns):
        self._folder, self._columns = folder, columns
        files = suffixed(files_in(folder), VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        self._files = {name_of(path, folder): path for path in files}
        self.names = list(self._files)
        self._known = Names(self.names)
        self._clips: dict[str, _Clip] = {}
        self.rows = self.without_file = 0
        self.example = ""

    def add(self, table: Path) -> None:
        """Read a table; raises as `read_rows`, and for columns that are missing."""
        roles = None
        for row in read_rows(table):
            roles = roles or _roles(table, _names_of_columns(table, row), self._columns)
            self._add_row(table, row, roles)

    def media(self) -> list[Media]:
        """What is to be read, with ids that no two share."""
        others = other_columns([Row(clip.line, clip.part.cells) for clip in self._clips.values()], ())
        return [
            Media(clip.path, id, clip.part.captions, clip.problem, cells, clip.part.span, source=clip.source)
            for (id, clip), cells in zip(self._clips.items(), others, strict=True)
        ]

    def _add_row(self, table: Path, row: Row, roles: _Roles) -> None:
        self.rows += 1
        written, url = (str(row.cells.get(name) or "").strip() if name else "" for name in (roles.file, roles.url))
        try:
            file = self._find((*_names(written), *_names(url)))
        except Ambiguous as error:
            self._clips[written] = _Clip(
                Path(written), _Part(None, (), {}), row.line, f"{table}, row {row.line}: {error}"
            )
            return
        if file is None:
            self.without_file += 1
            self.example = self.example or written or url
            return
        try:
            parts, problem = _parts(row.cells, roles, self._columns.times == "cut"), ""
        except ValueError as error:
            parts, problem = [_Part(None, (), {})], f"{table}, row {row.line}: {error}"
        # Files that are clips of a video have its URL.
        source = next(iter(_names(url)), "") if roles.times and self._columns.times == "ignore" else ""
        for part in parts:
            id = file if part.span is None else f"{file}/{part.span[0]:09.3f}-{part.span[1]:09.3f}"
            if problem:
                id = f"{file}/row {row.line}"
            elif id in self._clips:  # another caption of the same clip
                part = part._replace(captions=(*self._clips[id].part.captions, *part.captions))
            self._clips[id] = _Clip(self._files[file], part, row.line, problem, source)

    def _find(self, names: Sequence[str]) -> str | None:
        for name in names:
            path = Path(name)
            if path.is_absolute() and path.is_relative_to(self._folder):
                name = path.relative_to(self._folder).as_posix()
            found = self._known.find(name)
            if found is not None:
                return found
        return None


def _names_of_columns(table: Path, first: Row) -> list[str]:
    """Names of all columns of a table, in the order in which they come."""
    if table.suffix != ".jsonl":
        return list(first.cells)
    # Rows may leave out what they do not have: times in the second row must not be overlooked.
    return list(dict.fromkeys(name for row in read_rows(table) for name in row.cells))


def _roles(table: Path, names: Sequence[str], columns: TableColumns) -> _Roles:
    def chosen(wanted: str | None, usual: Sequence[str]) -> str | None:
        if wanted is None:
            lower = {name.lower().strip().replace(" ", "_"): name for name in reversed(names)}
            return next((lower[name] for name in usual if name in lower), None)
        if wanted in names:
            return wanted
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(names)}."
        raise ValueError(f"{table}: has no column {wanted!r}. {hint}")

    file, url = chosen(columns.file, FILES), chosen(None, URLS)
    if file is None:
        raise ValueError(
            f"{table}: none of its columns ({', '.join(names)}) is called {', '.join(FILES)}: say which one names the "
            "file (--file-column)."
        )
    both, start, end = chosen(None, TIMES), chosen(None, STARTS), chosen(None, ENDS)
    times = (both,) if both else (start, end) if start and end else ()
    if times and columns.times is None:
        raise ValueError(
            f"{table}: the column {times[0]!r} has times. Pass --times cut if files are whole videos, from which the "
            "clips are cut, or --times ignore if they are the clips."
        )
    if columns.times == "cut" and not times:
        raise ValueError(f"{table}: times = 'cut', but it has no column of times ({', '.join(TIMES + STARTS)}).")
    return _Roles(file, chosen(columns.caption, CAPTIONS), url, times)


def _parts(cells: Mapping[str, Any], roles: _Roles, cut: bool) -> list[_Part]:
    """The parts of a row: one, or one for each pair of times."""
    used = {roles.file, roles.caption, *roles.times}
    others = {name: value for name, value in cells.items() if name not in used}
    caption = cells.get(roles.caption) if roles.caption else None
    if not cut:
        return [_Part(None, _texts(caption if isinstance(caption, list) else [caption]), others)]
    spans = _spans([cells.get(name) for name in roles.times], roles.times)
    if not isinstance(spans, list):
        return [_Part(spans, _texts(_literal(caption) if isinstance(caption, list) else [caption]), others)]
    listed = {name: _literal(value) for name, value in others.items()}
    captions = _literal(caption)
    if isinstance(captions, list) and len(captions) != len(spans):
        raise ValueError(f"{roles.caption} has {len(captions)} texts for {len(spans)} pairs of times")
    return [
        _Part(
            span,
            _texts([captions[number] if isinstance(captions, list) else captions]),
            {
                name: value[number] if isinstance(value, list) and len(value) == len(spans) else others[name]
                for name, value in listed.items()
            },
        )
        for number, span in enumerate(spans)
    ]


def _spans(values: Sequence[Any], names: Sequence[str]) -> tuple[float, float] | list[tuple[float, float]]:
    """Start and end in seconds, or a list of both."""
    found = [_literal(value) for value in values]
    try:
        pairs = list(zip(*found, strict=True)) if len(found) == 2 and isinstance(found[0], list) else found
        if len(found) == 1:
            pairs = found[0]
        if isinstance(pairs, list) and pairs and all(isinstance(pair, list | tuple) for pair in pairs):
            return [(_seconds(first), _seconds(last)) for first, last in pairs]
        first, last = pairs
        return _seconds(first), _seconds(last)
    except (TypeError, ValueError):
        raise ValueError(
            f"{' and '.join(names)}: {', '.join(repr(value)[:60] for value in values)}; expected a start and an end, "
            "in seconds or as H:MM:SS.mmm, or a list of both"
        ) from None


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or value is None:
        raise ValueError
    if isinstance(value, str) and ":" in value:
        seconds = 0.0
        for part in value.strip().split(":"):
            seconds = 60 * seconds + float(part)
        return seconds
    return float(value)


def _literal(value: Any) -> Any:
    """The list that a cell writes as text; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "(")):
        return value
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value
    return list(found) if isinstance(found, list | tuple) else value


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    wrong = next((value for value in values if isinstance(value, list | dict | bytes)), None)
    if wrong is not None:
        raise ValueError(f"its caption is {repr(wrong)[:60]}, which is no text")
    return tuple(text for value in values if not is_missing(value) and (text := str(value).strip()))


def _names(written: str) -> list[str]:
    """What a file may be called by: the cell itself; of a URL the key of the video, and its last part."""
    if "://" not in written:
        return [written] if written else []
    parts = urlsplit(written)
    keys = parse_qs(parts.query).get("v", [])
    return [*keys, unquote(parts.path.rpartition("/")[2])] if parts.path.strip("/") or keys else keys
