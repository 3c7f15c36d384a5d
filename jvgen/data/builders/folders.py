"""Building data sets from rendered scenes and from folders of videos or images."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jvgen.data.builders.build_loop import FilterConfig, Progress, Summary, Task, assemble, processors, split_of
from jvgen.data.builders.captions import read_captions
from jvgen.data.scenes.scenes import SceneConfig, scene_record
from jvgen.data.store.records import Record
from jvgen.data.video_files import DecodeError, probe, transcode

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".gif", ".ts")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def build_scenes(
    out: str | Path,
    config: SceneConfig | None = None,
    *,
    train: int = 1000,
    validation: int = 64,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Render procedural scenes (`jvgen.data.scenes.scenes`).

    Args:
      out: folder of the data set.
      config: what the scenes look like; the defaults unless given.
      train, validation: number of scenes in each split.
      seed: other seeds give other scenes; the same one gives the same bytes.
      workers: processes; one for each processor unless given, none extra for a handful of scenes.
      overwrite, progress: as in `jvgen.data.builders.build_loop.assemble`.

    Raises:
      ValueError: a configuration that cannot work, or something in the way at `out`.
    """
    config = config or SceneConfig()
    config.validate()
    if train < 1 or validation < 0:
        raise ValueError(f"train = {train}, validation = {validation}: at least one scene to train on, none negative.")
    # A process takes a second to start: not worth it for fewer frames than it renders in that time.
    few = (train + validation) * config.frames * config.views < 1500
    workers = (1 if few else processors()) if workers is None else workers
    tasks = [
        Task("train" if index < train else "validation", f"scene {index}", index) for index in range(train + validation)
    ]
    return assemble(
        out,
        tasks,
        functools.partial(scene_record, config, seed),
        description="Procedural scenes with exact cameras, rendered by jvgen.",
        metadata={"origin": "scenes", "options": {"seed": seed, **dataclasses.asdict(config)}},
        workers=workers,
        processes=True,
        overwrite=overwrite,
        progress=progress,
    )


class Media(NamedTuple):
    """A file, the id of its record, and what is said of it."""

    path: Path
    id: str
    captions: tuple[str, ...]


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
    refuse_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Take in a folder of video files (searched to any depth), with captions from beside them.

    The files' own bytes are kept unless `shorter_side` or `keyframe_every` is given: then they are encoded again, which
    makes decoding a window several times cheaper.

    Args:
      folder: with mp4, webm, mkv, mov, avi, gif, ... files.
      out: folder of the data set.
      captions: captions table; see `jvgen.data.builders.captions` for what is found without it.
      captions_optional: take clips without captions too.
      kind: "dynamic", or "static" for clips of still scenes.
      shorter_side: scale the clips down to this many pixels (never up).
      keyframe_every: frames between keyframes of clips that are encoded again; one second unless given.
      filters: which clips to keep.
      validation: share of the clips held out.
      refuse_budget: share of the files that may be damaged before the build stops.
      workers: files read side by side; one for each processor unless given.
      overwrite, progress: as in `jvgen.data.builders.build_loop.assemble`.

    Raises:
      BuildError: more damaged files than the budget allows, all of them listed.
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
    return assemble_media(
        media, functools.partial(video_record, **options), out,
        description="Video clips from a folder.", origin="videos", folder=folder, options=options,
        captions_optional=captions_optional, filters=filters, validation=validation, refuse_budget=refuse_budget,
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
    refuse_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Take in a folder of png, jpeg, webp or bmp images; arguments and errors as in `build_videos`."""
    media = _media(folder, IMAGE_SUFFIXES, captions, captions_optional)
    return assemble_media(
        media, _image_record, out,
        description="Images from a folder.", origin="images", folder=folder, options={},
        captions_optional=captions_optional, filters=filters, validation=validation, refuse_budget=refuse_budget,
        workers=workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _media(
    folder: str | Path, suffixes: Sequence[str], captions: str | Path | None, captions_optional: bool
) -> list[Media]:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no files ending in {', '.join(suffixes)}.")
    table = Path(captions).expanduser() if captions is not None else None
    found = read_captions(folder, files, table, optional=captions_optional)
    return [Media(path, path.relative_to(folder).as_posix(), found.get(path, ())) for path in files]


def assemble_media(
    media: list[Media], make: Callable[[Media], Record], out: str | Path, *, description: str, origin: str,
    folder: str | Path, options: dict[str, Any], captions_optional: bool, filters: FilterConfig | None,
    validation: float, workers: int | None, **rest: Any,
) -> Summary:  # fmt: skip
    """Make a record of each file by `make`, and split, filter and write them; see `build_videos` for the rest."""
    filters = filters or FilterConfig()
    if not captions_optional:
        filters = filters.replace(caption_required=True)
    kept = {"folder": str(folder), "validation": validation, **options, "filters": dataclasses.asdict(filters)}
    sides = split_of([item.id for item in media], validation)
    return assemble(
        out, [Task(side, item.id, item) for side, item in zip(sides, media, strict=True)], make,
        description=description, metadata={"origin": origin, "options": json.loads(json.dumps(kept))},
        filters=filters, workers=processors() if workers is None else workers, **rest,
    )  # fmt: skip


def video_record(media: Media, kind: str, shorter_side: int | None, keyframe_every: int | None) -> Record:
    """The record of a video file, encoded again if a size or a distance of keyframes is given."""
    clip = media.path.read_bytes()
    if shorter_side is not None or keyframe_every is not None:
        clip = transcode(clip, shorter_side=shorter_side, keyframe_every=keyframe_every)
    info = probe(clip)
    if info.frames_per_second <= 0:
        raise DecodeError("has no frame rate")
    return Record(
        id=media.id, kind=kind, clips=(clip,), captions=media.captions, frames_per_second=info.frames_per_second,
        frames=info.frames, height=info.height, width=info.width,
    )  # fmt: skip


def _image_record(media: Media) -> Record:
    clip = media.path.read_bytes()
    info = probe(clip)
    return Record(
        id=media.id, kind="image", clips=(clip,), captions=media.captions, height=info.height, width=info.width
    )
