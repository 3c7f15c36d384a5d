"""Builds data sets of cached VAE latents, with the digest of the encoder that made them."""

import functools
from collections.abc import Callable

import numpy as np

from jvgen.data.builders.build_loop import BuildJob, Execution, Progress, Summary, available_cpus, build_dataset
from jvgen.data.store.records import Record
from jvgen.data.store.sources import Source, find_dataset, open_source, splits
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.source_checks import LATENTS_FORMAT
from jvgen.data.stream.transforms import fit, fit_intrinsics, sum_over_stride
from jvgen.data.video_files import DecodeError, decode_window, encode_image, encode_video
from jvgen.finite import NotFinite, narrowed
from jvgen.storage import Path

# uint8 frames (F, H, W, 3) to moments (f, h, w, 2z): mean, then log-variance.
Encode = Callable[[np.ndarray], np.ndarray]


def build_latents(
    source: str | Path,
    out: str | Path,
    encode: Encode,
    *,
    encoder_digest: str,
    height: int,
    width: int,
    frames: int | None = None,
    stride: int = 1,
    group: int = 1,
    keep_clips: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Encode every record of a data set once and store the moments, so that training never runs the VAE.

    Frames are resized and center-cropped to one size. The encoder's digest and the options are stored in `jvgen.json`
    and checked by `jvgen.data.stream.source_checks.check_latents`.

    Args:
      source: folder of a data set with clips; its splits are kept.
      out: folder of the new data set.
      encode: `(uint8 F H W 3) -> (f h w 2z)` moments of one view, called in this thread.
      encoder_digest: content hash of the encoder's weights and configuration.
      height, width: frame size of the encoder's input, in pixels.
      frames: maximum number of frames per clip, from its start; by default all. Shorter clips are encoded whole.
      stride: frame stride.
      group: frames per latent frame; a clip is cut to its first frame and a multiple of `group` frames after it.
      keep_clips: also store the resized clips.
      workers: threads that read and decode ahead of the encoder; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Raises:
      BuildError: records that cannot be decoded.
      ValueError: no data set at `source`.
      NotFinite: latents with NaN or infinity, or that float16 cannot represent.
    """
    if min(height, width, stride) < 1 or (frames is not None and frames < 1):
        raise ValueError(f"height = {height}, width = {width}, frames = {frames}, stride = {stride}: 1 or more each.")
    folder = find_dataset(source)
    sources = {split: open_source(folder, split) for split in splits(folder)}
    options = {"height": height, "width": width, "frames": frames, "stride": stride}
    options |= {"group": group} if group > 1 else {}
    jobs = [BuildJob(split, str(s.index.id[row]), (s, row)) for split, s in sources.items() for row in range(len(s))]
    make = functools.partial(_selected, height=height, width=width, frames=frames, stride=stride, group=group)

    def finish(selected: tuple[Record, np.ndarray]) -> Record:
        return _with_latents(*selected, encode, keep_clips)

    return build_dataset(
        out, jobs, make, finish=finish,
        description=f"VAE latents of {folder.name}.",
        metadata={
            "origin": "latents",
            "options": {"source": str(folder), **options},
            "latents": {"format": LATENTS_FORMAT, "encoder": encoder_digest, **options},
            "source_digests": {split: s.index.digest for split, s in sources.items()},
        },
        workers=available_cpus() if workers is None else workers, overwrite=overwrite, progress=progress,
        execution=execution,
    )  # fmt: skip


def _selected(
    payload: tuple[Source, int], height: int, width: int, frames: int | None, stride: int, group: int
) -> tuple[Record, np.ndarray]:
    """The record of the selected frames, and their pixels: uint8 (V, F, height, width, 3)."""
    record = payload[0].read(payload[1])
    if not record.clips:
        raise DecodeError("has latents but no pixels")
    kept = list(range(0, record.frames, stride))[:frames]
    kept = kept[: (len(kept) - 1) // group * group + 1]
    whole = ClipSpec(start=0, stride=stride, views=(), crop_y=0.5, crop_x=0.5, flip=False, caption=-1)
    video, intrinsics, extrinsics = [], [], []
    for view, clip in enumerate(record.clips):
        pixels = decode_window(clip, kept)
        video.append(fit(pixels, whole, (height, width), "center_crop"))
        if record.has_camera:
            inside, outside = record.cameras(view)
            size = pixels.shape[1:3]
            intrinsics.append(fit_intrinsics(inside[kept], whole, size, (height, width), "center_crop"))
            extrinsics.append(outside[kept])
    changes = {"frames": len(kept), "height": height, "width": width}
    if record.has_camera:
        changes |= {"intrinsics": np.concatenate(intrinsics), "extrinsics": np.concatenate(extrinsics)}
    changes["frames_per_second"] = record.frames_per_second / stride
    if record.frame_times.size:
        changes["frame_times"] = record.frame_times[kept]
    if record.has_action:
        changes["actions"] = sum_over_stride(record.actions, 0, stride, len(kept))
    if record.rewards.size:
        changes["rewards"] = sum_over_stride(record.rewards, 0, stride, len(kept))
    return record.replace(clips=(), **changes), np.stack(video)


def _with_latents(record: Record, video: np.ndarray, encode: Encode, keep_clips: bool) -> Record:
    try:
        moments = np.stack([np.asarray(encode(view), np.float32) for view in video])
    except NotFinite as error:
        raise NotFinite(f"record {record.id}: {error}") from error
    stored = narrowed(f"record {record.id}: a latent moment", moments, np.float16)
    clips: tuple[bytes, ...] = ()
    if keep_clips and record.kind == "image":
        clips = tuple(encode_image(view[0]) for view in video)
    elif keep_clips:
        clips = tuple(encode_video(view, record.frames_per_second) for view in video)
    return record.replace(clips=clips, latents=stored)
