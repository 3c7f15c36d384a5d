"""Videos and images as they are recorded, and the records that are made of them: what builders of all layouts share."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jvgen.data.builders.build_loop import (
    FEW_JOBS,
    BuildJob,
    FilterConfig,
    Made,
    Summary,
    assign_splits,
    available_cpus,
    build_dataset,
)
from jvgen.data.builders.jobs import nothing_held_out
from jvgen.data.cuts import find_cuts
from jvgen.data.store.records import Record
from jvgen.data.transcoding import SlowerThanAsked, cut_out, transcode, transcode_parts
from jvgen.data.video_files import DecodeError, inspect, probe, timed_frames

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".gif", ".ts")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """Which video files become records, and how they are stored; by default as they are.

    Attributes:
      kind: "dynamic", or "static" for clips of still scenes.
      shorter_side: downscale larger clips to this many pixels.
      keyframe_every: keyframe interval of clips that are encoded again, in frames; one second by default.
      frames_per_second: resample to this rate by the times of the frames; clips with fewer are left out.
      scenes: "keep", or "cut": a record per scene, ID/0000, ID/0001 ..., with the captions of the file.
      captions_optional: also take files without a caption.
      filters: which records to keep.
      validation: fraction of the files held out; all parts of a file are.
    """

    kind: Literal["dynamic", "static"] = "dynamic"
    shorter_side: int | None = None
    keyframe_every: int | None = None
    frames_per_second: float | None = None
    scenes: Literal["keep", "cut"] = "keep"
    captions_optional: bool = False
    filters: FilterConfig = FilterConfig()
    validation: float = 0.05

    @property
    def encodes(self) -> bool:
        """Whether files are encoded again."""
        return any(value is not None for value in self.encoding().values())

    def encoding(self) -> dict[str, Any]:
        """Arguments of `transcode`."""
        return {
            "shorter_side": self.shorter_side, "keyframe_every": self.keyframe_every,
            "frames_per_second": self.frames_per_second,
        }  # fmt: skip

    def stored(self) -> dict[str, Any]:
        """How files are stored, for `jvgen.json`."""
        new = {"frames_per_second": self.frames_per_second, "scenes": None if self.scenes == "keep" else self.scenes}
        old = {"kind": self.kind, "shorter_side": self.shorter_side, "keyframe_every": self.keyframe_every}
        return old | {name: value for name, value in new.items() if value is not None}

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        if self.kind not in ("dynamic", "static"):
            raise ValueError(f"kind = {self.kind!r}: dynamic or static.")
        if self.shorter_side is not None and self.shorter_side < 2:
            raise ValueError(f"shorter_side = {self.shorter_side}: at least 2 pixels.")
        if self.keyframe_every is not None and self.keyframe_every < 1:
            raise ValueError(f"keyframe_every = {self.keyframe_every}: at least 1 frame.")
        if self.frames_per_second is not None and not self.frames_per_second > 0:
            raise ValueError(f"frames_per_second = {self.frames_per_second}: must be positive.")
        if self.scenes not in ("keep", "cut"):
            raise ValueError(f"scenes = {self.scenes!r}: keep or cut.")


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
      source: of what the file is a part, where it is one; "" for a file of its own.
    """

    path: Path
    id: str
    captions: tuple[str, ...]
    problem: str = ""
    columns: Mapping[str, float | str] = {}
    span: tuple[float, float] | None = None
    content: bytes | None = None
    source: str = ""

    @property
    def state(self) -> str:
        """What the record depends on besides the id."""
        span = [] if self.span is None else [self.span]
        return json.dumps([self.captions, self.columns, self.problem, *span])

    @property
    def recording(self) -> str:
        """What it is a part of: all of these have one split."""
        return self.source or str(self.path)

    @property
    def size(self) -> int:
        """Bytes; 0 where the size of the file says it."""
        return 0

    def read(self) -> bytes:
        """Its bytes; raises `DecodeError` if they or its captions cannot be read."""
        if self.problem:
            raise DecodeError(self.problem)
        return self.path.read_bytes() if self.content is None else self.content


def build_media(
    media: Sequence[Any], make: Callable[[Any], Any], out: str | Path, options: VideoOptions, *, description: str,
    origin: str, folder: str | Path, stored: dict[str, Any], workers: int | None = None, processes: bool | None = None,
    **rest: Any,
) -> Summary:  # fmt: skip
    """Make the records of each file with `make`, then split, filter and write.

    Args:
      media: have an `id`, a `path`, a `recording`, a `size` and a `state` as `Media` has.
      make: maps one of them to its records.
      out: folder of the data set.
      options: of which the split and the filters are used here.
      description, origin: of the data set.
      folder: of the recordings.
      stored: on what else records depend, for `jvgen.json`.
      workers: files read in parallel; by default one per CPU.
      processes: use processes rather than threads; by default where there are many files.
      **rest: as in `jvgen.data.builders.build_loop.build_dataset`.
    """
    options.validate()
    filters = options.filters
    if not options.captions_optional:
        filters = filters.replace(caption_required=True)
    validation = options.validation
    kept = {"folder": str(folder), "validation": validation, **stored, "filters": dataclasses.asdict(filters)}
    splits = assign_splits([item.id for item in media], validation, [item.recording for item in media])
    summary = build_dataset(
        out, [_job(split, item) for split, item in zip(splits, media, strict=True)], make,
        description=description, metadata={"origin": origin, "options": json.loads(json.dumps(kept))},
        filters=filters, workers=available_cpus() if workers is None else workers,
        processes=len(media) >= FEW_JOBS if processes is None else processes, **rest,
    )  # fmt: skip
    return summary.warned(nothing_held_out(splits, validation, summary.digests, summary.records))


def _job(split: str, media: Any) -> BuildJob:
    return BuildJob(split, media.id, media, media.state, media.path, media.size)


def media_records(media: Media, options: VideoOptions) -> Made:
    """The records of a video, or of an image, as its suffix says."""
    if media.path.suffix.lower() in IMAGE_SUFFIXES:
        if media.span is not None:
            raise DecodeError("is an image, of which the table has times")
        return Made((image_record(media),))
    return video_records(media, options)


def video_records(media: Media, options: VideoOptions) -> Made:
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
                id=f"{media.id}/{number:04d}" if cuts else media.id, kind=options.kind, clips=(part,),
                captions=media.captions,
                frames_per_second=info.frames_per_second, frames=info.frames, height=info.height, width=info.width,
                frame_times=info.times if varies else np.zeros(0), columns=media.columns,
            )
        )  # fmt: skip
        notes += ["with a variable frame rate"] if varies else []
    return Made(tuple(found), tuple(notes))


def image_record(media: Media) -> Record:
    """The record of an image file."""
    clip = media.read()
    info = probe(clip)
    return Record(
        id=media.id, kind="image", clips=(clip,), captions=media.captions, height=info.height, width=info.width,
        columns=media.columns,
    )  # fmt: skip
