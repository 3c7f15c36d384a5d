"""RealEstate10K: camera files beside the videos, or frames, that they are of (Zhou et al. 2018, arXiv 1805.09817)."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jvgen.data.builders.build_loop import FilterConfig, Progress, Summary, Task, assemble, processors, split_of
from jvgen.data.builders.captions import read_captions
from jvgen.data.builders.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from jvgen.data.store.records import Record
from jvgen.data.video_files import DecodeError, decode_window, encode_video, probe, transcode
from jvgen.geometry.camera_file import CameraTrack, read_cameras

ACCEPTED = (
    "for a camera file ID.txt of the video at ...watch?v=KEY: ID.mp4 with one frame for each camera; KEY.mp4, the "
    "whole video; or ID/ or KEY/ with an image for each camera, named by its time in microseconds (TIME.png)"
)


class _Clip(NamedTuple):
    cameras: Path
    media: Path | None
    captions: tuple[str, ...]


def build_realestate10k(
    cameras: str | Path,
    media: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    shorter_side: int | None = None,
    keyframe_every: int | None = None,
    filters: FilterConfig | None = None,
    validation: float = 0.05,
    refuse_budget: float = 1.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Take in clips of still scenes with the camera of every frame.

    Args:
      cameras: folder of camera files, searched to any depth.
      media: folder of videos or of folders of frames; see `ACCEPTED`. Clips without any are left out and listed.
      out: folder of the data set.
      captions: table with the columns file (the name of the camera file) and caption.
      shorter_side: scale the clips down to this many pixels (never up).
      keyframe_every: frames between keyframes of clips that are encoded here; one second unless given.
      filters: which clips to keep.
      validation: share of the clips held out.
      refuse_budget: share of the clips that may be missing or damaged before the build stops.
      workers: clips read side by side; one for each processor unless given.
      overwrite, progress: as in `jvgen.data.builders.build_loop.assemble`.

    Raises:
      BuildError: more clips than the budget allows cannot be used, or all of them.
      ValueError: no folder, no camera files.
    """
    folder, places = Path(cameras).expanduser(), Path(media).expanduser()
    for name, path in (("cameras", folder), ("media", places)):
        if not path.is_dir():
            raise ValueError(f"{name} = {str(path)!r} is not a folder.")
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no camera files (ID.txt).")
    found = {} if captions is None else read_captions(folder, files, Path(captions).expanduser())
    there = {path.stem if path.is_file() else path.name: path for path in sorted(places.rglob("*")) if _is_media(path)}
    clips = [_Clip(path, _media_of(path, there), found.get(path, ())) for path in files]
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    tasks = [Task(side, name, clip) for side, name, clip in zip(split_of(names, validation), names, clips, strict=True)]
    filters = filters or FilterConfig()
    options = {
        "cameras": str(folder), "media": str(places), "shorter_side": shorter_side, "keyframe_every": keyframe_every,
        "validation": validation, "filters": dataclasses.asdict(filters),
    }  # fmt: skip
    return assemble(
        out, tasks, functools.partial(_record, shorter_side=shorter_side, keyframe_every=keyframe_every),
        description="Clips of still scenes with their cameras, from RealEstate10K.",
        metadata={"origin": "realestate10k", "options": json.loads(json.dumps(options))},
        filters=filters, refuse_budget=refuse_budget, workers=processors() if workers is None else workers,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _is_media(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() in VIDEO_SUFFIXES
    return any(child.suffix.lower() in IMAGE_SUFFIXES for child in path.iterdir())


def _media_of(cameras: Path, there: Mapping[str, Path]) -> Path | None:
    """What holds the frames of a camera file: named like it, or like the key in the address on its first line."""
    if cameras.stem in there:
        return there[cameras.stem]
    with cameras.open(encoding="utf-8-sig", errors="replace") as file:
        key = re.search(r"(?:v=|youtu\.be/)([\w-]+)", file.readline())
    return there.get(key[1]) if key else None


def _record(clip: _Clip, shorter_side: int | None, keyframe_every: int | None) -> Record:
    try:
        track = read_cameras(clip.cameras)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    if clip.media is None:
        raise DecodeError(f"has no video and no frames; accepted is, {ACCEPTED}")
    seconds = (track.timestamps[-1] - track.timestamps[0]) / 1e6
    if len(track) > 1 and seconds <= 0:
        raise DecodeError("its times do not rise")
    rate = (len(track) - 1) / seconds if len(track) > 1 else 1.0
    encoded = _encoded(clip, track, rate, keyframe_every)
    if shorter_side is not None:
        encoded = transcode(encoded, shorter_side=shorter_side, keyframe_every=keyframe_every)
    info = probe(encoded)
    return Record(
        id=clip.cameras.stem, kind="static", clips=(encoded,), captions=clip.captions, frames_per_second=rate,
        frames=len(track), height=info.height, width=info.width, intrinsics=track.intrinsics.astype(np.float32),
        extrinsics=track.extrinsics.astype(np.float32),
    )  # fmt: skip


def _encoded(clip: _Clip, track: CameraTrack, rate: float, keyframe_every: int | None) -> bytes:
    """The clip with exactly one frame for each camera."""
    if clip.media.is_dir():
        frames = [_image_at(clip.media, int(time)) for time in track.timestamps]
        if len({frame.shape for frame in frames}) > 1:
            raise DecodeError(f"the images in {clip.media} differ in size")
        return encode_video(np.stack(frames), rate, keyframe_every=keyframe_every)
    video = clip.media.read_bytes()
    info = probe(video)
    if clip.media.stem == clip.cameras.stem:
        if info.frames != len(track):
            raise DecodeError(f"{clip.media.name} has {info.frames} frames for {len(track)} cameras")
        return video
    if info.frames_per_second <= 0:
        raise DecodeError(f"{clip.media.name} has no frame rate")
    numbers = np.rint(track.timestamps / 1e6 * info.frames_per_second).astype(int)
    if numbers[-1] >= info.frames:
        raise DecodeError(
            f"{clip.media.name} ends at {info.frames / info.frames_per_second:.2f} s, before the last camera at "
            f"{track.timestamps[-1] / 1e6:.2f} s"
        )
    return encode_video(decode_window(video, numbers.tolist()), rate, keyframe_every=keyframe_every)


def _image_at(folder: Path, time: int) -> np.ndarray:
    path = next(
        (folder / f"{time}{suffix}" for suffix in IMAGE_SUFFIXES if (folder / f"{time}{suffix}").is_file()), None
    )
    if path is None:
        raise DecodeError(f"{folder} has no image of the time {time}")
    return decode_window(path.read_bytes(), [0])[0]
