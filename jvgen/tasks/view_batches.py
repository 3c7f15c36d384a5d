"""Examples of several views: synchronized clips, folded static clips, and dynamic clips with a warped copy."""

import enum
from typing import Any

import numpy as np

from jvgen.data.store.records import KINDS
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.pairs import HomographyConfig, folded, latent_valid, warped_pair
from jvgen.geometry.cameras import of_latent_frames
from jvgen.parallel import axes
from jvgen.tasks.given_frames import Condition, of_clip, require_pixels
from jvgen.tasks.task import ArraySpec


class ViewKind(enum.Enum):
    """Where the views of an example come from."""

    SYNCHRONIZED = "synchronized"  # recorded by several cameras at once
    FOLDED = "folded"  # a static scene and one moving camera: backward and forward from the middle frame
    WARPED = "warped"  # a dynamic scene, and a copy warped by a homography that grows over time


def kind_of(bucket: BucketConfig) -> ViewKind:
    """How the views of a bucket's examples are made.

    Raises:
      ValueError: a bucket of single clips that mixes static scenes, dynamic scenes or images.
    """
    if bucket.views > 1:
        return ViewKind.SYNCHRONIZED
    if bucket.kinds == ("static",):
        return ViewKind.FOLDED
    if bucket.kinds == ("dynamic",):
        return ViewKind.WARPED
    raise ValueError(
        f"views = 1, kinds = {bucket.kinds}: single clips become two views by folding (kinds = static) or with a "
        "warped copy (kinds = dynamic): use one bucket for each, weighted 0.7 and 0.3 for instance; or set views."
    )


def clip_frames(bucket: BucketConfig) -> int:
    """Frames of each view.

    Raises:
      ValueError: a bucket to be folded with an even number of frames.
    """
    if kind_of(bucket) is not ViewKind.FOLDED:
        return bucket.frames
    if bucket.frames % 2 == 0:
        raise ValueError(f"frames = {bucket.frames}: 2N - 1 frames are folded into two views of N; must be odd.")
    return bucket.frames // 2 + 1


def views_of(bucket: BucketConfig) -> int:
    """Views per example."""
    return max(bucket.views, 2)


def fields(
    bucket: BucketConfig,
    latent: tuple[int, int, int],
    *,
    channels: int,
    from_pixels: bool,
    text: dict[str, ArraySpec],
    given: int = 0,
) -> dict[str, ArraySpec]:
    """The arrays of an example of a bucket.

    Args:
      bucket: size of the clips.
      latent: frames, height and width of the latents of one view.
      channels: of cached posterior moments.
      from_pixels: clips are stored as pixels, not as cached moments.
      text: the caption's array.
      given: frames that each view is conditioned on, stored beside cached moments.
    """
    kind, views, frames = kind_of(bucket), views_of(bucket), clip_frames(bucket)
    places = (axes.VIEWS, axes.FRAMES, axes.HEIGHT, axes.WIDTH)
    found = dict(text)
    if from_pixels or kind is ViewKind.WARPED:
        shape = (views, frames, bucket.height, bucket.width, 3)
        found["video"] = ArraySpec(shape, np.dtype(np.uint8), (*places, None))
    else:
        found["latents"] = ArraySpec((views, *latent, channels), np.dtype(np.float32), (*places, None))
        if given:
            shape = (views, given, bucket.height, bucket.width, 3)
            found["given"] = ArraySpec(shape, np.dtype(np.uint8), (*places, None))
    if kind is ViewKind.WARPED:
        found["homographies"] = ArraySpec((latent[0], 3, 3), np.dtype(np.float32), (axes.FRAMES, None, None))
        found["valid"] = ArraySpec((views, *latent), np.dtype(np.uint8), places)
        return found
    found["intrinsics"] = ArraySpec((views, frames, 4), np.dtype(np.float32), (*places[:2], None))
    found["extrinsics"] = ArraySpec((views, frames, 3, 4), np.dtype(np.float32), (*places[:2], None, None))
    return found


def prepare(
    example: dict[str, Any],
    homography: HomographyConfig,
    *,
    from_pixels: bool,
    spatial: int,
    temporal: int,
    condition: Condition = "none",
) -> dict[str, np.ndarray]:
    """The arrays of `fields` except the caption, from an example of `jvgen.data.stream.transforms.load_example`.

    Args:
      example: one clip, or several views.
      homography: strength of the warp of copies.
      from_pixels: see `fields`.
      spatial, temporal: pixels and frames per latent.
      condition: frames that each view is conditioned on.

    Raises:
      ValueError: an example without cameras, or without the array that is needed.
    """
    clip = "video" if from_pixels else "latents"
    several = next(example[name] for name in ("video", "latents") if name in example).ndim == 5
    if not several and KINDS[int(example["kind"])] == "dynamic":
        _require(example, "video", "dynamic clips are warped as pixels; build a data set that keeps the clips")
        pair = warped_pair(example["video"], homography, int(example["seed"]))
        return {
            "video": pair.video,
            "homographies": of_latent_frames(pair.homographies, temporal, axis=0),
            "valid": latent_valid(pair.valid, spatial, temporal).astype(np.uint8),
        }
    need = "set task.latents = 'data'" if from_pixels else "cache latents with `jvgen data build latents`"
    _require(example, clip, f"the data set has none; {need}")
    if not example["has_camera"]:
        raise ValueError("an example of several views has no cameras; its data set needs cameras.")
    names = (clip, "intrinsics", "extrinsics")
    found = {name: example[name] if several else folded(example[name]) for name in names}
    if condition == "none" or from_pixels:
        return found
    video = require_pixels(example)
    return {**found, "given": of_clip(video if several else folded(video), condition, axis=1)}


def _require(example: dict[str, Any], name: str, why: str) -> None:
    if name not in example:
        raise ValueError(f"an example lacks {name!r}: {why}.")
