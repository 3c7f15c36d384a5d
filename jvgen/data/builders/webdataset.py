"""Builds data sets from WebDataset shards: tar files in which consecutive files of one name make a sample.

Shards are neither unpacked nor rewritten: a sample is read where it is in its tar file.
"""

import difflib
import functools
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvgen.data.builders.build_loop import FEW_JOBS, Execution, Progress, Summary, available_cpus
from jvgen.data.builders.captions import column_name, is_missing
from jvgen.data.builders.jobs import Corrupt
from jvgen.data.builders.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Media,
    VideoOptions,
    build_media,
    media_records,
)
from jvgen.data.builders.recorded_files import files_in, name_of, readable
from jvgen.data.builders.workers import in_order
from jvgen.data.store.records import MAX_TEXT
from jvgen.data.video_files import DecodeError
from jvgen.storage import recordings

TEXTS = (".txt", ".caption")
_BLOCK = 512  # bytes of a tar file's header
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Member(NamedTuple):
    """A file in a tar file: its suffix in lower case, and where its bytes are."""

    suffix: str
    offset: int
    size: int


class Sample(NamedTuple):
    """Files of one name in a shard.

    Attributes:
      id: of its record: the path of the shard without its suffix, and the name.
      path: of the shard.
      members: of the sample.
      problem: why it cannot be used, if that is known.
    """

    id: str
    path: Path
    members: tuple[Member, ...]
    problem: str = ""

    @property
    def state(self) -> str:
        """What the records depend on besides the id."""
        return json.dumps([self.members, self.problem])

    @property
    def recording(self) -> str:
        """What it is a part of: shards do not say, so that it is one of its own."""
        return self.id

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(member.size for member in self.members)


class Column(NamedTuple):
    """A field of the JSON files that becomes a column: its name there and here, whether it is a number, and where the
    first one was found."""

    field: str
    name: str
    is_number: bool
    first: str


def build_webdataset(
    folder: str | Path,
    out: str | Path,
    options: VideoOptions | None = None,
    *,
    media: str | None = None,
    caption_field: str = "caption",
    columns: Sequence[str] | None = None,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of the videos or images in tar shards.

    Captions are the lines of KEY.txt and the caption of KEY.json. Numbers and short texts in KEY.json become columns:
    those that the first sample of a shard has, of the kind that it has there.

    Args:
      folder: of the shards (.tar), searched recursively.
      out: folder of the data set.
      options: which samples are taken, and how they are stored.
      media: suffix of the videos or images, such as "mp4"; needed where a sample has several.
      caption_field: of the JSON files; a text or a list of texts.
      columns: fields of the JSON files that become columns; None for all.
      error_budget, workers, overwrite, progress, execution: as in `jvgen.data.builders.folders.build_videos`.

    Raises:
      BuildError: more unusable samples than the budget allows.
      ValueError: no folder, no shards, an unknown column.
    """
    options = options or VideoOptions()
    options.validate()
    folder = recordings(folder)
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    workers = available_cpus() if workers is None else workers
    samples = find_samples(folder, workers)
    found = find_columns(samples, caption_field, columns)
    suffix = None if media is None else "." + media.lower().lstrip(".")
    make = functools.partial(media_records, options=options)
    return build_media(
        samples, functools.partial(sample_records, make=make, media=suffix, caption_field=caption_field, columns=found),
        out, options, description="Videos or images of WebDataset shards.", origin="webdataset", folder=folder,
        stored={"media": media, "caption_field": caption_field, "columns": columns, **options.stored()},
        error_budget=error_budget, workers=workers, overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip


def find_samples(folder: Path, workers: int = 1) -> list[Sample]:
    """The samples of all shards in a folder, in order.

    What cannot be read of a shard is a sample with a problem.

    Raises:
      ValueError: no shards.
    """
    shards = [path for path in files_in(folder) if path.name.endswith((".tar", *_COMPRESSED))]
    if not shards:
        raise ValueError(f"{folder} contains no shards (.tar).")
    names = [name_of(path, folder).removesuffix(".tar") for path in shards]
    listed = in_order(_list_shard, zip(shards, names, strict=True), workers, processes=len(shards) >= FEW_JOBS)
    samples: list[Sample] = []
    for path, name, found in zip(shards, names, listed, strict=True):
        samples += [Sample(name, path, (), found.reason)] if isinstance(found, Corrupt) else found
    return samples


def find_columns(samples: Sequence[Sample], caption_field: str, wanted: Sequence[str] | None) -> tuple[Column, ...]:
    """The columns that the first sample of each shard has.

    Raises:
      ValueError: a wanted one is not among them, or two would have the same name.
    """
    found: dict[str, Column] = {}
    seen = set()
    for sample in samples:
        member = next((member for member in sample.members if member.suffix == ".json"), None)
        if sample.path in seen or member is None or sample.problem:
            continue
        seen.add(sample.path)
        try:
            fields = _fields(sample, member)
        except DecodeError:
            continue  # Reading the sample will say why.
        for field, value in fields.items():
            if field != caption_field and isinstance(value, int | float | str) and not is_missing(value):
                found.setdefault(field, Column(field, column_name(field), not isinstance(value, str), sample.id))
    for field in wanted or ():
        if field not in found:
            near = difflib.get_close_matches(field, found, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"They have: {', '.join(sorted(found)) or 'none'}."
            raise ValueError(f"columns: the JSON files have no number or text {field!r}. {hint}")
    columns = [column for field, column in found.items() if wanted is None or field in wanted]
    by_name: dict[str, Column] = {}
    for column in columns:
        other = by_name.setdefault(column.name, column)
        if other is not column:
            raise ValueError(
                f"fields {other.field!r} and {column.field!r} are both columns {column.name!r}: choose one (columns)."
            )
    return tuple(columns)


def sample_records(
    sample: Sample, make: Callable[[Media], Any], media: str | None, caption_field: str, columns: Sequence[Column]
) -> Any:
    """What `make` makes of the video or image of a sample, with the captions and columns beside it."""
    if sample.problem:
        raise DecodeError(sample.problem)
    suffixes = [member.suffix for member in sample.members]
    found = [
        member
        for member in sample.members
        if (member.suffix == media if media else member.suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    ]
    if len(found) != 1:
        problem = f"has {len(found)} videos or images" if media is None else f"has {len(found)} files *{media}"
        raise DecodeError(
            f"{problem}; its files end in {', '.join(suffixes)}" + ("; choose one (media)" if found else "")
        )
    captions: list[str] = []
    values: dict[str, float | str] = {}
    for member in sample.members:
        if member.suffix in TEXTS:
            captions += [line.strip() for line in _text(sample, member).replace("\r", "\n").split("\n")]
        elif member.suffix == ".json":
            fields = _fields(sample, member)
            written = fields.get(caption_field)
            for text in written if isinstance(written, list) else [written]:
                if isinstance(text, list | dict):
                    raise DecodeError(
                        f"field {caption_field!r} is {repr(written)[:60]}; a caption is a text or a list of texts"
                    )
                captions += [str(text).strip()] if text and not is_missing(text) else []
            values = _values(fields, columns)
    # The path says which kind of file it is.
    path = Path(f"{sample.id}{found[0].suffix}")
    texts = tuple(dict.fromkeys(text for text in captions if text))
    return make(Media(path, sample.id, texts, "", values, None, _bytes(sample, found[0])))


def _list_shard(shard: tuple[Path, str]) -> list[Sample]:
    path, name = shard
    if path.name.endswith(_COMPRESSED):
        raise DecodeError(f"{path.name} is compressed: decompress it, since samples are read from within it")
    groups: dict[str, list[Member]] = {}
    problems: dict[str, str] = {}
    last = None
    size = path.stat().st_size
    ended = ""
    with path.open("rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed
            for member in archive:
                archive.members = []  # It would keep all.
                key, suffix = _split(member.name)
                if member.isdir() or not suffix:
                    continue
                group = groups.setdefault(key, [])
                wrong = [
                    (bool(group) and key != last, f"the files of {key} are in several places"),
                    (not member.isfile(), f"{member.name} is a link, which is not followed"),
                    (member.offset_data + member.size > size, f"truncated within {member.name}"),
                    (key.startswith("/") or ".." in key.split("/"), f"{member.name} is a path that leads out"),
                    (any(other.suffix == suffix for other in group), f"{member.name} is there twice"),
                ]
                for is_wrong, problem in wrong:
                    if is_wrong:
                        problems.setdefault(key, f"{path.name}: {problem}")
                last = key
                group.append(Member(suffix, member.offset_data, member.size))
            ended = _end(file, archive.offset, size)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            ended = f"damaged ({error})"
    samples = [
        Sample(f"{name}/{readable(key)}", path, tuple(members), readable(problems.get(key, "")))
        for key, members in groups.items()
    ]
    if ended:
        lost = "nothing in it can be read" if last is None else f"what follows sample {readable(last)} is lost"
        samples.append(Sample(f"{name}/(rest)", path, (), f"{path.name}: {ended}: {lost}"))
    elif not samples:
        raise DecodeError(f"{path.name}: has no samples")
    return samples


def _end(file: Any, offset: int, size: int) -> str:
    """Why an archive ends where it was read to; "" if it does. tarfile ends silently at a damaged header."""
    if offset >= size:
        return "truncated: it has no end mark"
    file.seek(offset)
    return "" if not any(file.read(_BLOCK)) else f"damaged at byte {offset}"


def _split(name: str) -> tuple[str, str]:
    """Key and suffix as WebDataset splits them: at the first dot of the bare name."""
    name = name.removeprefix("./")
    folder, slash, bare = name.rpartition("/")
    stem, dot, suffix = bare.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower() if stem else ""


def _bytes(sample: Sample, member: Member) -> bytes:
    with sample.path.open("rb") as file:
        file.seek(member.offset)
        found = file.read(member.size)
    if len(found) != member.size:
        raise DecodeError(f"{sample.path.name}: truncated within {sample.id}{member.suffix}")
    return found


def _text(sample: Sample, member: Member) -> str:
    try:
        return _bytes(sample, member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(
            f"{sample.id}{member.suffix} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def _fields(sample: Sample, member: Member) -> dict[str, Any]:
    try:
        fields = json.loads(_text(sample, member))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"{sample.id}.json: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise DecodeError(f"{sample.id}.json: a {type(fields).__name__}, not an object")
    return fields


def _values(fields: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, float | str]:
    values: dict[str, float | str] = {}
    for column in columns:
        value = fields.get(column.field)
        if is_missing(value):
            continue
        if isinstance(value, list | dict) or (column.is_number and isinstance(value, str)):
            raise DecodeError(
                f"field {column.field!r} is {repr(value)[:60]}; it is a {'number' if column.is_number else 'text'} in "
                f"{column.first}"
            )
        if not column.is_number:
            if len(str(value)) <= MAX_TEXT:
                values[column.name] = str(value)
        else:
            if isinstance(value, int) and abs(value) > 2**53:
                raise DecodeError(
                    f"field {column.field!r} = {value}: as a number it would be rounded; write it as a text"
                )
            values[column.name] = float(value)
    return values
