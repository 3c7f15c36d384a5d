"""The record: one clip (or image, or set of synchronized clips) with its annotations, and its TFDS encoding."""

import dataclasses
import functools
from typing import Any

import numpy as np

from jvgen.finite import narrowed

KINDS = ("image", "static", "dynamic")


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
        }
    )


def encode(record: Record) -> dict[str, Any]:
    """The dict that `features()` serializes."""
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
    }


def decode(example: dict[str, Any]) -> Record:
    """The record of a dict read from TFDS. Inverse of `encode` up to float16/float32 rounding."""
    width = int(example["action_width"])
    actions = np.asarray(example["actions"], np.float32)
    latents = np.frombuffer(example["latents"], "<f2").astype(np.float16, copy=False)
    return Record(
        id=example["id"].decode(),
        kind=example["kind"].decode(),
        clips=tuple(bytes(clip) for clip in example["clips"]),
        captions=tuple(caption.decode() for caption in example["captions"]),
        frames_per_second=float(example["frames_per_second"]),
        frames=int(example["frames"]),
        height=int(example["height"]),
        width=int(example["width"]),
        views=int(example["views"]),
        intrinsics=np.asarray(example["intrinsics"], np.float32),
        extrinsics=np.asarray(example["extrinsics"], np.float32),
        actions=actions.reshape(-1, width) if width else np.zeros((0, 0), np.float32),
        rewards=np.asarray(example["rewards"], np.float32),
        latents=latents.reshape([int(size) for size in example["latents_shape"]]),
    )
