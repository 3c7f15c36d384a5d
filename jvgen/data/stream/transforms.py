"""From a record to an example: decode the window, fit it to the bucket, and move the cameras and actions along."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from einops import reduce

from jvgen.data.store.records import KINDS, Record
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.plan import Sample
from jvgen.data.video_files import decode_window

Resize = Literal["crop", "center_crop", "squash"]


def load_example(record: Record, sample: Sample, bucket: BucketConfig, resize: Resize = "crop") -> dict[str, Any]:
    """Decode and transform what a sample names of a record.

    V is left out of every shape below when the bucket has one view. F, H, W are the bucket's.

    Returns:
      video: uint8 (V F H W 3); missing when the record holds cached latents only.
      latents: float32 (V f h w 2z), cached VAE moments; missing when the record has none.
      caption: str, "" without one.
      frames_per_second: float32, of the frames kept; 0 for images.
      kind: int32, index into `jvgen.data.store.records.KINDS`.
      intrinsics: float32 (V F 4): fx, fy, cx, cy over the width and height of the transformed frame; 0 without cameras.
      extrinsics: float32 (V F 3 4): world-to-camera, OpenCV axes; 0 without cameras.
      has_camera, has_action: bool.
      actions: float32 (F A): each the sum of the recorded actions from its frame up to the next frame kept, so that
        displacements and velocities stay true at every stride; A is 0 without actions.
      rewards: float32 (F,): summed like the actions; 0 without rewards.
      seed: of what a task draws for this example on the host; depends on run, step and slot.

    Raises:
      DecodeError: a clip that cannot be decoded.
    """
    frames = sample.start + sample.stride * np.arange(bucket.frames)
    if sample.frames is not None:
        # Such frames do not follow on each other: no action leads from one to the next.
        frames, record = np.asarray(sample.frames), record.replace(actions=np.zeros((0, 0)), rewards=np.zeros(0))
    assert frames.max() < record.frames, f"record {record.id}: frame {frames.max()} of {record.frames}"
    example: dict[str, Any] = {
        "caption": record.captions[sample.caption] if sample.caption >= 0 else "",
        "frames_per_second": np.float32(record.frames_per_second / sample.stride),
        "kind": np.int32(KINDS.index(record.kind)),
        "seed": np.uint64(sample.seed),
        "has_camera": np.bool_(record.has_camera),
        "has_action": np.bool_(record.has_action),
        "actions": between_frames(record.actions, sample.start, sample.stride, bucket.frames),
        "rewards": between_frames(record.rewards, sample.start, sample.stride, bucket.frames),
    }
    videos, latents, intrinsics, extrinsics = [], [], [], []
    source_size, size = (record.height, record.width), (bucket.height, bucket.width)
    for view in sample.views:
        if record.clips:
            video = decode_window(record.clips[view], frames.tolist())
            source_size = video.shape[1:3]
            augment = sample.augmentation
            videos.append(fit(video, sample, size, resize) if augment is None else augment.apply(video, size))
        if record.latents.size:
            assert sample.frames is None and sample.augmentation is None, "cached latents are of whole windows"
            latents.append(latent_window(record.latents[view], record.frames, sample, bucket.frames))
        if record.has_camera:
            per_frame, poses = record.cameras(view)
            intrinsics.append(fit_intrinsics(per_frame[frames], sample, source_size, size, resize))
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


def fit(video: np.ndarray, sample: Sample, size: tuple[int, int], resize: Resize) -> np.ndarray:
    """Bring uint8 frames (F h w 3) to `size` (height, width): resize, crop, mirror. Contiguous uint8 (F H W 3)."""
    height, width = size
    (scaled_height, scaled_width), (top, left) = _geometry(video.shape[1:3], sample, size, resize)
    fitted = np.empty((len(video), height, width, 3), np.uint8)
    shrinks = scaled_height <= video.shape[1] and scaled_width <= video.shape[2]
    rows, columns = slice(None), slice(None)
    if shrinks:
        rows, scaled_height, top = _needed(video.shape[1], scaled_height, top, height)
        columns, scaled_width, left = _needed(video.shape[2], scaled_width, left, width)
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    for number, frame in enumerate(video):
        frame = frame[rows, columns]
        if frame.shape[:2] != (scaled_height, scaled_width):
            frame = cv2.resize(frame, (scaled_width, scaled_height), interpolation=interpolation)
        frame = frame[top : top + height, left : left + width]
        fitted[number] = frame[:, ::-1] if sample.flip else frame
    return fitted


def _needed(source: int, scaled: int, start: int, length: int) -> tuple[slice, int, int]:
    """What a crop of a shrunken side is made of: the pixels to read, the size to shrink them to, the crop's new start.

    Averages over areas repeat: of `source : scaled` in lowest terms, so many pixels make so many, with nothing shared.
    """
    common = math.gcd(source, scaled)
    pixels, made = source // common, scaled // common
    first, last = start // made, -(-(start + length) // made)
    return slice(first * pixels, last * pixels), (last - first) * made, start - first * made


def fit_intrinsics(
    intrinsics: np.ndarray, sample: Sample, source: tuple[int, int], size: tuple[int, int], resize: Resize
) -> np.ndarray:
    """Intrinsics (F 4) of frames after `fit` brought them from `source` to `size` (heights, widths in pixels).

    fx and cx are divided by the frame's width, fy and cy by its height, with 0 at the outer edge of the first pixel and
    1 at that of the last. So resizing alone changes nothing. Mirroring makes fx negative: the world is not mirrored.
    """
    (scaled_height, scaled_width), (top, left) = _geometry(source, sample, size, resize)
    height, width = size
    scale = np.array([scaled_width / width, scaled_height / height] * 2)
    fitted = intrinsics * scale - np.array([0, 0, left / width, top / height])
    if sample.flip:
        fitted = fitted * np.array([-1, 1, -1, 1]) + np.array([0, 0, 1, 0])
    return fitted.astype(np.float32)


def between_frames(values: np.ndarray, start: int, stride: int, frames: int) -> np.ndarray:
    """Sums of recorded values (T ...) from each frame kept up to the next one: float32 (frames ...).

    The last sum, too, is over `stride` recorded values, or as many as the recording has.
    """
    if not values.size:
        return np.zeros((frames, *values.shape[1:]), np.float32)
    window = np.zeros((frames * stride, *values.shape[1:]), np.float32)
    recorded = values[start : start + frames * stride]
    window[: len(recorded)] = recorded
    return reduce(window, "(frames stride) ... -> frames ...", "sum", stride=stride)


def latent_window(latents: np.ndarray, recorded: int, sample: Sample, frames: int) -> np.ndarray:
    """The latent frames of a window, float32, from cached moments (f h w 2z) of `recorded` frames.

    With one latent a frame, those of the frames kept. Latents that merge r frames (the first one stands for the first
    frame, each other one for r) are cut from the beginning: (frames - 1) // r + 1 of them.
    """
    if len(latents) == recorded:
        return latents[sample.start + sample.stride * np.arange(frames)].astype(np.float32)
    assert (sample.start, sample.stride) == (0, 1), "the plan starts merged latents at their first frame"
    merged = (recorded - 1) // max(len(latents) - 1, 1)
    return latents[: (frames - 1) // merged + 1].astype(np.float32)


def _geometry(
    source: Sequence[int], sample: Sample, size: tuple[int, int], resize: Resize
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size that frames are resized to, and the top left corner of the crop in it."""
    height, width = size
    if resize == "squash":
        return (height, width), (0, 0)
    scale = max(height / source[0], width / source[1])
    scaled = (max(height, round(source[0] * scale)), max(width, round(source[1] * scale)))
    fractions = (sample.crop_y, sample.crop_x) if resize == "crop" else (0.5, 0.5)
    top, left = (int(f * (have - need + 1)) for f, have, need in zip(fractions, scaled, size, strict=True))
    return scaled, (top, left)
