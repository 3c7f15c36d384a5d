"""Robot episodes in files, as data sets: frames with the action taken at each, and its reward.

Episodes of two kinds are told apart by their arrays (T frames):

    Meta-World  observation (T, 3k, H, W) uint8: k stacked frames, newest last; action, reward (T, ...): index 0 is the
                reset, index t what led to observation t
    others      an array of frames (T, H, W, 3), by default image or the only one of this kind; action (T or T-1, A),
                reward (T or T-1,) if there are any: index t is what was done at frame t

The second kind is what Open X-Embodiment (RLDS), RoboNet and VP2 (hdf5) hold, and what iVideoGPT's converters write for
them and for BAIR (npz); folders of numbered images (Something-Something) are of it, without actions. Where episodes lie
in files is told by `jvgen.data.builders.episode_files`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.data.builders.build_loop import FilterConfig, Progress, Summary, Task, assemble, processors, split_of
from jvgen.data.builders.episode_files import Episode, Pictures, find_episodes, names_of, read_numpy
from jvgen.data.store.records import Record
from jvgen.data.video_files import DecodeError, encode_video

STACKED = "observation"
FRAME_KEYS = ("image", "video", "frames", "rgb", "cam0", "camera_image", "agentview_shift_2_image")
ACTION_KEYS = ("action", "actions")
REWARD_KEYS = ("reward", "rewards")
# Marks of names that are files or versions and not what an episode shows.
NOT_CAPTIONS = (".tfrecord-", ".array_record-", ".hdf5", ".h5")


@dataclasses.dataclass(frozen=True)
class EpisodeOptions:
    """How files are read and frames are stored.

    Attributes:
      camera: name of the array of frames; found if not given.
      clip_actions: bounds that actions are clipped to, as the simulator that they were sent to does; None for none.
      action_width: numbers of an action: shorter ones get zeros, longer ones lose their last, as iVideoGPT does with
        RoboNet's robots; a gripper that closes by itself gives the last number. None for as recorded.
      frames_per_second: said of the recordings, for players.
      quality: constant rate factor of the encoded clips.
      keyframe_every: frames between keyframes; short distances make windows cheap to decode.
      actions: store actions and rewards where files have them.
    """

    camera: str | None = None
    clip_actions: tuple[float, float] | None = None
    action_width: int | None = None
    frames_per_second: float = 10.0
    quality: int = 10
    keyframe_every: int = 8
    actions: bool = True

    def validate(self) -> None:
        """Raise `ValueError` for values that cannot work."""
        if self.clip_actions is not None and not self.clip_actions[0] < self.clip_actions[1]:
            raise ValueError(f"clip_actions = {self.clip_actions}: the lower bound first, then a higher one.")
        if self.action_width is not None and self.action_width < 1:
            raise ValueError(f"action_width = {self.action_width}: at least 1, or none for as recorded.")
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
    refuse_budget: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Take in a folder of npz or hdf5 files, or of a TFDS data set of episodes (RLDS, as Open X-Embodiment is).

    Args:
      folder: searched to any depth. Episodes keep what was told to do as captions, or else, of npz and hdf5 files, the
        name of the folder that they are in.
      out: folder of the data set.
      options: how files are read.
      validation: share of the episodes held out, of every folder of files.
      min_frames: leave out shorter episodes.
      refuse_budget: share of the files that may be damaged before the build stops.
      workers: files read side by side; one for each processor unless given.
      overwrite, progress: as in `jvgen.data.builders.build_loop.assemble`.

    Raises:
      BuildError: more damaged files than the budget allows, all of them listed.
      ValueError: no folder, no files.
    """
    options = options or EpisodeOptions()
    options.validate()
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"folder = {str(folder)!r} is not a folder.")
    episodes = find_episodes(folder)
    sides = _sides([episode.name for episode in episodes], validation)
    return assemble(
        out,
        [Task(sides[episode.name], episode.name, episode) for episode in episodes],
        functools.partial(_record, options),
        description="Robot episodes.",
        metadata={"origin": "robot-episodes", "options": {"folder": str(folder), **dataclasses.asdict(options)}},
        filters=FilterConfig(min_frames=min_frames),
        refuse_budget=refuse_budget,
        workers=processors() if workers is None else workers,
        overwrite=overwrite,
        progress=progress,
    )


def _sides(names: Sequence[str], validation: float) -> dict[str, str]:
    """Each folder is split on its own: no task is all in one side."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    sides: dict[str, str] = {}
    for members in by_folder.values():
        sides |= dict(zip(members, split_of(members, validation), strict=True))
    return sides


def _record(options: EpisodeOptions, episode: Episode) -> Record:
    arrays, captions = episode.read()
    frames, actions, rewards = frames_and_actions(arrays, options)
    folder = Path(episode.name).parent.name
    if not captions and folder and not any(mark in folder for mark in NOT_CAPTIONS):
        captions = (folder.replace("-", " ").replace("_", " "),)
    return Record(
        id=episode.name,
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

    The last frame's action and reward are zero where the file has none for it.

    Raises:
      DecodeError: damaged, or arrays that do not make an episode; the message says which.
    """
    stacked = options.camera is None and np.ndim(arrays.get(STACKED, 0)) == 4 and arrays[STACKED].shape[1] % 3 == 0
    frames = arrays[STACKED][:, -3:].transpose(0, 2, 3, 1) if stacked else arrays[_camera(arrays, options.camera)]
    frames = _pixels(frames.decode() if isinstance(frames, Pictures) else frames)
    actions, rewards = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    if options.actions:
        recorded = _first(arrays, ACTION_KEYS)
        if options.action_width is not None and recorded is not None:
            recorded = _of_width(np.asarray(recorded), arrays.get("gripper"), options.action_width)
        actions = _by_frame(recorded, len(frames), shifted=stacked, what="actions")
        rewards = _by_frame(_first(arrays, REWARD_KEYS), len(frames), shifted=stacked, what="rewards")
        rewards = rewards[:, 0] if rewards.size else np.zeros(0, np.float32)
        if options.clip_actions is not None and actions.size:
            actions = np.clip(actions, *options.clip_actions)
    return frames, actions, rewards


def _of_width(actions: np.ndarray, gripper: np.ndarray | None, width: int) -> np.ndarray:
    """Actions (T, A) with `width` numbers each; see `EpisodeOptions.action_width`."""
    if gripper is not None and actions.shape[1] == width - 1:
        return np.concatenate([actions, gripper], axis=1)
    missing = max(0, width - actions.shape[1])
    return np.pad(actions, ((0, 0), (0, missing)))[:, :width]


def _camera(arrays: dict[str, Any], wanted: str | None) -> str:
    looking = names_of(arrays)
    if wanted is not None:
        if wanted not in looking:
            raise DecodeError(
                f"has no frames {wanted!r} (T, H, W, 3); arrays of frames: {', '.join(looking) or 'none'}"
            )
        return wanted
    for name in FRAME_KEYS:
        if name in looking:
            return name
    if len(looking) != 1:
        shapes = ", ".join(
            f"{name} {'encoded' if isinstance(array, Pictures) else np.shape(array)}"
            for name, array in sorted(arrays.items())
        )
        raise DecodeError(f"holds {len(looking)} arrays of frames (T, H, W, 3), say which with camera; it has {shapes}")
    return looking[0]


def _pixels(frames: np.ndarray) -> np.ndarray:
    if len(frames) == 0:
        raise DecodeError("holds no frame")
    if not np.issubdtype(frames.dtype, np.integer):
        raise DecodeError(f"frames are {frames.dtype}: expected whole numbers from 0 to 255")
    if frames.min() < 0 or frames.max() > 255:
        raise DecodeError(f"frames reach from {frames.min()} to {frames.max()}: expected 0 to 255")
    return np.ascontiguousarray(frames, np.uint8)


def _first(arrays: dict[str, Any], names: Sequence[str]) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _by_frame(values: np.ndarray | None, frames: int, *, shifted: bool, what: str) -> np.ndarray:
    """Float32 (T, A): what was done at each frame. `shifted`: recorded with the frame that it led to."""
    if values is None:
        return np.zeros((0, 0), np.float32)
    values = np.asarray(values, np.float32)
    values = values.reshape(len(values), -1)
    if len(values) not in ((frames,) if shifted else (frames, frames - 1)):
        raise DecodeError(f"has {len(values)} {what} for {frames} frames")
    if not np.isfinite(values).all():
        raise DecodeError(f"{what} are not all finite numbers")
    made = np.zeros((frames, values.shape[1]), np.float32)
    recorded = values[1:] if shifted else values
    made[: len(recorded)] = recorded
    return made
