"""Builds data sets from folders of video or image files."""

import collections
import functools
from collections.abc import Sequence
from pathlib import Path

from jvgen.data.builders.build_loop import Execution, FilterConfig, Progress, Summary
from jvgen.data.builders.captions import read_captions
from jvgen.data.builders.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Media,
    VideoOptions,
    build_media,
    image_record,
    video_records,
)
from jvgen.data.builders.recorded_files import files_in, name_of, suffixed
from jvgen.storage import recordings

_BESIDE_MEDIA = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".md")  # captions, tables and what is known of media
_SHOWN = 8  # ends of names


def build_videos(
    folder: str | Path,
    out: str | Path,
    options: VideoOptions | None = None,
    *,
    captions: str | Path | None = None,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set from a folder of video files, searched recursively, with captions from the same folder.

    Files are stored as they are unless the options say otherwise. Then they are encoded again, which makes decoding a
    window several times cheaper.

    Args:
      folder: folder of mp4, webm, mkv, mov, avi, gif, ... files.
      out: folder of the data set.
      options: which files are taken, and how they are stored.
      captions: captions table; by default searched for as described in `jvgen.data.builders.captions`.
      error_budget: fraction of the files that may be corrupt.
      workers: files read in parallel; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: more corrupt files than the budget allows; lists them.
      ValueError: no folder, no videos, no captions.
    """
    options = options or VideoOptions()
    options.validate()
    media, warnings = find_media(folder, VIDEO_SUFFIXES, captions, options.captions_optional)
    summary = build_media(
        media, functools.partial(video_records, options=options), out, options,
        description="Video clips from a folder.", origin="videos", folder=folder, stored=options.stored(),
        error_budget=error_budget, workers=workers, overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip
    return summary.warned(*warnings)


def build_images(
    folder: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    captions_optional: bool = False,
    filters: FilterConfig | None = None,
    validation: float = 0.05,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set from a folder of png, jpeg, webp or bmp images.

    Args:
      folder: of the images, searched recursively.
      out: folder of the data set.
      captions_optional, filters, validation: as in `VideoOptions`.
      captions, error_budget, workers, overwrite, progress, execution: as in `build_videos`, which raises the same.
    """
    options = VideoOptions(
        captions_optional=captions_optional, filters=filters or FilterConfig(), validation=validation
    )
    media, warnings = find_media(folder, IMAGE_SUFFIXES, captions, captions_optional)
    summary = build_media(
        media, image_record, out, options,
        description="Images from a folder.", origin="images", folder=folder, stored={}, error_budget=error_budget,
        workers=workers, overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip
    return summary.warned(*warnings)


def find_media(
    folder: str | Path,
    suffixes: Sequence[str] = VIDEO_SUFFIXES,
    captions: str | Path | None = None,
    captions_optional: bool = False,
) -> tuple[list[Media], list[str]]:
    """The files of a folder with their captions, and warnings; errors as in `build_videos`."""
    folder = recordings(folder)
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    every = list(files_in(folder))
    files = suffixed(every, suffixes)
    if not files:
        raise ValueError(f"{folder} contains no files ending in {', '.join(suffixes)}.")
    table = recordings(captions) if captions is not None else None
    found = read_captions(folder, files, table, optional=captions_optional)
    media = [
        Media(
            path, name_of(path, folder), found.texts.get(path, ()), found.unreadable.get(path, ""),
            found.columns.get(path, {}),
        )
        for path in files
    ]  # fmt: skip
    return media, [found.warning, _left_out(every, suffixes)]


def _left_out(files: Sequence[Path], taken: Sequence[str]) -> str:
    """How many files have names that end in something else than media and captions; "" if none does."""
    others = collections.Counter(path.suffix.lower() for path in files)
    for suffix in (*taken, *_BESIDE_MEDIA):
        others.pop(suffix, None)
    listed = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in others.most_common(_SHOWN))
    more = ", ..." if len(others) > _SHOWN else ""
    return f"only files ending in {', '.join(taken)} are read, which leaves out {listed}{more}" if others else ""
