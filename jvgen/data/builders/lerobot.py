"""Builds data sets from LeRobot data sets of format v3: episodes one after the other in Parquet and mp4 files.

    meta/info.json                                   frame rate, features, where files are
    meta/episodes/chunk-000/file-000.parquet         a row per episode: tasks, length, its rows and files, its times
    data/chunk-000/file-000.parquet                  a row per frame: actions, rewards, states
    videos/CAMERA/chunk-000/file-000.mp4             the frames of many episodes

Index t of actions and rewards was taken at frame t. States are not stored: a record has no place for them.
"""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from jvgen.data.builders.recorded_files import files_in
from jvgen.data.builders.robot_episodes import ACTION_KEYS, EpisodeOptions, by_frame, fit_width
from jvgen.data.image_files import decode_image
from jvgen.data.store.records import Record
from jvgen.data.transcoding import cut_out
from jvgen.data.video_files import DecodeError, encode_stream, probe
from jvgen.storage import read_json_object, reading, recordings

INFO = "meta/info.json"
REWARDS = ("next.reward", "reward")
_COLUMNS = ("episode_index", "tasks", "length", "data/chunk_index", "data/file_index")
_VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp")


class Camera(NamedTuple):
    """A feature of frames: its name, and whether frames are in videos rather than in the Parquet files."""

    name: str
    in_videos: bool


class LeRobotEpisode(NamedTuple):
    """An episode, and where it is.

    Attributes:
      number: its `episode_index`.
      length: frames.
      tasks: instructions.
      data: Parquet file of its rows.
      camera: whose frames are read.
      video: file of these, None if they are in `data`.
      start: seconds in the video at which the episode begins.
      columns: of `data` that are read: actions, then the reward, if there is one.
    """

    number: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    camera: Camera
    video: Path | None
    start: float
    actions: tuple[str, ...]
    reward: str | None


def build_lerobot(
    folder: str | Path,
    out: str | Path,
    options: EpisodeOptions | None = None,
    *,
    validation: float = 0.05,
    min_frames: int = 1,
    error_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of the episodes of a LeRobot data set, with actions and rewards. Captions are their tasks.

    Args:
      folder: of the data set.
      out: folder of the new one.
      options: as for other robot episodes; the frame rate is the data set's own. `camera` may be the last part of its
        name.
      validation: fraction of the episodes held out.
      min_frames: reject shorter episodes.
      error_budget: fraction of the episodes that may be corrupt.
      workers: episodes read in parallel; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: more corrupt episodes than the budget allows; lists them.
      ValueError: no data set, one of another version, a camera that it does not have, several without a choice.
    """
    options = options or EpisodeOptions()
    options.validate()
    folder = recordings(folder)
    info = _info(folder)
    rate = float(info["fps"])
    episodes = find_episodes(folder, info, options)
    names = [f"episode_{episode.number:06d}" for episode in episodes]
    splits = assign_splits(names, validation)
    kept = {"folder": str(folder), **dataclasses.asdict(options), "frames_per_second": rate, "validation": validation}
    jobs = [
        BuildJob(split, name, episode, json.dumps([episode.length, episode.tasks, episode.start]), episode.video)
        for split, name, episode in zip(splits, names, episodes, strict=True)
    ]
    return build_dataset(
        out, jobs, functools.partial(episode_record, options=options, rate=rate),
        description="Robot episodes of a LeRobot data set.",
        metadata={"origin": "lerobot", "options": json.loads(json.dumps(kept))},
        filters=FilterConfig(min_frames=min_frames), error_budget=error_budget,
        workers=available_cpus() if workers is None else workers, processes=len(jobs) >= FEW_JOBS,
        overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip


def find_episodes(folder: Path, info: Mapping[str, Any], options: EpisodeOptions) -> list[LeRobotEpisode]:
    """The episodes that `meta/episodes` lists, by their numbers; raises as `build_lerobot`."""
    features = info["features"]
    camera = _camera(features, options.camera)
    actions: tuple[str, ...] = ()
    reward = None
    if options.actions:
        single = next((name for name in ACTION_KEYS if name in features), None)
        parts = tuple(sorted(name for name in features if name.startswith("action.")))
        actions = (single,) if single else parts
        reward = next((name for name in REWARDS if name in features), None)
    prefix = f"videos/{camera.name}/"
    columns = [*_COLUMNS, *(prefix + name for name in _VIDEO_COLUMNS if camera.in_videos)]
    tables = [path for path in files_in(folder / "meta" / "episodes") if path.suffix == ".parquet"]
    if not tables:
        raise ValueError(f"{folder}: has no Parquet files in meta/episodes; copy the data set again.")
    episodes = []
    for path in tables:
        for row in _rows(path, columns):
            data = _file(folder, info, "data_path", row["data/chunk_index"], row["data/file_index"])
            video, start = None, 0.0
            if camera.in_videos:
                chunk, file, start = (row[prefix + name] for name in _VIDEO_COLUMNS)
                video = _file(folder, info, "video_path", chunk, file, camera.name)
            episodes.append(
                LeRobotEpisode(
                    int(row["episode_index"]), int(row["length"]), tuple(map(str, row["tasks"] or ())), data, camera,
                    video, float(start), actions, reward,
                )
            )  # fmt: skip
    episodes.sort(key=lambda episode: episode.number)
    repeated = [one.number for one, other in zip(episodes, episodes[1:], strict=False) if one.number == other.number]
    if repeated:
        raise ValueError(f"{folder}: meta/episodes lists episode {repeated[0]} twice; copy the data set again.")
    return episodes


def episode_record(episode: LeRobotEpisode, options: EpisodeOptions, rate: float) -> Record:
    """The record of an episode; raises `DecodeError` for files and rows that do not fit."""
    if episode.length < 1:
        raise DecodeError(f"its length is {episode.length}")
    inline = () if episode.camera.in_videos else (episode.camera.name,)
    columns = [*episode.actions, *([episode.reward] if episode.reward else []), *inline]
    rows = _values(episode, columns)
    encoding = {"quality": options.quality, "keyframe_every": options.keyframe_every, "full_color": True}
    if episode.video is None:
        clip = encode_stream(_images(rows[episode.camera.name]), rate, **encoding)
    else:
        if not episode.video.is_file():
            raise DecodeError(f"{episode.video}: no such file")
        half = 0.5 / rate
        start = max(0.0, episode.start - half)
        try:
            clip = cut_out(episode.video, start, episode.start + episode.length / rate - half, **encoding)
        except DecodeError as error:
            raise DecodeError(f"{episode.video}: {error}") from error
    info = probe(clip)
    if info.frames != episode.length:
        place = f"{episode.video} from {episode.start:.3f} s on" if episode.video else str(episode.data)
        raise DecodeError(f"{place} has {info.frames} frames for {episode.length} rows")
    action_parts = [by_frame(rows[name], episode.length, shifted=False, what=name) for name in episode.actions]
    actions = np.concatenate(action_parts, axis=1) if action_parts else np.zeros((0, 0), np.float32)
    if options.action_width is not None and actions.size:
        actions = fit_width(actions, None, options.action_width)
    if options.clip_actions is not None and actions.size:
        actions = np.clip(actions, *options.clip_actions)
    rewards = np.zeros(0, np.float32)
    if episode.reward:
        rewards = by_frame(rows[episode.reward], episode.length, shifted=False, what=episode.reward)[:, 0]
    return Record(
        id=f"episode_{episode.number:06d}", kind="dynamic", clips=(clip,), captions=episode.tasks,
        frames_per_second=rate, frames=episode.length, height=info.height, width=info.width, actions=actions,
        rewards=rewards,
    )  # fmt: skip


def _info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    if not path.is_file():
        raise ValueError(f"folder = {str(folder)!r} is no LeRobot data set: it has no {INFO}.")
    info = read_json_object(path)
    version = str(info.get("codebase_version", "missing"))
    if not version.startswith("v3"):
        raise ValueError(
            f"{path}: codebase_version is {version}; v3 is read. Convert it with LeRobot's own "
            "convert_dataset_v21_to_v30."
        )
    rules = {
        "fps": (lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0, "a rate"),
        "features": (
            lambda value: isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()),
            "objects",
        ),
        "data_path": (lambda value: isinstance(value, str), "a path with {chunk_index} and {file_index}"),
    }
    for field, (fits, expected) in rules.items():
        if not fits(info.get(field)):
            raise ValueError(f"{path}: {field} is {repr(info.get(field))[:60]}; expected {expected}.")
    return info


def _camera(features: Mapping[str, Mapping[str, Any]], wanted: str | None) -> Camera:
    kinds = {name: feature.get("dtype") for name, feature in features.items()}
    cameras = [
        Camera(name, kind == "video")
        for name, kind in kinds.items()
        if kind in ("video", "image") and not _is_depth(features[name])
    ]
    names = [camera.name for camera in cameras]
    if wanted is None and len(cameras) == 1:
        return cameras[0]
    found = [camera for camera in cameras if wanted in (camera.name, camera.name.rpartition(".")[2])]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(names) or "none"
    if wanted is None:
        raise ValueError(f"the data set has {len(cameras)} cameras ({listed}): select one (--camera).")
    near = difflib.get_close_matches(wanted, [*names, *(name.rpartition(".")[2] for name in names)], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"camera = {wanted!r}: the data set has no such camera.{hint} Its cameras: {listed}.")


def _is_depth(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    return bool(info.get("video.is_depth_map"))


def _file(folder: Path, info: Mapping[str, Any], field: str, chunk: Any, file: Any, camera: str = "") -> Path:
    template = info.get(field)
    try:
        path = folder / template.format(chunk_index=int(chunk), file_index=int(file), video_key=camera)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder / INFO}: {field} = {template!r} is no path with {{chunk_index}} and {{file_index}}."
        ) from None
    if not os.path.normpath(path).startswith(os.path.join(os.path.normpath(folder), "")):
        raise ValueError(f"{folder / INFO}: {field} = {template!r} leads out of the folder.")
    return path


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet

    with reading(path, "cannot be read as Parquet"):
        names = pyarrow.parquet.read_schema(path).names
        missing = next((name for name in columns if name not in names), None)
        if missing is None:
            return pyarrow.parquet.read_table(path, columns=list(columns), use_threads=False).to_pylist()
    near = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    raise ValueError(f"{path}: has no column {missing!r}." + (f" Did you mean {near[0]}?" if near else ""))


def _values(episode: LeRobotEpisode, columns: Sequence[str]) -> dict[str, Any]:
    """The columns of an episode: arrays (T, ...), of pictures lists."""
    import pyarrow
    import pyarrow.parquet

    path = episode.data
    if not columns:
        return {}
    try:
        names = pyarrow.parquet.read_schema(path).names
        for name in ("episode_index", "frame_index", *columns):
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                raise DecodeError(f"{path}: has no column {name!r}." + (f" Did you mean {near[0]}?" if near else ""))
        table = pyarrow.parquet.read_table(
            path,
            columns=["frame_index", *columns],
            filters=[("episode_index", "==", episode.number)],
            use_threads=False,
        )
    except (OSError, pyarrow.ArrowException) as error:
        raise DecodeError(f"{path}: cannot be read as Parquet ({error})") from error
    if len(table) != episode.length:
        raise DecodeError(f"{path}: has {len(table)} rows of the episode, which has {episode.length} frames")
    table = table.sort_by("frame_index")
    found: dict[str, Any] = {}
    for name in columns:
        values = table.column(name).to_pylist()
        if name == episode.camera.name:
            found[name] = values
            continue
        try:
            array = np.array(values)
        except ValueError:
            raise DecodeError(f"{path}: {name} changes its length within the episode") from None
        if array.dtype.kind not in "fiub":
            raise DecodeError(f"{path}: {name} is not made of numbers but of {type(values[0]).__name__}")
        found[name] = array.astype(np.float32)
    return found


def _images(values: Sequence[Any]) -> Iterator[np.ndarray]:
    for number, value in enumerate(values):
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise DecodeError(f"the picture of frame {number} is not in the Parquet file")
        yield decode_image(content)
