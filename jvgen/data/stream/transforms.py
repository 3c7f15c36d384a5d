"""From a record to an example: decode the clip, fit it to the bucket, and transform cameras and actions alike."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from einops import reduce

from jvgen.data.store.records import KINDS, Record
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.frame_times import frames_at, offsets
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.video_files import decode_window

Resize = Literal["crop", "center_crop", "squash"]


def load_example(record: Record, spec: ClipSpec, bucket: BucketConfig, resize: Resize = "crop") -> dict[str, Any]:
    """Decode and transform the part of a record that the spec selects.

    Shapes have no V axis when the bucket has one view. F, H, W are the bucket's.

    Returns:
      video: uint8 (V F H W 3); missing when the record has cached latents only.
      latents: float32 (V f h w 2z), cached VAE moments; missing when the record has none.
      caption: str, "" without one.
      text: bfloat16 (rows, C), the cached embedding of the caption, without rows if there is no caption; missing when
        the data set has no embeddings.
      frames_per_second: float32, at the stride of the spec; 0 for images.
      kind: int32, index into `jvgen.data.store.records.KINDS`.
      intrinsics: float32 (V F 4): fx, fy, cx, cy over width and height of the transformed frame; 0 without cameras.
      extrinsics: float32 (V F 3 4): world-to-camera, OpenCV axes; 0 without cameras.
      has_camera, has_action, has_reward: bool.
      actions: float32 (F A): the sum of the recorded actions from each frame up to the next one of the example, so that
        displacements are right at every stride; A is 0 without actions.
      rewards: float32 (F,): summed like the actions; 0 without rewards.
      seed: uint64, for random numbers of the task's preprocessing; depends on run seed, step and slot.

    Raises:
      DecodeError: a clip that cannot be decoded.
    """
    frames = frame_numbers(record, spec, bucket.frames)
    if spec.frames is not None:
        # Frames of a segment are not consecutive: no action leads from one to the next.
        record = record.replace(actions=np.zeros((0, 0)), rewards=np.zeros(0))
    assert frames.max() < record.frames, f"record {record.id}: frame {frames.max()} of {record.frames}"
    rate = spec.frames_per_second if record.frames_per_second else None
    example: dict[str, Any] = {
        "caption": _caption(record, spec),
        "frames_per_second": np.float32(record.frames_per_second / spec.stride if rate is None else rate),
        "kind": np.int32(KINDS.index(record.kind)),
        "seed": np.uint64(spec.seed),
        "has_camera": np.bool_(record.has_camera),
        "has_action": np.bool_(record.has_action),
        "has_reward": np.bool_(record.rewards.size > 0),
        "actions": sum_between(record.actions, frames, spec),
        "rewards": sum_between(record.rewards, frames, spec),
    }
    if record.text_lengths.size:
        example["text"] = _embedding(record, spec)
    videos, latents, intrinsics, extrinsics = [], [], [], []
    source_size, size = (record.height, record.width), (bucket.height, bucket.width)
    for view in spec.views:
        if record.clips:
            video = decode_window(record.clips[view], frames.tolist())
            source_size = video.shape[1:3]
            augment = spec.augmentation
            videos.append(fit(video, spec, size, resize) if augment is None else augment.apply(video, size))
        if record.latents.size:
            assert spec.frames is None and spec.augmentation is None, "cached latents cannot be segmented or augmented"
            latents.append(latent_window(record.latents[view], record.frames, frames))
        if record.has_camera:
            per_frame, poses = record.cameras(view)
            intrinsics.append(fit_intrinsics(per_frame[frames], spec, source_size, size, resize))
            extrinsics.append(poses[frames].astype(np.float32))
        else:
            intrinsics.append(np.zeros((bucket.frames, 4), np.float32))
            extrinsics.append(np.zeros((bucket.frames, 3, 4), np.float32))
    for name, parts in (
        ("video", videos), ("latents", latents), ("intrinsics", intrinsics), ("extrinsics", extrinsics)
    ):  # fmt: skip
        if parts:
            example[name] = np.stack(parts) if bucket.views > 1 else parts[0]
    return example


def fit(video: np.ndarray, spec: ClipSpec, size: tuple[int, int], resize: Resize) -> np.ndarray:
    """Bring uint8 frames (F h w 3) to `size` (height, width): resize, crop, flip. Contiguous uint8 (F H W 3)."""
    height, width = size
    (scaled_height, scaled_width), (top, left) = _geometry(video.shape[1:3], spec, size, resize)
    fitted = np.empty((len(video), height, width, 3), np.uint8)
    shrinks = scaled_height <= video.shape[1] and scaled_width <= video.shape[2]
    rows, columns = slice(None), slice(None)
    if shrinks:
        rows, scaled_height, top = _crop_source(video.shape[1], scaled_height, top, height)
        columns, scaled_width, left = _crop_source(video.shape[2], scaled_width, left, width)
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    for number, frame in enumerate(video):
        frame = frame[rows, columns]
        if frame.shape[:2] != (scaled_height, scaled_width):
            frame = cv2.resize(frame, (scaled_width, scaled_height), interpolation=interpolation)
        frame = frame[top : top + height, left : left + width]
        fitted[number] = frame[:, ::-1] if spec.flip else frame
    return fitted


def _crop_source(source: int, scaled: int, start: int, length: int) -> tuple[slice, int, int]:
    """The source pixels of a crop of a downscaled side, the size to scale them to, and the start of the crop in it.

    Area averaging is periodic: with `source : scaled` in lowest terms `pixels : made`, every `pixels` source pixels
    make `made` output pixels, independent of the others.
    """
    common = math.gcd(source, scaled)
    pixels, made = source // common, scaled // common
    first, last = start // made, -(-(start + length) // made)
    return slice(first * pixels, last * pixels), (last - first) * made, start - first * made


def fit_intrinsics(
    intrinsics: np.ndarray, spec: ClipSpec, source: tuple[int, int], size: tuple[int, int], resize: Resize
) -> np.ndarray:
    """Intrinsics (F 4) of frames after `fit` brought them from `source` to `size` (heights, widths in pixels).

    fx and cx are divided by the frame's width, fy and cy by its height, with 0 at the outer edge of the first pixel and
    1 at that of the last, so resizing alone changes nothing. Flipping makes fx negative: the world is not mirrored.
    """
    (scaled_height, scaled_width), (top, left) = _geometry(source, spec, size, resize)
    height, width = size
    scale = np.array([scaled_width / width, scaled_height / height] * 2)
    fitted = intrinsics * scale - np.array([0, 0, left / width, top / height])
    if spec.flip:
        fitted = fitted * np.array([-1, 1, -1, 1]) + np.array([0, 0, 1, 0])
    return fitted.astype(np.float32)


def sum_over_stride(values: np.ndarray, start: int, stride: int, frames: int) -> np.ndarray:
    """Sums of recorded values (T ...) over each stride from `start` on: float32 (frames ...).

    The last sum is over `stride` values too, or as many as the recording has.
    """
    if not values.size:
        return np.zeros((frames, *values.shape[1:]), np.float32)
    window = np.zeros((frames * stride, *values.shape[1:]), np.float32)
    recorded = values[start : start + frames * stride]
    window[: len(recorded)] = recorded
    return reduce(window, "(frames stride) ... -> frames ...", "sum", stride=stride)


def latent_window(latents: np.ndarray, recorded: int, frames: np.ndarray) -> np.ndarray:
    """The latent frames of an example, float32, from cached moments (f h w 2z) of `recorded` frames.

    With one latent per frame, those of the given frames. With temporal compression r (the first latent covers the
    first frame, each other one r frames), the first (F - 1) // r + 1 latents; the F frames must be the first ones.
    """
    if len(latents) == recorded:
        return latents[frames].astype(np.float32)
    assert frames[0] == 0 and frames[-1] == len(frames) - 1, "the plan takes the first frames of compressed latents"
    ratio = (recorded - 1) // max(len(latents) - 1, 1)
    return latents[: (len(frames) - 1) // ratio + 1].astype(np.float32)


def frame_numbers(record: Record, spec: ClipSpec, count: int) -> np.ndarray:
    """Recorded frames of an example, int64 (count,)."""
    if spec.frames is not None:
        return np.asarray(spec.frames)
    if spec.frames_per_second is None or not record.frames_per_second:
        return spec.start + spec.stride * np.arange(count)
    if record.latents.size and len(record.latents[0]) != record.frames:
        return np.arange(count)  # compressed in time
    if record.frame_times.size:
        return frames_at(record.frame_times, spec.start, spec.frames_per_second, count)
    return spec.start + offsets(record.frames_per_second, spec.frames_per_second, np.arange(count))


def sum_between(values: np.ndarray, frames: np.ndarray, spec: ClipSpec) -> np.ndarray:
    """Sums of recorded values (T ...) from each frame of an example up to the next one: float32 (F ...).

    The last sum is over as many recorded frames as the one before.
    """
    if spec.frames_per_second is None or spec.frames is not None or not values.size:
        return sum_over_stride(values, spec.start, spec.stride, len(frames))
    last = frames[-1] + (frames[-1] - frames[-2] if len(frames) > 1 else 1)
    parts = [values[first:end] for first, end in zip(frames, [*frames[1:], last], strict=True)]
    return np.stack([part.sum(axis=0, dtype=np.float32) for part in parts]).astype(np.float32)


def _caption(record: Record, spec: ClipSpec) -> str:
    if spec.caption_draw is not None:
        return spec.caption_draw.draw(record.captions, record.caption_names)
    return record.captions[spec.caption] if spec.caption >= 0 else ""


def _embedding(record: Record, spec: ClipSpec) -> np.ndarray:
    chosen = spec.caption
    if spec.caption_draw is not None:
        chosen = spec.caption_draw.choose(len(record.captions), record.caption_names)
    return record.embedding(chosen) if chosen >= 0 else record.text_embeddings[:0]


def _geometry(
    source: Sequence[int], spec: ClipSpec, size: tuple[int, int], resize: Resize
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size that frames are resized to, and the (top, left) corner of the crop in it."""
    height, width = size
    if resize == "squash":
        return (height, width), (0, 0)
    scale = max(height / source[0], width / source[1])
    scaled = (max(height, round(source[0] * scale)), max(width, round(source[1] * scale)))
    fractions = (spec.crop_y, spec.crop_x) if resize == "crop" else (0.5, 0.5)
    top, left = (int(f * (have - need + 1)) for f, have, need in zip(fractions, scaled, size, strict=True))
    return scaled, (top, left)
