"""Finds and reads episodes in files: numpy archives, hdf5, prepared RLDS data sets of TFDS, folders of frames."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jvgen.data.builders.recorded_files import files_in, name_of
from jvgen.data.builders.tf_records import tf_records
from jvgen.data.video_files import DecodeError, decode_window, is_image, probe
from jvgen.storage import reading

NUMPY, HDF5, SHARDS = (".npz",), (".hdf5", ".h5"), (".tfrecord-", ".array_record-")
IMAGES = (".jpg", ".jpeg", ".png")
_INSTRUCTION = re.compile(r"((natural_)?language_)?instruction(_\d)?")
_ONCE_A_STEP = ("is_first", "is_last", "is_terminal", "reward", "discount")
_USED = re.compile(r"actions?(/|$)|reward")


class RawEpisode(NamedTuple):
    """An episode as it is stored.

    Attributes:
      arrays: by name; frames may be `EncodedFrames`.
      captions: language instructions.
      recording: name of the file that an RLDS episode was converted from, without its suffix; "" if it does not say.
    """

    arrays: dict[str, Any]
    captions: tuple[str, ...] = ()
    recording: str = ""


class Episode(NamedTuple):
    """A name that is unique in the folder, and the function that reads the episode (`DecodeError` if it is corrupt)."""

    name: str
    read: Callable[[], RawEpisode]


@dataclasses.dataclass(frozen=True)
class EncodedFrames:
    """Frames that are not decoded yet.

    Attributes:
      clips: one image per frame, or one video.
      swap_red_blue: whether channels are stored as BGR.
      limit: number of frames to keep; None for all.
    """

    clips: tuple[bytes, ...]
    swap_red_blue: bool = False
    limit: int | None = None

    def decode(self) -> np.ndarray:
        """uint8 (T, H, W, 3), RGB."""
        if len(self.clips) == 1 and not is_image(self.clips[0]):
            frames = decode_window(self.clips[0], range(probe(self.clips[0]).frames)[: self.limit])
        else:
            frames = [decode_window(clip, [0])[0] for clip in self.clips[: self.limit]]
            if len({frame.shape for frame in frames}) > 1:
                raise DecodeError(f"frames change size: {sorted({frame.shape[:2] for frame in frames})}")
            frames = np.stack(frames)
        return frames[..., ::-1] if self.swap_red_blue else frames


def find_episodes(folder: Path, *, checksums: bool = True) -> list[Episode]:
    """All episodes in a folder, searched recursively, sorted by name; `checksums`: check those of TFRecord files.

    Raises:
      ValueError: no readable file, or hdf5 files without h5py installed.
    """
    found: list[Episode] = []
    images: dict[tuple[Path, str], list[Path]] = {}
    folders = set()
    for path in files_in(folder):
        name = name_of(path, folder)
        before = len(found)
        if path.suffix in NUMPY:
            found.append(Episode(name, functools.partial(read_numpy, path)))
        elif path.suffix in HDF5:
            found += _hdf5_episodes(path, name)
        elif any(mark in path.name for mark in SHARDS):
            found += _shard_episodes(path, name, checksums)
        elif path.suffix.lower() in IMAGES and _natural(path.stem)[0] != path.stem:
            images.setdefault((path.parent, _natural(path.stem)[0]), []).append(path)
        if len(found) > before:
            folders.add(path.parent)
    for (parent, prefix), paths in images.items():
        alone = sum(other == parent for other, _ in images) == 1
        # One picture beside episodes shows one of them.
        if len(paths) > 1 or (alone and parent not in folders):
            # Cameras whose pictures are in one folder have different names.
            name = name_of(parent, folder) if alone else f"{name_of(parent, folder)}/{prefix.rstrip('_-. ')}"
            found.append(Episode(name, functools.partial(read_frames, tuple(paths))))
    if not found:
        raise ValueError(
            f"{folder} contains no .npz or .hdf5 files, no shards of a TFDS data set and no numbered images."
        )
    return sorted(found, key=lambda episode: _natural(episode.name))


def read_frames(paths: Sequence[Path]) -> RawEpisode:
    """Frames of numbered images (Something-Something), in the order of their numbers, which must be even steps.

    Raises:
      DecodeError: missing numbers, or an image that cannot be read.
    """
    ordered = sorted(paths, key=lambda path: _natural(path.stem))
    numbers = [_natural(path.stem)[1] for path in ordered]
    steps = np.diff(numbers)
    if len(steps) and steps.min() != steps.max():
        place = int(np.argmax(steps > steps.min()))
        raise DecodeError(f"no image between {ordered[place].name} and {ordered[place + 1].name}: time would jump")
    try:
        return RawEpisode({"image": EncodedFrames(tuple(path.read_bytes() for path in ordered))})
    except OSError as error:
        raise DecodeError(f"cannot be read ({error})") from error


def read_numpy(path: Path) -> RawEpisode:
    """The arrays of an npz file.

    Raises:
      DecodeError: cannot be read.
    """
    try:
        # NumPy leaves a damaged file open if it opens it.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return RawEpisode({name: file[name] for name in file.files})
    except Exception as error:
        # Damaged archives raise errors of a dozen kinds.
        raise DecodeError(f"cannot be read as npz ({_reason(error)})") from error


# RLDS. A record is one episode: a tf.train.Example whose features "steps/..." have a value for every step. Vectors are
# flattened, images are encoded one by one.


def _shard_episodes(path: Path, name: str, checksums: bool) -> Iterator[Episode]:
    readers = _array_records(path) if ".array_record-" in path.name else tf_records(path, checksums=checksums)
    for number, read in enumerate(readers):
        yield Episode(f"{name}/{number:06d}", functools.partial(_read_steps, read))


def _array_records(path: Path) -> Iterator[Callable[[], bytes]]:
    from array_record.python.array_record_module import ArrayRecordReader

    with reading(path, "cannot be read as ArrayRecord"):
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    return (functools.partial(_read_array_record, path, number) for number in range(count))


def _read_array_record(path: Path, number: int) -> bytes:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        return reader.read([number])[0]
    except (IndexError, RuntimeError) as error:
        raise DecodeError(f"cannot be read as ArrayRecord ({error})") from error
    finally:
        reader.close()


def _read_steps(read: Callable[[], bytes]) -> RawEpisode:
    # The error that protobuf raises for corrupt bytes is not exported elsewhere.
    from google.protobuf.message import DecodeError as NotAMessage
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(read()).features.feature
    except NotAMessage as error:
        raise DecodeError(f"not an example of TFDS ({error})") from error
    filled = {
        name: getattr(feature, feature.WhichOneof("kind")).value
        for name, feature in features.items()
        if feature.WhichOneof("kind")
    }
    values = {
        name.removeprefix("steps/"): value for name, value in filled.items() if name.startswith("steps/") and value
    }
    steps = _count_of_steps(values)
    arrays: dict[str, Any] = {}
    captions: list[str] = []
    for name, value in sorted(values.items()):
        short = name.removeprefix("observation/")
        if _INSTRUCTION.fullmatch(short):
            captions.append(_instruction(value, steps))
        elif isinstance(value[0], bytes):
            if any(is_image(item) for item in value):
                empty = next((step for step, item in enumerate(value) if not item), None)
                if empty is not None or len(value) != steps:
                    problem = f"has {len(value)} for {steps} steps" if empty is None else f"is empty at step {empty}"
                    raise DecodeError(f"{name} {problem}")
                arrays[short] = EncodedFrames(tuple(value))
        elif len(value) % steps == 0:
            arrays[short] = np.asarray(value).reshape(steps, -1)
        elif _USED.match(short):
            raise DecodeError(f"{name} has {len(value)} numbers for {steps} steps, which do not divide them")
    if not any(captions):
        # Of data sets that describe whole episodes.
        captions = [
            _instruction(value, 1)
            for name, value in sorted(filled.items())
            if not name.startswith("steps/") and _INSTRUCTION.fullmatch(name.rpartition("/")[2]) and value
        ]
    paths = [value for name, value in filled.items() if name.endswith("metadata/file_path")]
    recording = paths[0][0].decode(errors="replace") if paths and len(paths[0]) == 1 else ""
    captions = list(dict.fromkeys(caption for caption in captions if caption))
    return RawEpisode(_join_actions(arrays), tuple(captions), PurePosixPath(recording).stem)


def _count_of_steps(values: dict[str, Sequence[Any]]) -> int:
    """Steps of an episode, by the features that RLDS has once per step."""
    counted = [len(values[name]) for name in _ONCE_A_STEP if name in values]
    counted = counted or [len(value) for value in values.values() if any(is_image(v) for v in value[:2])]
    counted = counted or [len(value) for value in values.values()]
    if not counted:
        raise DecodeError("has no steps (RLDS)")
    return max(counted, key=lambda count: (counted.count(count), -count))


def _instruction(value: Sequence[Any], steps: int) -> str:
    """The instruction of the first step, as text or as the numbers of its bytes (Language-Table)."""
    if isinstance(value[0], bytes):
        return value[0].decode(errors="replace").strip()
    if len(value) % steps or not all(isinstance(item, int) and 0 <= item < 256 for item in value):
        return ""
    return bytes(value[: len(value) // steps]).rstrip(b"\0").decode(errors="replace").strip()


def _join_actions(arrays: dict[str, Any]) -> dict[str, Any]:
    """Concatenates action components that are separate features, ordered by name."""
    parts = [name for name in sorted(arrays) if name.startswith("action/")]
    if parts and "action" not in arrays:
        arrays["action"] = np.concatenate([np.asarray(arrays[name], np.float32) for name in parts], axis=1)
    return arrays


# hdf5.


def _hdf5_episodes(path: Path, name: str) -> list[Episode]:
    """One episode per file, or one per group of `data` (robomimic's layout, used by VP2)."""
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            groups = sorted(file["data"], key=_natural) if "data" in file and hasattr(file["data"], "keys") else []
    except Exception:
        groups = []  # Reading the file will say why.
    if not groups:
        return [Episode(name, functools.partial(read_hdf5, path))]
    return [Episode(f"{name}/{group}", functools.partial(read_hdf5, path, f"data/{group}")) for group in groups]


def read_hdf5(path: Path, group: str = "/") -> RawEpisode:
    """An episode of an hdf5 file in RoboNet's or robomimic's layout, or with arrays at the top level as in an npz file.

    Raises:
      DecodeError: cannot be read.
      ValueError: h5py is not installed.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            if "env" in file and "policy" in file:
                return _robonet(file)
            return RawEpisode(_hdf5_arrays(file[group], h5py.Dataset))
    except DecodeError:
        raise
    except Exception as error:
        # h5py raises RuntimeError and others for damaged files.
        raise DecodeError(f"cannot be read as hdf5 ({_reason(error)})") from error


def _hdf5_arrays(episode: Any, dataset: type) -> dict[str, Any]:
    """Arrays of an episode and of its observations (robomimic: obs; ALOHA: observations, observations/images)."""
    arrays: dict[str, Any] = {}
    for folder in ("", "obs", "observations", "observations/images"):
        node = episode if not folder else episode.get(folder, {})
        for name in node:
            if isinstance(node[name], dataset):
                values = node[name][()]
                # ALOHA pads the encoded images of a camera to equal lengths.
                encoded = folder.endswith("images") and np.ndim(values) == 2 and values.dtype == np.uint8
                arrays[name] = EncodedFrames(tuple(row.tobytes() for row in values)) if encoded else values
    return arrays


def _robonet(file: Any) -> RawEpisode:
    """RoboNet (Dasari et al. 2019): encoded cameras, one action fewer than states, sometimes an automatic gripper."""
    actions, states = file["policy/actions"][()], file["env/state"][()]
    limit = min(len(states), len(actions) + 1)
    arrays: dict[str, Any] = {"action": actions[: limit - 1]}
    for name in sorted(name for name in file["env"] if name.startswith("cam") and name.endswith("_video")):
        camera = file["env"][name]
        video = "frames" in camera
        pieces = [camera["frames"]] if video else [camera[f"frame{number}"] for number in range(len(camera))]
        order = _text(pieces[0].attrs.get("image_format", "RGB" if video else "BGR"))
        # Images were written with OpenCV, which expects BGR: RGB input was stored with red and blue swapped.
        swapped = order == "BGR" if video else order == "RGB"
        clips = tuple(np.asarray(piece[()], np.uint8).tobytes() for piece in pieces)
        arrays[name.removesuffix("_video")] = EncodedFrames(clips, swapped, limit)
    low, high = (_bound(file, f"{name}_bound") for name in ("low", "high"))
    automatic = "metadata" in file and _text(file["metadata"].attrs.get("primitives", "")) == "autograsp"
    if automatic and low is not None and high is not None:
        closed = states[1:limit, -1] > (low + high) / 2
        arrays["gripper"] = np.where(closed, high, low)[:, None]
    return RawEpisode(arrays)


def _bound(file: Any, name: str) -> float | None:
    """The gripper's bound: the last component of the state's bounds."""
    for group in ("misc", "env"):
        if group in file and name in file[group]:
            return float(np.ravel(file[group][name][()])[-1])
    found = file["metadata"].attrs.get(name) if "metadata" in file else None
    return None if found is None else float(np.ravel(found)[-1])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _natural(name: str) -> tuple[str, int]:
    """Sort key that puts demo_10 after demo_9."""
    digits = name[len(name.rstrip("0123456789")) :]
    return name[: len(name) - len(digits)], int(digits or 0)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading hdf5 files needs h5py: install jvgen[hdf5].") from error
    return h5py


def frame_arrays(arrays: dict[str, Any]) -> Sequence[str]:
    """Names of the arrays that are frames: (T, H, W, 3), or encoded."""
    return [
        name
        for name, array in arrays.items()
        if isinstance(array, EncodedFrames) or (np.ndim(array) == 4 and np.shape(array)[-1] == 3)
    ]
