"""Builds data sets of images or videos whose cameras others have found: nerfstudio, COLMAP, CO3D, SpatialVID."""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jvgen import storage
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
from jvgen.data.builders.jobs import nothing_held_out
from jvgen.data.builders.recorded_files import files_in, name_of
from jvgen.data.image_files import decode_image, exif_orientation
from jvgen.data.store.records import Record
from jvgen.data.transcoding import at_shorter_side, repeated
from jvgen.data.undistortion import undistorted
from jvgen.data.video_files import DecodeError, encode_stream, probe_file, timed_frames
from jvgen.geometry.formats.co3d import read_co3d
from jvgen.geometry.formats.colmap import read_colmap
from jvgen.geometry.formats.nerfstudio import read_nerfstudio
from jvgen.geometry.formats.posed_images import PosedImages
from jvgen.geometry.formats.spatialvid import POSES, read_spatialvid
from jvgen.storage import recordings

Format = Literal["nerfstudio", "colmap", "co3d", "spatialvid"]
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "nerfstudio": (("transforms.json",), "SCENE/transforms.json with the images that it names (DL3DV)"),
    "colmap": (("images.bin", "images.txt"), "SCENE/sparse/0/ with cameras and images, and SCENE/images/ (MVImgNet)"),
    "co3d": (("frame_annotations.jgz",), "CATEGORY/frame_annotations.jgz and CATEGORY/SEQUENCE/images/ (CO3Dv2)"),
    "spatialvid": ((POSES,), "annotations/GROUP/CLIP/ with poses.npy, and videos/GROUP/CLIP.mp4 (SpatialVID)"),
}
"""Names of the camera files of each format, and where they are."""
SMALLER = ("images_2", "images_4", "images_8")
"""Folders with the same images downscaled, as nerfstudio and DL3DV name them."""
_SCENES_PER_UNIT = 16
# Images may be resized by rounding to whole pixels.
_ASPECT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class PosedOptions:
    """How frames are stored.

    Attributes:
      shorter_side: downscale larger frames to this many pixels.
      keyframe_every: keyframe interval in frames; one second by default.
      frames_per_second: rate to store where the cameras have no times.
    """

    shorter_side: int | None = None
    keyframe_every: int | None = None
    frames_per_second: float = 10.0

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        if self.shorter_side is not None and self.shorter_side < 2:
            raise ValueError(f"shorter_side = {self.shorter_side}: at least 2 pixels.")
        if self.keyframe_every is not None and self.keyframe_every < 1:
            raise ValueError(f"keyframe_every = {self.keyframe_every}: at least 1 frame.")
        if not self.frames_per_second > 0:
            raise ValueError(f"frames_per_second = {self.frames_per_second}: must be positive.")


class Scene(NamedTuple):
    """Cameras, and where their images are.

    Attributes:
      id: of its record.
      format: of its camera file.
      folder: of the data set: no image is read from outside of it.
      path: the camera file.
      captions: of the scene.
      cameras: where they have been read already, or why they cannot be.
    """

    id: str
    format: str
    folder: Path
    path: Path
    captions: tuple[str, ...] = ()
    cameras: PosedImages | ValueError | None = None


class _Frames(NamedTuple):
    """Frames in order, with their cameras, and the seconds at which they were taken (none if unknown)."""

    pixels: Iterator[np.ndarray]
    cameras: PosedImages
    seconds: np.ndarray
    captions: tuple[str, ...] = ()
    caption_names: tuple[str, ...] = ()


def build_posed(
    folder: str | Path,
    out: str | Path,
    format: Format,
    options: PosedOptions | None = None,
    *,
    captions: str | Path | None = None,
    filters: FilterConfig | None = None,
    validation: float = 0.05,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of clips with a camera for every frame.

    Cameras become those of `jvgen.geometry.cameras`: world-to-camera with OpenCV axes, normalized intrinsics. Images of
    lenses with distortion are undistorted. Scenes are "static", clips of SpatialVID "dynamic".

    Args:
      folder: searched recursively for camera files; see `FORMATS`.
      out: folder of the data set.
      format: of the camera files.
      options: how frames are stored.
      captions: table with the columns file (id of the scene: the path of its folder) and caption.
      filters: which clips to keep.
      validation: fraction of the scenes held out.
      error_budget: fraction of the scenes that may be missing or corrupt.
      workers: scenes read in parallel; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: more unusable scenes than the budget allows; lists them.
      ValueError: no folder, no camera files, an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: {', '.join(FORMATS)}.")
    options = options or PosedOptions()
    options.validate()
    folder = recordings(folder)
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    scenes = find_scenes(folder, format)
    warning = ""
    if captions is not None:
        places = {folder / scene.id: scene for scene in scenes}
        found = read_captions(folder, list(places), recordings(captions))
        scenes = [scene._replace(captions=found.texts.get(place, ())) for place, scene in places.items()]
        warning = found.warning
    filters = filters or FilterConfig()
    kept = {
        "folder": str(folder), "format": format, **dataclasses.asdict(options), "validation": validation,
        "filters": dataclasses.asdict(filters),
    }  # fmt: skip
    # COLMAP may have several models of one scene.
    roots = [str(_root(scene.path)) if format == "colmap" else scene.id for scene in scenes]
    splits = assign_splits([scene.id for scene in scenes], validation, roots)
    jobs = [
        BuildJob(split, scene.id, scene, json.dumps(scene.captions))
        for split, scene in zip(splits, scenes, strict=True)
    ]
    execution = execution or Execution()
    if execution.jobs_per_unit is None:
        execution = dataclasses.replace(execution, jobs_per_unit=_SCENES_PER_UNIT)
    summary = build_dataset(
        out, jobs, functools.partial(scene_record, options=options),
        description=f"Clips with their cameras, from {format}.",
        metadata={"origin": "posed", "options": json.loads(json.dumps(kept))},
        filters=filters, error_budget=error_budget, workers=available_cpus() if workers is None else workers,
        processes=len(jobs) >= FEW_JOBS, overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip
    return summary.warned(warning, nothing_held_out(splits, validation, summary.digests, summary.records))


def find_scenes(folder: Path, format: Format) -> list[Scene]:
    """The scenes of a folder, by their ids.

    Raises:
      ValueError: there is none, or annotations of CO3D that are not a list.
    """
    names, where = FORMATS[format]
    paths = [path for path in files_in(folder) if path.name in names]
    if format == "co3d":
        scenes = [
            Scene(f"{name_of(path.parent, folder)}/{name}", format, folder, path, (), cameras)
            for path in paths
            for name, cameras in read_co3d(path).items()
        ]
    elif format == "colmap":
        models = dict.fromkeys(path.parent for path in paths)
        roots = [_root(model) for model in models]
        count = collections.Counter(roots)
        # COLMAP makes several models of images that it cannot join.
        scenes = [
            Scene(name_of(root if count[root] == 1 else model, folder), format, folder, model)
            for model, root in zip(models, roots, strict=True)
        ]
    else:
        scenes = [Scene(name_of(path.parent, folder), format, folder, path) for path in paths]
    if not scenes:
        raise ValueError(f"{folder} has no {' or '.join(names)} at any depth; expected {where}.")
    named = [scene._replace(id=folder.resolve().name) if scene.id == "." else scene for scene in scenes]
    return sorted(named, key=lambda scene: scene.id)


def scene_record(scene: Scene, options: PosedOptions) -> Made:
    """The record of a scene; raises `DecodeError` for cameras and images that do not fit."""
    try:
        frames = _video_frames(scene) if scene.format == "spatialvid" else _image_frames(scene)
    except storage.StorageError:
        raise
    except ValueError as error:
        raise DecodeError(str(error)) from error
    cameras = frames.cameras
    rate, times = _timing(frames.seconds, options.frames_per_second)
    found = _Stored(cameras, options.shorter_side)
    clip = encode_stream(
        found.stored(frames.pixels), rate, times=times if len(times) else None, keyframe_every=options.keyframe_every
    )
    if found.count != len(cameras):
        raise DecodeError(f"{scene.path} has {len(cameras)} cameras for {found.count} frames")
    height, width = found.size
    record = Record(
        id=scene.id, kind="dynamic" if scene.format == "spatialvid" else "static", clips=(clip,),
        captions=scene.captions or frames.captions, caption_names=() if scene.captions else frames.caption_names,
        frames_per_second=rate, frames=len(cameras), height=height, width=width, frame_times=times,
        intrinsics=found.intrinsics.astype(np.float32), extrinsics=cameras.extrinsics.astype(np.float32),
    )  # fmt: skip
    return Made((record,), ("undistorted",) if cameras.distortion.any() else ())


class _Stored:
    """Frames on their way to the encoder: undistorted, checked, downscaled.

    Attributes:
      intrinsics: float64 (F, 4), of the stored frames.
      size: height and width of these.
      count: how many there are.
    """

    def __init__(self, cameras: PosedImages, shorter_side: int | None):
        self._cameras = cameras
        self._shorter_side = shorter_side
        self.intrinsics = cameras.intrinsics.copy()
        self.size: tuple[int, int] = (0, 0)
        self.count = 0

    def stored(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for number, (frame, name) in enumerate(zip(frames, self._cameras.names, strict=False)):
            calibrated = self._cameras.sizes[number]
            height, width = frame.shape[:2]
            if calibrated.all() and not _fits((height, width), calibrated):
                raise DecodeError(
                    f"{name} is {width}x{height}, its camera is of {calibrated[1]}x{calibrated[0]}: the image is "
                    "cropped or turned"
                )
            if self._cameras.distortion[number].any():
                frame, self.intrinsics[number] = undistorted(
                    frame, self._cameras.intrinsics[number], self._cameras.distortion[number]
                )
            frame = at_shorter_side(frame, self._shorter_side)
            if self.count and frame.shape[:2] != self.size:
                raise DecodeError(f"its images change size: {name} is {width}x{height}")
            self.size, self.count = frame.shape[:2], self.count + 1
            yield frame


def _image_frames(scene: Scene) -> _Frames:
    if isinstance(scene.cameras, ValueError):
        raise scene.cameras
    if scene.format == "nerfstudio":
        cameras, base = read_nerfstudio(scene.path), scene.path.parent
    elif scene.format == "colmap":
        cameras, base = read_colmap(scene.path), _root(scene.path)
    else:
        cameras, base = scene.cameras, scene.path.parent.parent
    paths = _paths(scene, base, cameras.names)
    pixels = (_image(path, size) for path, size in zip(paths, cameras.sizes, strict=True))
    return _Frames(pixels, cameras, cameras.seconds)


def _image(path: Path, calibrated: np.ndarray) -> np.ndarray:
    content = path.read_bytes()
    frame, orientation = decode_image(content), exif_orientation(content)
    stored = frame.shape[:2] if orientation < 5 else frame.shape[1::-1]
    if orientation != 1 and _fits(stored, calibrated):
        raise DecodeError(
            f"{path.name} is stored turned, as its EXIF says, and so its camera was found: save it without EXIF"
        )
    return frame


def _fits(size: Sequence[int], calibrated: np.ndarray) -> bool:
    """Whether an image of this height and width may be one that was calibrated, resized."""
    return abs(size[1] * calibrated[0] / (size[0] * calibrated[1]) - 1) <= _ASPECT_TOLERANCE


def _paths(scene: Scene, base: Path, names: Sequence[str]) -> list[Path]:
    """The files of the images, all in one folder of several that have them at other sizes."""
    if scene.format == "colmap":
        ways = [[base / folder / name for name in names] for folder in ("images", *SMALLER, ".")]
    else:
        ways = [[base / name for name in names]]
        if all(name.startswith("images/") for name in names):
            ways += [[base / folder / name.removeprefix("images/") for name in names] for folder in SMALLER]
    for way in ways:
        outside = next((name for name, path in zip(names, way, strict=True) if not _is_below(scene.folder, path)), None)
        if outside is not None:
            raise DecodeError(f"{scene.path}: the image {outside!r} is outside of {scene.folder}")
    missing = [[path for path in way if not path.is_file()] for way in ways]
    best = min(range(len(ways)), key=lambda way: len(missing[way]))
    if missing[best]:
        raise DecodeError(
            f"{scene.path}: {len(missing[best])} of {len(names)} images are missing, such as {missing[best][0]}"
        )
    return ways[best]


def _video_frames(scene: Scene) -> _Frames:
    numbers, cameras = read_spatialvid(scene.path.parent)
    place = name_of(scene.path.parent, scene.folder)
    above, marker, clip = place.partition("annotations/")
    video = scene.folder / (above if marker else "") / "videos" / f"{clip if marker else place}.mp4"
    if not video.is_file():
        raise DecodeError(f"{scene.path}: has no video {video}")
    info = probe_file(video)
    if numbers is None and info.frames != len(cameras):
        raise DecodeError(f"{scene.path} has {len(cameras)} cameras for the {info.frames} frames of {video.name}")
    numbers = np.arange(info.frames) if numbers is None else numbers
    if len(numbers) and numbers[-1] >= info.frames:
        raise DecodeError(f"{scene.path}: has a camera of frame {numbers[-1]}; {video.name} has {info.frames} frames")
    times = info.times if len(info.times) else np.arange(info.frames) / (info.frames_per_second or 1.0)
    texts = _captions(scene.path.parent / "caption.json")
    pixels = repeated((frame for frame, _ in timed_frames(video)), numbers)
    return _Frames(pixels, cameras, times[numbers], tuple(texts.values()), tuple(texts))


def _captions(path: Path) -> dict[str, str]:
    """The texts of a caption file by their names; none without one."""
    if not path.is_file():
        return {}
    content = storage.read_json_object(path)
    return {name: text.strip() for name, text in content.items() if isinstance(text, str) and text.strip()}


def _timing(seconds: np.ndarray, default: float) -> tuple[float, np.ndarray]:
    """Frame rate, and the times of the frames if they do not follow from it."""
    if len(seconds) < 2:
        return default, np.zeros(0)
    seconds = seconds - seconds[0]
    if (np.diff(seconds) <= 0).any():
        raise DecodeError("the times of its frames do not increase")
    rate = float((len(seconds) - 1) / seconds[-1])
    even = np.abs(seconds - np.arange(len(seconds)) / rate).max() * rate <= 0.5
    return rate, np.zeros(0) if even else seconds


def _root(model: Path) -> Path:
    """The folder of a scene from that of its sparse model: above sparse/0, sparse, colmap/sparse/0."""
    folder = model
    if folder.name.isdecimal() and folder.parent.name == "sparse":
        folder = folder.parent
    if folder.name == "sparse":
        folder = folder.parent
    return folder.parent if folder.name == "colmap" else folder


def _is_below(folder: Path, path: Path) -> bool:
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(folder), ""))
