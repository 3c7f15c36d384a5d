"""Builds a data set from WebVid: a csv table of captions and a folder of videos (Bain et al., arXiv 2104.00650)."""

import collections
import functools
from pathlib import Path

from jvgen.data.builders.build_loop import Execution, Progress, Summary
from jvgen.data.builders.captions import read_csv
from jvgen.data.builders.media import VIDEO_SUFFIXES, Media, VideoOptions, build_media, video_records
from jvgen.data.builders.recorded_files import Ambiguous, Names, files_in, name_of, suffixed
from jvgen.storage import recordings

COLUMNS = ("videoid", "name")


def build_webvid(
    table: str | Path,
    videos: str | Path,
    out: str | Path,
    options: VideoOptions | None = None,
    *,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of the videos in a table that have been downloaded, as dynamic clips with captions.

    Args:
      table: csv with the columns videoid and name (the caption).
      videos: folder with VIDEOID.mp4 at any depth, such as PAGE_DIR/VIDEOID.mp4.
      out: folder of the data set.
      options: which videos are taken, and how they are stored.
      error_budget, workers, overwrite, progress, execution: as in `jvgen.data.builders.folders.build_videos`.

    Raises:
      BuildError: more corrupt files than the budget allows.
      ValueError: no table, missing columns, no folder, or no video of the table in the folder.
    """
    options = options or VideoOptions()
    options.validate()
    folder = recordings(videos)
    if not folder.is_dir():
        raise ValueError(f"videos = {str(folder)!r} is not a folder.")
    rows = read_table(recordings(table))
    files = {name_of(path, folder): path for path in suffixed(files_in(folder), VIDEO_SUFFIXES)}
    media = _matched(rows, files)
    if not media:
        shown = ", ".join(path.name for path in list(files.values())[:3]) or "no videos"
        raise ValueError(
            f"{folder} contains none of the {len(rows)} videos of {table}: expected VIDEOID.mp4, such as "
            f"{next(iter(rows))[1]}.mp4, at any depth; it has {shown}."
        )
    return build_media(
        media, functools.partial(video_records, options=options), out, options,
        description="Moving clips with captions, from WebVid.", origin="webvid", folder=folder,
        stored=options.stored(), error_budget=error_budget, workers=workers, overwrite=overwrite, progress=progress,
        execution=execution,
    )  # fmt: skip


def read_table(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Captions by page_dir ("" where the table has none) and video id.

    Raises:
      ValueError: no such file, missing columns, or no rows.
    """
    if not path.is_file():
        raise ValueError(f"table = {str(path)!r}: no such file; WebVid's lists are csv files.")
    rows: dict[tuple[str, str], list[str]] = {}
    for row in read_csv(path, COLUMNS):
        key, caption = row.cells["videoid"].strip(), row.cells["name"].strip()
        if key and caption:
            rows.setdefault((row.cells.get("page_dir", "").strip(), key), []).append(caption)
    if not rows:
        raise ValueError(f"{path}: has no rows with a videoid and a name.")
    return {key: tuple(dict.fromkeys(captions)) for key, captions in rows.items()}


def _matched(rows: dict[tuple[str, str], tuple[str, ...]], files: dict[str, Path]) -> list[Media]:
    """The videos that are there. An id that several pages have is told from others by its page_dir."""
    names = Names(list(files))
    pages = collections.Counter(key for _, key in rows)
    media = []
    for (page, key), captions in rows.items():
        id = key if pages[key] == 1 else f"{page}/{key}"
        try:
            found = names.find(f"{page}/{key}") if page else None
            # Without the folder of its page, the id must be enough.
            found = names.find(key) if found is None and pages[key] == 1 else found
        except Ambiguous as error:
            media.append(Media(Path(key), id, captions, str(error)))
            continue
        if found is not None:
            media.append(Media(files[found], id, captions))
    return media
