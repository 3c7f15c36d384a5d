"""Builds data sets of cached VAE latents, with the digest of the encoder that made them."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jvgen.data.builders.batches import BatchEncoder, Separately, ToEncode
from jvgen.data.builders.build_loop import (
    BuildJob,
    Execution,
    Made,
    Progress,
    Summary,
    available_cpus,
    build_dataset,
)
from jvgen.data.builders.units import records_per_unit
from jvgen.data.builders.up_to_date import existing, source_digests
from jvgen.data.store.records import Record
from jvgen.data.store.sources import Source, find_dataset, open_source, read_metadata, splits
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.source_checks import LATENTS_FORMAT
from jvgen.data.stream.transforms import fit, fit_intrinsics, sum_over_stride
from jvgen.data.video_files import DecodeError, decode_window, encode_image, encode_video
from jvgen.finite import narrowed
from jvgen.storage import Path

# uint8 frames (F, H, W, 3) to moments (f, h, w, 2z): mean, then log-variance.
Encode = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """Which parts of clips are encoded, and at which size.

    Attributes:
      sizes: heights and widths of the encoder's input, in pixels. A clip is brought to the one whose aspect ratio is
        nearest to its own, and of those to the largest that needs no upscaling.
      frames: maximum number of frames of a window; by default all. Shorter clips are encoded whole.
      stride: frame stride.
      windows: windows of a clip, evenly spaced over it; a record each, `ID/0000`, `ID/0001` ... Clips without room for
        so many have fewer.
      flips: also encode mirrored windows, `ID/0000-flipped`, except those with cameras or actions.
      keep_clips: also store the resized frames.
    """

    sizes: tuple[tuple[int, int], ...]
    frames: int | None = None
    stride: int = 1
    windows: int = 1
    flips: bool = False
    keep_clips: bool = False

    def validate(self) -> None:
        """Raise `ValueError` for invalid values."""
        numbers = [self.stride, self.windows, *([] if self.frames is None else [self.frames])]
        if not self.sizes or min(*numbers, *(side for size in self.sizes for side in size)) < 1:
            raise ValueError(
                f"sizes = {self.sizes}, frames = {self.frames}, stride = {self.stride}, windows = {self.windows}: "
                "1 or more each."
            )
        if self.windows > 1 and self.frames is None:
            raise ValueError(f"windows = {self.windows}: say how long a window is (--frames).")

    def options(self, group: int) -> dict[str, Any]:
        """What the latents depend on, for `jvgen.json`; only what is used."""
        height, width = self.sizes[0]
        options: dict[str, Any] = {"height": height, "width": width, "frames": self.frames, "stride": self.stride}
        options |= {"sizes": [list(size) for size in self.sizes]} if len(self.sizes) > 1 else {}
        options |= {"group": group} if group > 1 else {}
        options |= {"windows": self.windows} if self.windows > 1 else {}
        options |= {"flips": True} if self.flips else {}
        return options | ({"clips": True} if self.keep_clips else {})


def build_latents(
    source: str | Path,
    out: str | Path,
    encoder: BatchEncoder | Encode,
    config: LatentsConfig,
    *,
    encoder_digest: str,
    group: int = 1,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Encode every record of a data set once and store the moments, so that training never runs the VAE.

    Frames are resized and center-cropped. Clips of one size are encoded in batches, while the next ones are decoded.
    What the latents depend on (encoder, options, records) is stored in `jvgen.json` and checked here, before
    latents of something else are replaced, and by `jvgen.data.stream.source_checks.check_latents`.

    Args:
      source: folder of a data set with clips; its splits are kept.
      out: folder of the new data set.
      encoder: of batches of clips, or a function of one: `(uint8 F H W 3) -> (f h w 2z)`. Called in this thread.
      config: windows and sizes.
      encoder_digest: content hash of the encoder's weights and configuration.
      group: frames per latent frame; a clip is cut to its first frame and a multiple of `group` frames after it.
      workers: threads that read and decode ahead of the encoder; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Returns:
      The summary; of the data set at `out` if it has the latents already.

    Raises:
      BuildError: records that cannot be decoded.
      ValueError: no data set at `source`, or a data set at `out` that was made of something else.
      NotFinite: latents with NaN or infinity, or that float16 cannot represent.
    """
    config.validate()
    execution = execution or Execution()
    folder = find_dataset(source)
    sources = {split: open_source(folder, split) for split in splits(folder)}
    options = config.options(group)
    made_with = {"format": LATENTS_FORMAT, "encoder": encoder_digest, **options}
    digests = source_digests(sources, out, execution)
    address = hashlib.sha256(json.dumps([made_with, digests], sort_keys=True).encode()).hexdigest()
    before = read_metadata(folder)
    metadata = {
        # Records keep the embeddings of their captions.
        **{name: before[name] for name in ("text_embeddings", "empty_caption") if name in before},
        "origin": "latents",
        "options": {"source": str(folder), **options},
        "latents": made_with,
        "source_digests": digests,
        "address": address,
    }
    there = existing(out, metadata, ("latents", "source_digests"), overwrite=overwrite, execution=execution)
    if there is not None:
        return there
    if execution.jobs_per_unit is None:
        execution = dataclasses.replace(execution, jobs_per_unit=records_per_unit(_record_bytes(sources, config)))
    jobs = [BuildJob(split, str(s.index.id[row]), (s, row)) for split, s in sources.items() for row in range(len(s))]
    return build_dataset(
        out, jobs, functools.partial(_selected, config=config, group=group),
        encoder=Separately(encoder) if not hasattr(encoder, "begin") else encoder,
        description=f"VAE latents of {folder.name}.", metadata=metadata,
        workers=available_cpus() if workers is None else workers, overwrite=overwrite, progress=progress,
        execution=execution,
    )  # fmt: skip


def _record_bytes(sources: Mapping[str, Source], config: LatentsConfig) -> float:
    """About as many as the latents of a clip have, by the published VAEs: 32 float16 for 4 frames of 8x8 pixels."""
    longest = [source.index.frames.max() for source in sources.values() if len(source)]
    frames = min(config.frames or 10**9, int(max(longest, default=1)) // config.stride + 1)
    height, width = max(config.sizes, key=math.prod)
    return frames * height * width / 4 * config.windows * (2 if config.flips else 1)


def _selected(payload: tuple[Source, int], config: LatentsConfig, group: int) -> ToEncode:
    """The windows of a record, mirrored too if asked for: their pixels, and what makes records of their moments."""
    record = payload[0].read(payload[1])
    if not record.clips:
        raise DecodeError("has latents but no pixels")
    size = _size_for(record, config.sizes)
    rigid = record.has_camera or record.has_action
    notes = ("not mirrored: has cameras or actions",) if config.flips and rigid else ()
    # Latents compressed in time cannot be resampled when they are read, as frames are.
    notes += ("of a variable frame rate: build the clips with --fps for even times",) if record.frame_times.size else ()
    windows, named = _windows(record.frames, config, group), config.windows > 1 or config.flips
    drafts, pixels = [], []
    for number, kept in enumerate(windows):
        for flip in (False, True) if config.flips and not rigid else (False,):
            name = f"{record.id}/{number:04d}{'-flipped' if flip else ''}" if named else record.id
            draft, views = _window(record, kept, config.stride, size, flip)
            drafts.append(draft.replace(id=name, clips=_files(draft, views) if config.keep_clips else ()))
            pixels.append(views)
    return ToEncode(tuple(view for views in pixels for view in views), functools.partial(_made, drafts, notes))


def _size_for(record: Record, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    ratio = record.width / record.height

    def rank(size: tuple[int, int]) -> tuple[float, bool, int]:
        height, width = size
        larger = height > record.height or width > record.width
        return round(abs(math.log(width / height / ratio)), 6), larger, height * width * (1 if larger else -1)

    return min(sizes, key=rank)


def _windows(recorded: int, config: LatentsConfig, group: int) -> list[list[int]]:
    """The recorded frames of each window."""
    every = range(0, recorded, config.stride)
    count = len(every[: config.frames])
    count = (count - 1) // group * group + 1
    room = recorded - ((count - 1) * config.stride + 1)
    starts = dict.fromkeys(round(start) for start in np.linspace(0, room, config.windows).tolist())
    return [[start + config.stride * place for place in range(count)] for start in starts]


def _window(
    record: Record, kept: list[int], stride: int, size: tuple[int, int], flip: bool
) -> tuple[Record, list[np.ndarray]]:
    """The record of some frames, and their pixels by view: uint8 (F, height, width, 3)."""
    whole = ClipSpec(start=kept[0], stride=stride, views=(), crop_y=0.5, crop_x=0.5, flip=flip, caption=-1)
    video, intrinsics, extrinsics = [], [], []
    for view, clip in enumerate(record.clips):
        pixels = decode_window(clip, kept)
        video.append(fit(pixels, whole, size, "center_crop"))
        if record.has_camera:
            inside, outside = record.cameras(view)
            intrinsics.append(fit_intrinsics(inside[kept], whole, pixels.shape[1:3], size, "center_crop"))
            extrinsics.append(outside[kept])
    changes: dict[str, Any] = {"frames": len(kept), "height": size[0], "width": size[1]}
    if record.has_camera:
        changes |= {"intrinsics": np.concatenate(intrinsics), "extrinsics": np.concatenate(extrinsics)}
    changes["frames_per_second"] = record.frames_per_second / stride
    if record.frame_times.size:
        changes["frame_times"] = record.frame_times[kept] - record.frame_times[kept[0]]
    if record.has_action:
        changes["actions"] = sum_over_stride(record.actions, kept[0], stride, len(kept))
    if record.rewards.size:
        changes["rewards"] = sum_over_stride(record.rewards, kept[0], stride, len(kept))
    return record.replace(**changes), video


def _files(record: Record, video: list[np.ndarray]) -> tuple[bytes, ...]:
    if record.kind == "image":
        return tuple(encode_image(view[0]) for view in video)
    return tuple(encode_video(view, record.frames_per_second) for view in video)


def _made(drafts: list[Record], notes: tuple[str, ...], moments: list[np.ndarray]) -> Made:
    records, views = [], iter(moments)
    for draft in drafts:
        stacked = np.stack([np.asarray(next(views), np.float32) for _ in range(draft.views)])
        latents = narrowed(f"record {draft.id}: a latent moment", stacked, np.float16)
        records.append(draft.replace(latents=latents))
    return Made(tuple(records), notes)
