"""Builds a data set from WebVid: a csv table of captions and a folder of videos (Bain et al., arXiv 2104.00650)."""

import functools
from pathlib import Path

from jvgen.data.builders.build_loop import FilterConfig, Progress, Summary
from jvgen.data.builders.captions import read_csv
from jvgen.data.builders.folders import VIDEO_SUFFIXES, Media, build_media, video_record
from jvgen.storage import recordings

COLUMNS = ("videoid", "name")


def build_webvid(
    table: str | Path,
    videos: str | Path,
    out: str | Path,
    *,
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    filters: FilterConfig | None = None,
    validation: float = 0.05,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Build a data set of the videos in a table that have been downloaded, as dynamic clips with captions.

    Args:
      table: csv with the columns videoid and name (the caption).
      videos: folder with VIDEOID.mp4 at any depth, such as PAGE_DIR/VIDEOID.mp4.
      out: folder of the data set.
      shorter_side, keyframe_every, filters, validation, error_budget, workers, overwrite, progress: as in
        `jvgen.data.builders.folders.build_videos`.

    Raises:
      BuildError: more corrupt files than the budget allows.
      ValueError: no table, missing columns, no folder, or no video of the table in the folder.
    """
    folder = recordings(videos)
    if not folder.is_dir():
        raise ValueError(f"videos = {str(folder)!r} is not a folder.")
    rows = read_table(recordings(table))
    by_id = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES}
    media = [Media(by_id[key], key, (caption,)) for key, caption in rows.items() if key in by_id]
    if not media:
        shown = ", ".join(path.name for path in list(by_id.values())[:3]) or "no videos"
        raise ValueError(
            f"{folder} contains none of the {len(rows)} videos of {table}: expected VIDEOID.mp4, such as "
            f"{next(iter(rows))}.mp4, at any depth; it has {shown}."
        )
    options = {"kind": "dynamic", "shorter_side": shorter_side, "keyframe_every": keyframe_every}
    return build_media(
        media, functools.partial(video_record, **options), out,
        description="Moving clips with captions, from WebVid.", origin="webvid", folder=folder, options=options,
        captions_optional=False, filters=filters, validation=validation, error_budget=error_budget, workers=workers,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip


def read_table(path: Path) -> dict[str, str]:
    """Captions by video id.

    Raises:
      ValueError: no such file, missing columns, or no rows.
    """
    if not path.is_file():
        raise ValueError(f"table = {str(path)!r}: no such file; WebVid's lists are csv files.")
    table = read_csv(path, COLUMNS)
    rows = {row["videoid"].strip(): row["name"].strip() for _, row in table if row["videoid"] and row["name"]}
    if not rows:
        raise ValueError(f"{path}: has no rows with a videoid and a name.")
    return rows
