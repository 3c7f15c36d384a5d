"""The record: one clip (or image, or set of synchronized clips) with its annotations, and its TFDS encoding."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jvgen.data.store import example as wire
from jvgen.finite import narrowed

KINDS = ("image", "static", "dynamic")
MAX_TEXT = 1000  # characters of a text in a free column
_COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Fields that 0.1.0 did not have count in checksums only if they are used, so that those of other records stay the same.
_LATER = ("caption_names", "frame_times", "text_embeddings", "text_lengths")


def _empty(*shape: int, dtype: type = np.float32) -> Any:
    return dataclasses.field(default_factory=lambda: np.zeros(shape, dtype))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One example on disk. V views, F frames of each view, A action width.

    Attributes:
      id: unique within its data set.
      kind: "image", "static" (static scene, moving camera) or "dynamic".
      clips: V encoded files: mp4, webm, ... for clips, png or jpeg for images; empty when only `latents` are stored.
      captions: any number of alternative captions.
      frames_per_second: frame rate; 0 for images.
      frames: number of frames per view (of the shortest, if they differ); 1 for images.
      height, width: in pixels, as displayed (after rotation).
      views: number of synchronized cameras.
      intrinsics: float32 (V*F or 0, 4): fx, fy, cx, cy; x divided by the width, y by the height.
      extrinsics: float32 (V*F or 0, 3, 4): world-to-camera [R|t] with OpenCV axes (x right, y down, z forward).
      actions: float32 (F or 0, A): the action taken at each frame.
      rewards: float32 (F or 0,).
      latents: float16 (V, f, h, w, 2z) or size 0: cached VAE moments, mean then log-variance along the last axis.
      caption_names: none, or one per caption: "short", "long", the name of a captioner.
      frame_times: float64 (F or 0,): seconds from the first frame, increasing; empty at a constant rate. Stored as
        microseconds. `frames_per_second` is then the mean rate.
      text_embeddings: bfloat16 (rows, C) or (0, 0): cached embeddings of the captions, one caption after the other.
      text_lengths: int32 (captions or 0,): rows of each caption.
      columns: numbers and short texts by name (license, source, aesthetic, ...), which are stored in the index only;
        None, NaN and "" are missing values.
    """

    id: str
    kind: str
    clips: tuple[bytes, ...]
    captions: tuple[str, ...] = ()
    frames_per_second: float = 0.0
    frames: int = 1
    height: int
    width: int
    views: int = 1
    intrinsics: np.ndarray = _empty(0, 4)
    extrinsics: np.ndarray = _empty(0, 3, 4)
    actions: np.ndarray = _empty(0, 0)
    rewards: np.ndarray = _empty(0)
    latents: np.ndarray = _empty(0, 0, 0, 0, 0, dtype=np.float16)
    caption_names: tuple[str, ...] = ()
    frame_times: np.ndarray = _empty(0, dtype=np.float64)
    text_embeddings: np.ndarray = _empty(0, 0, dtype=ml_dtypes.bfloat16)
    text_lengths: np.ndarray = _empty(0, dtype=np.int32)
    columns: Mapping[str, float | int | bool | str | None] = dataclasses.field(default_factory=dict)

    @property
    def has_camera(self) -> bool:
        """Whether the record has a camera for every frame of every view."""
        return self.intrinsics.shape[0] > 0

    @property
    def has_action(self) -> bool:
        """Whether the record has an action for every frame."""
        return self.actions.size > 0

    def cameras(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Intrinsics (F, 4) and extrinsics (F, 3, 4) of one view; empty when the record has no cameras."""
        rows = slice(view * self.frames, (view + 1) * self.frames)
        return self.intrinsics[rows], self.extrinsics[rows]

    def embedding(self, caption: int) -> np.ndarray:
        """The cached embedding of a caption, bfloat16 (rows, C)."""
        start = int(self.text_lengths[:caption].sum())
        return self.text_embeddings[start : start + int(self.text_lengths[caption])]

    def replace(self, **changes: Any) -> "Record":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def validate(self) -> None:
        """Check that the fields are consistent.

        Raises:
          ValueError: names the record, the field, its value and the rule.
        """
        rows = self.views * self.frames
        problems = [
            (self.kind not in KINDS, f"kind = {self.kind!r}: one of {', '.join(KINDS)}"),
            (not self.id, "id is empty"),
            ("\0" in self.id, "id has a zero character"),
            (not self.clips and not self.latents.size, "has neither clips nor latents"),
            (bool(self.clips) and len(self.clips) != self.views, f"{len(self.clips)} clips for views = {self.views}"),
            (any(not clip for clip in self.clips), "an encoded clip is empty"),
            (
                min(self.frames, self.height, self.width, self.views) < 1,
                "frames, height, width, views must be 1 or more",
            ),
            (self.frames_per_second < 0 or not np.isfinite(self.frames_per_second), "frames_per_second is not a rate"),
            (self.intrinsics.shape not in ((0, 4), (rows, 4)), f"intrinsics {self.intrinsics.shape}, not ({rows}, 4)"),
            (
                self.extrinsics.shape != (self.intrinsics.shape[0], 3, 4),
                f"extrinsics {self.extrinsics.shape} beside intrinsics {self.intrinsics.shape}",
            ),
            (
                self.actions.ndim != 2 or self.actions.shape[0] not in (0, self.frames),
                f"actions {self.actions.shape} for {self.frames} frames",
            ),
            (
                self.rewards.ndim != 1 or self.rewards.shape[0] not in (0, self.frames),
                f"rewards {self.rewards.shape} for {self.frames} frames",
            ),
            (
                self.latents.ndim != 5 or (self.latents.size > 0 and self.latents.shape[0] != self.views),
                f"latents {self.latents.shape}: not (views, frames, height, width, channels)",
            ),
            (
                len(self.caption_names) not in (0, len(self.captions)),
                f"{len(self.caption_names)} caption_names for {len(self.captions)} captions",
            ),
            (
                self.frame_times.shape not in ((0,), (self.frames,)) or bool(np.any(~(np.diff(self.frame_times) > 0))),
                f"frame_times {self.frame_times.shape}: {self.frames} increasing times in seconds, or none",
            ),
            (
                len(self.text_lengths) not in (0, len(self.captions))
                or int(self.text_lengths.sum()) != len(self.text_embeddings),
                f"text_lengths {self.text_lengths.tolist()} of {len(self.captions)} captions, beside "
                f"{len(self.text_embeddings)} rows of text_embeddings",
            ),
            *(
                (not np.isfinite(getattr(self, name)).all(), f"{name} are not all finite")
                for name in ("intrinsics", "extrinsics", "actions", "rewards")
            ),
            *((bool(problem), problem) for problem in map(_column_problem, self.columns.items())),
        ]
        wrong = [text for is_wrong, text in problems if is_wrong]
        if wrong:
            raise ValueError(f"record {self.id!r}: {'; '.join(wrong)}.")


@functools.cache
def features() -> Any:
    """The `tfds.features.FeaturesDict` of a record: tensors and byte strings only, which do not need TensorFlow."""
    import tensorflow_datasets as tfds

    def tensor(shape: tuple[int | None, ...], dtype: type) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=dtype)

    scalar = ()
    return tfds.features.FeaturesDict(
        {
            "id": tensor(scalar, np.object_),
            "kind": tensor(scalar, np.object_),
            "clips": tfds.features.Sequence(tensor(scalar, np.object_)),
            "captions": tfds.features.Sequence(tensor(scalar, np.object_)),
            "frames_per_second": tensor(scalar, np.float32),
            "frames": tensor(scalar, np.int32),
            "height": tensor(scalar, np.int32),
            "width": tensor(scalar, np.int32),
            "views": tensor(scalar, np.int32),
            "intrinsics": tensor((None, 4), np.float32),
            "extrinsics": tensor((None, 3, 4), np.float32),
            # Ragged in two axes, which tf.Example cannot express: flattened, with the width stored separately.
            "actions": tensor((None,), np.float32),
            "action_width": tensor(scalar, np.int32),
            "rewards": tensor((None,), np.float32),
            "latents": tensor(scalar, np.object_),
            "latents_shape": tensor((5,), np.int32),
            "caption_names": tfds.features.Sequence(tensor(scalar, np.object_)),
            "frame_times": tensor((None,), np.int64),  # microseconds
            "text_embeddings": tensor(scalar, np.object_),
            "text_lengths": tensor((None,), np.int32),
        }
    )


def encode(record: Record) -> dict[str, Any]:
    """The dict that `features()` serializes: the record without its columns, which are in the index."""
    return {
        "id": record.id.encode(),
        "kind": record.kind.encode(),
        "clips": list(record.clips),
        "captions": [caption.encode() for caption in record.captions],
        "frames_per_second": np.float32(record.frames_per_second),
        "frames": np.int32(record.frames),
        "height": np.int32(record.height),
        "width": np.int32(record.width),
        "views": np.int32(record.views),
        "intrinsics": np.asarray(record.intrinsics, np.float32),
        "extrinsics": np.asarray(record.extrinsics, np.float32),
        "actions": np.asarray(record.actions, np.float32).reshape(-1),
        "action_width": np.int32(record.actions.shape[1]),
        "rewards": np.asarray(record.rewards, np.float32),
        "latents": narrowed(f"record {record.id}: a latent", record.latents, np.float16).astype("<f2").tobytes(),
        "latents_shape": np.asarray(record.latents.shape, np.int32),
        "caption_names": [name.encode() for name in record.caption_names],
        "frame_times": np.round(np.asarray(record.frame_times, np.float64) * 1e6).astype(np.int64),
        "text_embeddings": np.asarray(record.text_embeddings, ml_dtypes.bfloat16).view("<u2").tobytes(),
        "text_lengths": np.asarray(record.text_lengths, np.int32),
    }


def decode(example: Mapping[str, Any]) -> Record:
    """The record of a dict read by TFDS or by `parse`. Inverse of `encode` up to rounding; columns are not in it."""
    width = _integer(example["action_width"])
    actions = np.asarray(example["actions"], np.float32)
    latents = np.frombuffer(_bytes(example["latents"]), "<f2").astype(np.float16)
    lengths = np.asarray(example.get("text_lengths", ()), np.int32)
    text = np.frombuffer(_bytes(example.get("text_embeddings", b"")), "<u2").view(ml_dtypes.bfloat16)
    return Record(
        id=_bytes(example["id"]).decode(),
        kind=_bytes(example["kind"]).decode(),
        clips=tuple(bytes(clip) for clip in example["clips"]),
        captions=tuple(bytes(caption).decode() for caption in example["captions"]),
        frames_per_second=float(np.asarray(example["frames_per_second"]).reshape(())),
        frames=_integer(example["frames"]),
        height=_integer(example["height"]),
        width=_integer(example["width"]),
        views=_integer(example["views"]),
        intrinsics=np.asarray(example["intrinsics"], np.float32).reshape(-1, 4),
        extrinsics=np.asarray(example["extrinsics"], np.float32).reshape(-1, 3, 4),
        actions=actions.reshape(-1, width) if width else np.zeros((0, 0), np.float32),
        rewards=np.asarray(example["rewards"], np.float32),
        latents=latents.reshape([int(size) for size in example["latents_shape"]]),
        caption_names=tuple(bytes(name).decode() for name in example.get("caption_names", ())),
        frame_times=np.asarray(example.get("frame_times", ()), np.float64) / 1e6,
        text_embeddings=text.reshape(int(lengths.sum()), -1) if text.size else text.reshape(0, 0),
        text_lengths=lengths,
    )


def serialize(record: Record) -> bytes:
    """The bytes of a record in its shard: the same for equal records, in every process.

    Raises:
      ValueError: a record of more than 2 GiB, which protobuf libraries cannot read.
    """
    content = {
        name: [value] if isinstance(value, bytes) else value if isinstance(value, list) else np.asarray(value)
        for name, value in encode(record).items()
    }
    serialized = wire.serialize(content)
    if len(serialized) > wire.MAX_BYTES:
        raise ValueError(f"record {record.id!r}: {len(serialized)} bytes; at most 2 GiB. Split the recording.")
    return serialized


def parse(serialized: bytes) -> Record:
    """Inverse of `serialize`; raises `jvgen.data.store.example.NotAnExample` for damaged bytes."""
    try:
        return decode(wire.parse(serialized))
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise wire.NotAnExample(f"not a record ({error!r})") from error


def checksum_of(record: Record) -> int:
    """64-bit checksum of a record's content, whatever its encoding; columns do not count."""
    state = hashlib.blake2b(digest_size=8)
    for name, value in sorted(encode(record).items()):
        if name in _LATER and not len(value):
            continue
        parts = value if isinstance(value, list) else [value]
        state.update(f"{name} {len(parts)}\n".encode())
        for part in parts:
            content = part if isinstance(part, bytes) else _little_endian(np.asarray(part)).tobytes()
            state.update(f"{len(content)}\n".encode())
            state.update(content)
    return int.from_bytes(state.digest(), "little")


def _column_problem(column: tuple[str, Any]) -> str:
    name, value = column
    if not isinstance(name, str) or not _COLUMN_NAME.fullmatch(name):
        return f"column {name!r}: a name of lower-case letters, digits and _, beginning with a letter"
    if value is None or isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        exact = value is None or isinstance(value, float | np.floating) or abs(int(value)) <= 2**53
        return "" if exact else f"column {name} = {value}: as a number it would be rounded; make it a text"
    if not isinstance(value, str):
        return f"column {name} = {value!r}: a number or a text"
    if len(value) > MAX_TEXT or "\0" in value:
        return f"column {name}: {len(value)} characters; at most {MAX_TEXT}, none of them zero"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"column {name} = {value!r}: half of a surrogate pair, which is no text"
    return ""


def _integer(value: Any) -> int:
    return int(np.asarray(value).reshape(()))


def _bytes(value: Any) -> bytes:
    return bytes(value[0] if isinstance(value, list) else value)


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
