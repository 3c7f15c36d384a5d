"""Builds data sets from folders of video or image files."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvgen.data.builders.build_loop import (
    BuildJob,
    FilterConfig,
    Progress,
    Summary,
    assign_splits,
    available_cpus,
    build_dataset,
)
from jvgen.data.builders.captions import read_captions
from jvgen.data.builders.recorded_files import files_in, name_of, suffixed
from jvgen.data.store.records import Record
from jvgen.data.transcoding import transcode
from jvgen.data.video_files import DecodeError, inspect, probe
from jvgen.storage import recordings

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".gif", ".ts")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Media(NamedTuple):
    """A media file, the id of its record, its captions, and why these cannot be read."""

    path: Path
    id: str
    captions: tuple[str, ...]
    problem: str = ""

    def read(self) -> bytes:
        """Its bytes; raises `DecodeError` if they or its captions cannot be read."""
        if self.problem:
            raise DecodeError(self.problem)
        return self.path.read_bytes()


def build_videos(
    folder: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    captions_optional: bool = False,
    kind: str = "dynamic",
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    filters: FilterConfig | None = None,
    validation: float = 0.05,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Build a data set from a folder of video files, searched recursively, with captions from the same folder.

    Files are stored as they are unless `shorter_side` or `keyframe_every` is given. Then they are re-encoded, which
    makes decoding a window several times cheaper.

    Args:
      folder: folder of mp4, webm, mkv, mov, avi, gif, ... files.
      out: folder of the data set.
      captions: captions table; by default searched for as described in `jvgen.data.builders.captions`.
      captions_optional: also take clips without captions.
      kind: "dynamic", or "static" for clips of still scenes.
      shorter_side: downscale larger clips to this many pixels.
      keyframe_every: keyframe interval of re-encoded clips, in frames; one second by default.
      filters: which clips to keep.
      validation: fraction of the clips held out.
      error_budget: fraction of the files that may be corrupt.
      workers: files read in parallel; by default one per CPU.
      overwrite, progress: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: more corrupt files than the budget allows; lists them.
      ValueError: no folder, no videos, no captions.
    """
    if kind not in ("dynamic", "static"):
        raise ValueError(f"kind = {kind!r}: dynamic or static.")
    if shorter_side is not None and shorter_side < 2:
        raise ValueError(f"shorter_side = {shorter_side}: at least 2 pixels.")
    if keyframe_every is not None and keyframe_every < 1:
        raise ValueError(f"keyframe_every = {keyframe_every}: at least 1 frame.")
    media = _media(folder, VIDEO_SUFFIXES, captions, captions_optional)
    options = {"kind": kind, "shorter_side": shorter_side, "keyframe_every": keyframe_every}
    return build_media(
        media, functools.partial(video_record, **options), out,
        description="Video clips from a folder.", origin="videos", folder=folder, options=options,
        captions_optional=captions_optional, filters=filters, validation=validation, error_budget=error_budget,
        workers=workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip


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
) -> Summary:
    """Build a data set from a folder of png, jpeg, webp or bmp images; arguments and errors as in `build_videos`."""
    media = _media(folder, IMAGE_SUFFIXES, captions, captions_optional)
    return build_media(
        media, _image_record, out,
        description="Images from a folder.", origin="images", folder=folder, options={},
        captions_optional=captions_optional, filters=filters, validation=validation, error_budget=error_budget,
        workers=workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _media(
    folder: str | Path, suffixes: Sequence[str], captions: str | Path | None, captions_optional: bool
) -> list[Media]:
    folder = recordings(folder)
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    files = suffixed(files_in(folder), suffixes)
    if not files:
        raise ValueError(f"{folder} contains no files ending in {', '.join(suffixes)}.")
    table = recordings(captions) if captions is not None else None
    found = read_captions(folder, files, table, optional=captions_optional)
    return [
        Media(path, name_of(path, folder), found.texts.get(path, ()), found.unreadable.get(path, "")) for path in files
    ]


def build_media(
    media: list[Media], make: Callable[[Media], Record], out: str | Path, *, description: str, origin: str,
    folder: str | Path, options: dict[str, Any], captions_optional: bool, filters: FilterConfig | None,
    validation: float, workers: int | None, **rest: Any,
) -> Summary:  # fmt: skip
    """Make the record of each file with `make`, then split, filter and write; other arguments as in `build_videos`."""
    filters = filters or FilterConfig()
    if not captions_optional:
        filters = filters.replace(caption_required=True)
    kept = {"folder": str(folder), "validation": validation, **options, "filters": dataclasses.asdict(filters)}
    splits = assign_splits([item.id for item in media], validation)
    return build_dataset(
        out, [BuildJob(split, item.id, item) for split, item in zip(splits, media, strict=True)], make,
        description=description, metadata={"origin": origin, "options": json.loads(json.dumps(kept))},
        filters=filters, workers=available_cpus() if workers is None else workers, **rest,
    )  # fmt: skip


def video_record(media: Media, kind: str, shorter_side: int | None, keyframe_every: int | None) -> Record:
    """The record of a video file, re-encoded if a size or a keyframe interval is given.

    Every frame is decoded. A file whose frames cannot be found by its packets is re-encoded in any case.
    """
    clip = media.read()
    info = None if shorter_side or keyframe_every else inspect(clip)
    if info is None or not info.faithful:
        clip = transcode(clip, shorter_side=shorter_side, keyframe_every=keyframe_every)
        info = probe(clip)
    if info.frames_per_second <= 0:
        raise DecodeError("has no frame rate")
    return Record(
        id=media.id, kind=kind, clips=(clip,), captions=media.captions, frames_per_second=info.frames_per_second,
        frames=info.frames, height=info.height, width=info.width,
    )  # fmt: skip


def _image_record(media: Media) -> Record:
    clip = media.read()
    info = probe(clip)
    return Record(
        id=media.id, kind="image", clips=(clip,), captions=media.captions, height=info.height, width=info.width
    )
