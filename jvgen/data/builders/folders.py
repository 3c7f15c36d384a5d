"""Builds data sets from folders of video or image files."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jvgen.data.builders.build_loop import (
    FEW_JOBS,
    BuildJob,
    Execution,
    FilterConfig,
    Made,
    Progress,
    Summary,
    assign_splits,
    available_cpus,
    build_dataset,
)
from jvgen.data.builders.captions import read_captions
from jvgen.data.builders.recorded_files import files_in, name_of, suffixed
from jvgen.data.cuts import find_cuts
from jvgen.data.store.records import Record
from jvgen.data.transcoding import SlowerThanAsked, cut_out, transcode, transcode_parts
from jvgen.data.video_files import DecodeError, inspect, probe, timed_frames
from jvgen.storage import recordings

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".gif", ".ts")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """How video files are stored; as they are by default.

    Attributes:
      shorter_side: downscale larger clips to this many pixels.
      keyframe_every: keyframe interval in frames; one second by default.
      frames_per_second: resample to this rate by the times of the frames; clips with fewer are left out.
      scenes: "keep", or "cut": a record per scene.
    """

    shorter_side: int | None = None
    keyframe_every: int | None = None
    frames_per_second: float | None = None
    scenes: Literal["keep", "cut"] = "keep"

    @property
    def encodes(self) -> bool:
        """Whether files are re-encoded."""
        return any(value is not None for value in self.encoding().values())

    def encoding(self) -> dict[str, Any]:
        """Arguments of `transcode`."""
        return {
            "shorter_side": self.shorter_side, "keyframe_every": self.keyframe_every,
            "frames_per_second": self.frames_per_second,
        }  # fmt: skip

    def stored(self) -> dict[str, Any]:
        """The options in `jvgen.json`."""
        new = {"frames_per_second": self.frames_per_second, "scenes": None if self.scenes == "keep" else self.scenes}
        old = {"shorter_side": self.shorter_side, "keyframe_every": self.keyframe_every}
        return old | {name: value for name, value in new.items() if value is not None}

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        if self.scenes not in ("keep", "cut"):
            raise ValueError(f"scenes = {self.scenes!r}: keep or cut.")
        if self.frames_per_second is not None and not self.frames_per_second > 0:
            raise ValueError(f"frames_per_second = {self.frames_per_second}: must be positive.")


class Media(NamedTuple):
    """A media file and what is known of it.

    Attributes:
      path: of the file.
      id: of its record.
      captions: of the record.
      problem: why these cannot be read.
      columns: of its table.
      span: the part of the video that is meant, in seconds from its first frame; None for all of it.
      content: the bytes, where they are in no file of their own.
    """

    path: Path
    id: str
    captions: tuple[str, ...]
    problem: str = ""
    columns: Mapping[str, float | str] = {}
    span: tuple[float, float] | None = None
    content: bytes | None = None

    @property
    def state(self) -> str:
        """What the record depends on besides the id."""
        span = [] if self.span is None else [self.span]
        return json.dumps([self.captions, self.columns, self.problem, *span])

    @property
    def size(self) -> int:
        """Bytes; 0 where the size of the file says it."""
        return 0

    def read(self) -> bytes:
        """Its bytes; raises `DecodeError` if they or its captions cannot be read."""
        if self.problem:
            raise DecodeError(self.problem)
        return self.path.read_bytes() if self.content is None else self.content


def build_videos(
    folder: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    captions_optional: bool = False,
    kind: str = "dynamic",
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    frames_per_second: float | None = None,
    scenes: Literal["keep", "cut"] = "keep",
    filters: FilterConfig | None = None,
    validation: float = 0.05,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
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
      frames_per_second: resample clips to this rate, by the times of their frames; slower ones are left out.
      scenes: "cut" splits videos at cuts: records are ID/0000, ID/0001 ..., with the captions of the video.
      filters: which clips to keep.
      validation: fraction of the clips held out.
      error_budget: fraction of the files that may be corrupt.
      workers: files read in parallel; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

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
    media = find_media(folder, VIDEO_SUFFIXES, captions, captions_optional)
    stored = ClipOptions(shorter_side, keyframe_every, frames_per_second, scenes)
    stored.validate()
    return build_media(
        media, functools.partial(video_records, kind=kind, options=stored), out,
        description="Video clips from a folder.", origin="videos", folder=folder,
        options={"kind": kind, **stored.stored()},
        captions_optional=captions_optional, filters=filters, validation=validation, error_budget=error_budget,
        workers=workers, overwrite=overwrite, progress=progress, execution=execution,
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
    execution: Execution | None = None,
) -> Summary:
    """Build a data set from a folder of png, jpeg, webp or bmp images; arguments and errors as in `build_videos`."""
    media = find_media(folder, IMAGE_SUFFIXES, captions, captions_optional)
    return build_media(
        media, _image_record, out,
        description="Images from a folder.", origin="images", folder=folder, options={},
        captions_optional=captions_optional, filters=filters, validation=validation, error_budget=error_budget,
        workers=workers, overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip


def find_media(
    folder: str | Path,
    suffixes: Sequence[str] = VIDEO_SUFFIXES,
    captions: str | Path | None = None,
    captions_optional: bool = False,
) -> list[Media]:
    """The files of a folder with their captions; errors as in `build_videos`."""
    folder = recordings(folder)
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    files = suffixed(files_in(folder), suffixes)
    if not files:
        raise ValueError(f"{folder} contains no files ending in {', '.join(suffixes)}.")
    table = recordings(captions) if captions is not None else None
    found = read_captions(folder, files, table, optional=captions_optional)
    return [
        Media(
            path, name_of(path, folder), found.texts.get(path, ()), found.unreadable.get(path, ""),
            found.columns.get(path, {}),
        )
        for path in files
    ]  # fmt: skip


def build_media(
    media: Sequence[Any], make: Callable[[Any], Any], out: str | Path, *, description: str, origin: str,
    folder: str | Path, options: dict[str, Any], captions_optional: bool, filters: FilterConfig | None,
    validation: float, workers: int | None, processes: bool | None = None, **rest: Any,
) -> Summary:  # fmt: skip
    """Make the record of each file with `make`, then split, filter and write; other arguments as in `build_videos`.

    `media` have an `id`, a `path`, a `size` and a `state` as `Media` has.
    """
    filters = filters or FilterConfig()
    if not captions_optional:
        filters = filters.replace(caption_required=True)
    kept = {"folder": str(folder), "validation": validation, **options, "filters": dataclasses.asdict(filters)}
    splits = assign_splits([item.id for item in media], validation)
    return build_dataset(
        out, [_job(split, item) for split, item in zip(splits, media, strict=True)], make,
        description=description, metadata={"origin": origin, "options": json.loads(json.dumps(kept))},
        filters=filters, workers=available_cpus() if workers is None else workers,
        processes=len(media) >= FEW_JOBS if processes is None else processes, **rest,
    )  # fmt: skip


def _job(split: str, media: Any) -> BuildJob:
    return BuildJob(split, media.id, media, media.state, media.path, media.size)


def media_records(media: Media, kind: str, options: ClipOptions) -> Made:
    """The records of a video, or of an image, as its suffix says."""
    if media.path.suffix.lower() in IMAGE_SUFFIXES:
        return Made((_image_record(media),))
    return video_records(media, kind, options)


def video_records(media: Media, kind: str, options: ClipOptions) -> Made:
    """The records of a video file: one, or one per scene. Every frame is decoded.

    A file whose frames cannot be found by its packets is re-encoded in any case.
    """
    notes: list[str] = []
    try:
        if media.span is not None and not media.problem:
            # A long file is not read whole for a part of it.
            source = media.path if media.content is None else media.content
            clip, cuts = cut_out(source, *media.span, **options.encoding()), []
        else:
            clip = media.read()
            cuts = find_cuts(pixels for pixels, _ in timed_frames(clip)) if options.scenes == "cut" else []
        if media.span is not None:
            clips = [clip]
        elif cuts or options.encodes:
            clips = transcode_parts(clip, cuts, **options.encoding())
        elif inspect(clip).faithful:
            clips = [clip]
        else:
            clips, notes = [transcode(clip)], ["encoded again, since its packets do not tell its frames"]
    except SlowerThanAsked as error:
        return Made((), rejected=str(error))
    found = []
    for number, part in enumerate(clips):
        info = probe(part)
        if info.frames_per_second <= 0:
            raise DecodeError("has no frame rate")
        varies = not info.has_constant_rate
        found.append(
            Record(
                id=f"{media.id}/{number:04d}" if cuts else media.id, kind=kind, clips=(part,), captions=media.captions,
                frames_per_second=info.frames_per_second, frames=info.frames, height=info.height, width=info.width,
                frame_times=info.times if varies else np.zeros(0), columns=media.columns,
            )
        )  # fmt: skip
        notes += ["with a variable frame rate"] if varies else []
    return Made(tuple(found), tuple(notes))


def _image_record(media: Media) -> Record:
    clip = media.read()
    info = probe(clip)
    return Record(
        id=media.id, kind="image", clips=(clip,), captions=media.captions, height=info.height, width=info.width,
        columns=media.columns,
    )  # fmt: skip
