"""Builds data sets of robot episodes: frames with the action and reward of each.

Two layouts are distinguished by their arrays (T frames):

    Meta-World  observation (T, 3k, H, W) uint8: k stacked frames, newest last; action, reward (T, ...): index 0 is the
                reset, index t led to observation t
    others      an array of frames (T, H, W, 3), by default one of `FRAME_KEYS` or the only such array; optionally
                action (T or T-1, A) and reward (T or T-1,): index t was taken at frame t

The second layout is that of Open X-Embodiment (RLDS), RoboNet and VP2 (hdf5), and of iVideoGPT's converters for them
and for BAIR (npz); folders of numbered images (Something-Something) are the same without actions.
`jvgen.data.builders.episode_files` finds and reads the files.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from jvgen.data.builders.episode_files import EncodedFrames, Episode, find_episodes, frame_arrays, read_numpy
from jvgen.data.store.records import Record
from jvgen.data.video_files import DecodeError, encode_video
from jvgen.storage import recordings

STACKED = "observation"
FRAME_KEYS = ("image", "video", "frames", "rgb", "cam0", "camera_image", "agentview_shift_2_image")
ACTION_KEYS = ("action", "actions")
REWARD_KEYS = ("reward", "rewards")
# Folder names with these parts are file names and not descriptions of an episode.
NOT_CAPTIONS = (".tfrecord-", ".array_record-", ".hdf5", ".h5")


@dataclasses.dataclass(frozen=True)
class EpisodeOptions:
    """How files are read and frames are stored.

    Attributes:
      camera: name of the array of frames; None to detect it.
      clip_actions: bounds to clip actions to, as the simulator does; None to disable.
      action_width: components per action: shorter actions are padded with zeros, longer ones truncated, as in iVideoGPT
        for RoboNet; an automatic gripper is appended as the last component. None to keep actions as recorded.
      frames_per_second: frame rate to store; the files do not record it.
      quality: constant rate factor (CRF) of the encoded clips.
      keyframe_every: keyframe interval in frames; short intervals make windows cheap to decode.
      actions: store actions and rewards if the files have them.
      checksums: check the checksums of TFRecord files; some programs write zeros.
    """

    camera: str | None = None
    clip_actions: tuple[float, float] | None = None
    action_width: int | None = None
    frames_per_second: float = 10.0
    quality: int = 10
    keyframe_every: int = 8
    actions: bool = True
    checksums: bool = True

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        if self.clip_actions is not None and not self.clip_actions[0] < self.clip_actions[1]:
            raise ValueError(f"clip_actions = {self.clip_actions}: the lower bound, then a higher one.")
        if self.action_width is not None and self.action_width < 1:
            raise ValueError(f"action_width = {self.action_width}: at least 1, or none to keep actions as recorded.")
        if not self.frames_per_second > 0:
            raise ValueError(f"frames_per_second = {self.frames_per_second}: must be positive.")
        if not 0 <= self.quality <= 51 or self.keyframe_every < 1:
            raise ValueError(
                f"quality = {self.quality}, keyframe_every = {self.keyframe_every}: 0 to 51, and at least 1."
            )


def build_robot_episodes(
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
    """Build a data set from npz or hdf5 files, a TFDS data set of episodes (RLDS, Open X-Embodiment), or images.

    Args:
      folder: searched recursively. Captions are the language instructions of an episode or, without any, the name of
        the folder that its file is in.
      out: folder of the data set.
      options: how files are read.
      validation: fraction of the episodes held out of every folder.
      min_frames: reject shorter episodes.
      error_budget: fraction of the files that may be corrupt.
      workers: files read in parallel; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: more corrupt files than the budget allows; lists them.
      ValueError: no folder, no files.
    """
    options = options or EpisodeOptions()
    options.validate()
    folder = recordings(folder)
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    episodes = find_episodes(folder, checksums=options.checksums)
    splits = _splits([episode.name for episode in episodes], validation)
    return build_dataset(
        out,
        [BuildJob(splits[episode.name], episode.name, episode) for episode in episodes],
        functools.partial(_record, options),
        description="Robot episodes.",
        metadata={"origin": "robot-episodes", "options": {"folder": str(folder), **dataclasses.asdict(options)}},
        filters=FilterConfig(min_frames=min_frames),
        error_budget=error_budget,
        workers=available_cpus() if workers is None else workers,
        processes=len(episodes) >= FEW_JOBS,
        overwrite=overwrite,
        progress=progress,
        execution=execution,
    )


def _splits(names: Sequence[str], validation: float) -> dict[str, str]:
    """The split of each episode. Every folder (task) is divided, so that each is in both splits."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    splits: dict[str, str] = {}
    for members in by_folder.values():
        splits |= dict(zip(members, assign_splits(members, validation), strict=True))
    return splits


def _record(options: EpisodeOptions, episode: Episode) -> Record:
    arrays, captions, recording = episode.read()
    frames, actions, rewards = frames_and_actions(arrays, options)
    folder = Path(episode.name).parent.name
    if not captions and folder and not any(mark in folder for mark in NOT_CAPTIONS):
        captions = (folder.replace("-", " ").replace("_", " "),)
    return Record(
        # Lists of recordings (`SourceConfig.exclude`) name those that an episode was converted from.
        id=f"{episode.name}/{recording}" if recording else episode.name,
        kind="dynamic",
        clips=(
            encode_video(
                frames, options.frames_per_second, quality=options.quality, keyframe_every=options.keyframe_every,
                full_color=True,
            ),
        ),
        captions=captions,
        frames_per_second=options.frames_per_second,
        frames=len(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        actions=actions,
        rewards=rewards,
    )  # fmt: skip


def read_episode(path: Path, options: EpisodeOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`frames_and_actions` of an npz file."""
    return frames_and_actions(read_numpy(path).arrays, options)


def frames_and_actions(arrays: dict[str, Any], options: EpisodeOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames uint8 (T, H, W, 3), actions float32 (T or 0, A) and rewards float32 (T or 0,) of an episode's arrays.

    The last frame's action and reward are zero if the file has none for it.

    Raises:
      DecodeError: arrays that are corrupt or do not form an episode.
    """
    stacked = options.camera is None and _is_stacked(arrays.get(STACKED))
    frames = arrays[STACKED][:, -3:].transpose(0, 2, 3, 1) if stacked else arrays[_camera(arrays, options.camera)]
    frames = _pixels(frames.decode() if isinstance(frames, EncodedFrames) else frames)
    actions, rewards = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    if options.actions:
        recorded = _first(arrays, ACTION_KEYS)
        if options.action_width is not None and recorded is not None:
            recorded = fit_width(np.asarray(recorded), arrays.get("gripper"), options.action_width)
        actions = by_frame(recorded, len(frames), shifted=stacked, what="actions")
        rewards = by_frame(_first(arrays, REWARD_KEYS), len(frames), shifted=stacked, what="rewards")
        rewards = rewards[:, 0] if rewards.size else np.zeros(0, np.float32)
        if options.clip_actions is not None and actions.size:
            actions = np.clip(actions, *options.clip_actions)
    return frames, actions, rewards


def fit_width(actions: np.ndarray, gripper: np.ndarray | None, width: int) -> np.ndarray:
    """Actions (T, `width`); see `EpisodeOptions.action_width`."""
    if gripper is not None and actions.shape[1] == width - 1:
        return np.concatenate([actions, gripper], axis=1)
    missing = max(0, width - actions.shape[1])
    return np.pad(actions, ((0, 0), (0, missing)))[:, :width]


def _is_stacked(observation: np.ndarray | None) -> bool:
    """Whether an array is Meta-World's (T, 3k, H, W): the height of frames (T, H, W, 3) may be a multiple of 3, too."""
    shape = np.shape(observation)
    return len(shape) == 4 and shape[1] % 3 == 0 and shape[3] != 3


def _camera(arrays: dict[str, Any], wanted: str | None) -> str:
    candidates = frame_arrays(arrays)
    if wanted is not None:
        if wanted not in candidates:
            raise DecodeError(
                f"has no frames {wanted!r} (T, H, W, 3); arrays of frames: {', '.join(candidates) or 'none'}"
            )
        return wanted
    for name in FRAME_KEYS:
        if name in candidates:
            return name
    if len(candidates) != 1:
        shapes = ", ".join(
            f"{name} {'encoded' if isinstance(array, EncodedFrames) else np.shape(array)}"
            for name, array in sorted(arrays.items())
        )
        raise DecodeError(f"has {len(candidates)} arrays of frames (T, H, W, 3): select one with camera, of {shapes}")
    return candidates[0]


def _pixels(frames: np.ndarray) -> np.ndarray:
    if len(frames) == 0:
        raise DecodeError("has no frames")
    if not np.issubdtype(frames.dtype, np.integer):
        raise DecodeError(f"frames are {frames.dtype}: expected integers from 0 to 255")
    if frames.min() < 0 or frames.max() > 255:
        raise DecodeError(f"frames range from {frames.min()} to {frames.max()}: expected 0 to 255")
    return np.ascontiguousarray(frames, np.uint8)


def _first(arrays: dict[str, Any], names: Sequence[str]) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


def by_frame(values: np.ndarray | None, frames: int, *, shifted: bool, what: str) -> np.ndarray:
    """Float32 (T, A): the values of each frame. `shifted`: recorded with the next frame (Meta-World).

    Raises:
      DecodeError: another number of values than of frames (the last may be missing), or one that is not finite.
    """
    if values is None:
        return np.zeros((0, 0), np.float32)
    values = np.asarray(values, np.float32)
    values = values.reshape(len(values), -1)
    if len(values) not in ((frames,) if shifted else (frames, frames - 1)):
        raise DecodeError(f"has {len(values)} {what} for {frames} frames")
    if not np.isfinite(values).all():
        raise DecodeError(f"{what} are not all finite")
    made = np.zeros((frames, values.shape[1]), np.float32)
    recorded = values[1:] if shifted else values
    made[: len(recorded)] = recorded
    return made
