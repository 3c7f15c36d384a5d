"""Builds a data set from RealEstate10K: camera files and videos or frames (Zhou et al. 2018, arXiv 1805.09817)."""

import collections
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jvgen.data.builders.build_loop import (
    FEW_JOBS,
    BuildJob,
    Execution,
    FilterConfig,
    Progress,
    Summary,
    assign_splits,
    available_cpus,
    build_dataset,
)
from jvgen.data.builders.captions import Captions, read_captions
from jvgen.data.builders.jobs import nothing_held_out
from jvgen.data.builders.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from jvgen.data.builders.recorded_files import files_in, name_of, suffixed
from jvgen.data.store.records import Record
from jvgen.data.transcoding import transcode
from jvgen.data.video_files import DecodeError, decode_window, encode_video, inspect, probe
from jvgen.geometry.camera_file import CameraTrack, read_cameras
from jvgen.storage import recordings

ACCEPTED = (
    "for a camera file ID.txt of the video at ...watch?v=KEY: ID.mp4 with one frame per camera; KEY.mp4, the whole "
    "video; or ID/ or KEY/ with one image per camera, named by its timestamp in microseconds (TIME.png)"
)


class _Clip(NamedTuple):
    cameras: Path
    id: str
    media: tuple[Path, ...]  # what may be its video or its frames: exactly one, if it is usable
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
    error_budget: float = 1.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of clips of static scenes with a camera for every frame.

    Args:
      cameras: folder of camera files, searched recursively.
      media: folder of videos or of folders of frames; see `ACCEPTED`. Clips without media are rejected and logged.
      out: folder of the data set.
      captions: table with the columns file (name of the camera file) and caption.
      shorter_side: downscale larger clips to this many pixels.
      keyframe_every: keyframe interval of re-encoded clips, in frames; one second by default.
      filters: which clips to keep.
      validation: fraction of the videos held out, with all clips of each.
      error_budget: fraction of the clips that may be missing or corrupt.
      workers: clips read in parallel; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: more unusable clips than the budget allows, or no usable one.
      ValueError: no folder, no camera files.
    """
    folder, media_folder = recordings(cameras), recordings(media)
    for name, path in (("cameras", folder), ("media", media_folder)):
        if not path.is_dir():
            raise ValueError(f"{name} = {str(path)!r} is not a folder.")
    files = suffixed(files_in(folder), (".txt",))
    if not files:
        raise ValueError(f"{folder} contains no camera files (ID.txt).")
    found = Captions({}) if captions is None else read_captions(folder, files, recordings(captions))
    names = [name_of(path.with_suffix(""), folder) for path in files]
    # Parts of RealEstate10K (train, test) may have files of the same name.
    stems = collections.Counter(path.stem for path in files)
    ids = [path.stem if stems[path.stem] == 1 else name for path, name in zip(files, names, strict=True)]
    by_name, keys = _media_by_name(media_folder), [_video_key(path) for path in files]
    clips = [
        _Clip(path, id, by_name.get(path.stem) or by_name.get(key, ()), found.texts.get(path, ()))
        for path, id, key in zip(files, ids, keys, strict=True)
    ]
    # Videos have several clips.
    splits = assign_splits(names, validation, [key or name for key, name in zip(keys, names, strict=True)])
    jobs = [
        BuildJob(split, clip.id, clip, json.dumps(clip.captions), next(iter(clip.media), None))
        for split, clip in zip(splits, clips, strict=True)
    ]
    filters = filters or FilterConfig()
    options = {
        "cameras": str(folder), "media": str(media_folder), "shorter_side": shorter_side,
        "keyframe_every": keyframe_every, "validation": validation, "filters": dataclasses.asdict(filters),
    }  # fmt: skip
    summary = build_dataset(
        out, jobs, functools.partial(_record, shorter_side=shorter_side, keyframe_every=keyframe_every),
        description="Clips of still scenes with their cameras, from RealEstate10K.",
        metadata={"origin": "realestate10k", "options": json.loads(json.dumps(options))},
        filters=filters, error_budget=error_budget, workers=available_cpus() if workers is None else workers,
        processes=len(jobs) >= FEW_JOBS,
        overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip
    return summary.warned(found.warning, nothing_held_out(splits, validation, summary.digests, summary.records))


def _media_by_name(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Videos by their names without extension, and folders of images by theirs."""
    found: dict[str, list[Path]] = {}
    folders = set()
    for path in files_in(folder):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.setdefault(path.stem, []).append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.parent not in folders:
            folders.add(path.parent)
            found.setdefault(path.parent.name, []).append(path.parent)
    return {name: tuple(paths) for name, paths in found.items()}


def _video_key(cameras: Path) -> str:
    """Key of the video in the first line of a camera file; "" without one."""
    try:
        with cameras.open(encoding="utf-8-sig", errors="replace") as file:
            key = re.search(r"(?:v=|youtu\.be/)([\w-]+)", file.readline())
    except OSError:
        return ""  # Reading the cameras will say why.
    return key[1] if key else ""


def _record(clip: _Clip, shorter_side: int | None, keyframe_every: int | None) -> Record:
    try:
        track = read_cameras(clip.cameras)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    if not clip.media:
        raise DecodeError(f"has neither a video nor frames; accepted, {ACCEPTED}")
    if len(clip.media) > 1:
        raise DecodeError(f"{clip.media[0]} and {clip.media[1]} have its name; keep one")
    seconds = (track.timestamps[-1] - track.timestamps[0]) / 1e6
    if len(track) > 1 and seconds <= 0:
        raise DecodeError("its timestamps do not increase")
    rate = (len(track) - 1) / seconds if len(track) > 1 else 1.0
    encoded = _encoded(clip, track, rate, keyframe_every)
    if shorter_side is not None:
        encoded = transcode(encoded, shorter_side=shorter_side, keyframe_every=keyframe_every)
    info = probe(encoded)
    if info.frames != len(track):
        raise DecodeError(f"{info.frames} frames can be decoded for {len(track)} cameras")
    return Record(
        id=clip.id, kind="static", clips=(encoded,), captions=clip.captions, frames_per_second=rate,
        frames=len(track), height=info.height, width=info.width, intrinsics=track.intrinsics.astype(np.float32),
        extrinsics=track.extrinsics.astype(np.float32),
    )  # fmt: skip


def _encoded(clip: _Clip, track: CameraTrack, rate: float, keyframe_every: int | None) -> bytes:
    """The encoded clip, with exactly one frame per camera."""
    [media] = clip.media
    if media.is_dir():
        frames = [_image_at(media, int(time)) for time in track.timestamps]
        if len({frame.shape for frame in frames}) > 1:
            raise DecodeError(f"the images in {media} differ in size")
        return encode_video(np.stack(frames), rate, keyframe_every=keyframe_every)
    video = media.read_bytes()
    if media.stem == clip.cameras.stem:
        info = inspect(video)
        if info.frames != len(track):
            raise DecodeError(f"{media.name} has {info.frames} frames for {len(track)} cameras")
        # Where packets do not tell which frame is which, cameras would be those of other frames.
        return video if info.faithful else transcode(video, keyframe_every=keyframe_every)
    info = probe(video)
    if info.frames_per_second <= 0:
        raise DecodeError(f"{media.name} has no frame rate")
    times = info.times if len(info.times) else np.arange(info.frames) / info.frames_per_second
    wanted = track.timestamps / 1e6
    ends = times[-1] + 1 / info.frames_per_second
    if wanted[-1] >= ends:
        raise DecodeError(f"{media.name} ends at {ends:.2f} s, before the last camera at {wanted[-1]:.2f} s")
    after = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    before = after - 1
    nearest = np.where(wanted - times[before] <= times[np.minimum(after, len(times) - 1)] - wanted, before, after)
    numbers = np.minimum(nearest, len(times) - 1)
    return encode_video(decode_window(video, numbers.tolist()), rate, keyframe_every=keyframe_every)


def _image_at(folder: Path, time: int) -> np.ndarray:
    path = next(
        (folder / f"{time}{suffix}" for suffix in IMAGE_SUFFIXES if (folder / f"{time}{suffix}").is_file()), None
    )
    if path is None:
        raise DecodeError(f"{folder} has no image for timestamp {time}")
    return decode_window(path.read_bytes(), [0])[0]
