"""Videos as files of latents, and back: `jvgen encode` and `jvgen decode`, in bounded memory whatever the length."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jvgen.autoencoding.streaming import VideoCoder
from jvgen.data.video_files import DecodeError, encode_image, probe_file, read_frames, write_frames
from jvgen.interop.digest import content_digest
from jvgen.terminal import Report

DTYPES = {"float32": np.float32, "float16": np.float16}
DISPLAY_RATE = 8.0  # of videos that do not say


@dataclasses.dataclass(frozen=True)
class Video:
    """What a file of latents was made of; kept beside it as JSON.

    Attributes:
      frames, height, width: of the video, before it was filled up to whole latents.
      frames_per_second: average rate; 0 for an image.
      vae: content hash of the autoencoder.
      source: name of the video's file.
    """

    frames: int
    height: int
    width: int
    frames_per_second: float
    vae: str
    source: str


def encode_file(
    coder: VideoCoder, digest: str, source: Path, target: Path, *, dtype: str = "float32", report: Report | None = None
) -> Video:
    """Write the latents of a video as `target` (.npy, `f h w z`) and what it was beside it (.json).

    Latents are posterior means, in the scale of the decoder. Videos whose sizes leave something over are filled up by
    repeating their last frame, row and column, and cut to size again by `decode_file`.

    Args:
      coder, digest: the autoencoder and its content hash.
      source: video or image file.
      target: to create; it appears complete or not at all.
      dtype: "float32" or "float16".
      report: called with frames done and frames in all.

    Raises:
      ValueError: a damaged video, or latents that float16 cannot hold.
    """
    try:
        info = probe_file(source)
    except DecodeError as error:
        raise ValueError(f"{source}: {error}.") from error
    video = Video(info.frames, info.height, info.width, info.frames_per_second, digest, source.name)
    shape = coder.latent_shape(info.frames, info.height, info.width)
    partial = target.with_name(f"{target.name}.partial")
    latents = np.lib.format.open_memmap(partial, mode="w+", dtype=DTYPES[dtype], shape=shape)
    done = 0
    try:
        for part in coder.encode(read_frames(source), info.frames):
            if not np.isfinite(part).all() or np.abs(part).max() > np.finfo(DTYPES[dtype]).max:
                raise ValueError(f"{source}: latents are not finite in {dtype}; is the autoencoder damaged?")
            latents[done : done + len(part)] = part
            latents.flush()
            done += len(part)
            if report is not None:
                report(min((done - 1) * coder.group + 1, info.frames), info.frames)
    except ValueError as error:
        partial.unlink()
        raise ValueError(f"{source}: {error}") if isinstance(error, DecodeError) else error from error
    assert done == shape[0], f"{done} of {shape[0]} latent frames"
    del latents
    sidecar(target).write_text(json.dumps(dataclasses.asdict(video), indent=1) + "\n")
    partial.replace(target)
    return video


def decode_file(
    coder: VideoCoder,
    digest: str,
    source: Path,
    target: Path,
    *,
    frames_per_second: float | None = None,
    quality: int = 18,
    report: Report | None = None,
) -> Video:
    """Write the video (.mp4; .png for an image) of a file that `encode_file` wrote.

    Args:
      coder, digest: the autoencoder and its content hash, which has to be that of the encoder.
      source: latents.
      target: to create; it appears complete or not at all.
      frames_per_second: instead of the video's own.
      quality: see `jvgen.data.video_files.encode_video`.
      report: called with frames done and frames in all.

    Raises:
      ValueError: no such latents, of another autoencoder, or of another shape than their JSON says.
    """
    video, latents = read_latents(source)
    if video.vae != digest:
        raise ValueError(f"{source}: was encoded by the autoencoder {video.vae[:12]}, and --vae is {digest[:12]}.")
    if latents.shape != coder.latent_shape(video.frames, video.height, video.width):
        raise ValueError(f"{source}: latents of shape {latents.shape} are not those of {sidecar(source)}.")

    def frames() -> Iterator[np.ndarray]:
        done = 0
        rows = (np.asarray(latents[index], np.float32) for index in range(len(latents)))
        for part in coder.decode(rows, len(latents)):
            part = part[: video.frames - done, : video.height, : video.width]
            yield from part
            done += len(part)
            if report is not None:
                report(done, video.frames)

    partial = target.with_name(f"{target.name}.partial")
    if target.suffix == ".png":
        partial.write_bytes(encode_image(next(frames())))
    else:
        write_frames(partial, frames(), frames_per_second or video.frames_per_second or DISPLAY_RATE, quality=quality)
    partial.replace(target)
    return video


def read_latents(path: Path) -> tuple[Video, np.ndarray]:
    """What a file of latents was made of, and the latents, mapped and not read.

    Raises:
      ValueError: not a file that `encode_file` wrote.
    """
    beside = sidecar(path)
    if not path.is_file() or not beside.is_file():
        raise ValueError(f"{path}: needs latents and {beside.name} beside them, as `jvgen encode` writes both.")
    try:
        return Video(**json.loads(beside.read_text())), np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} or {beside.name} is damaged ({error}); encode the video again.") from error


def sidecar(path: Path) -> Path:
    """Where what latents were made of is kept."""
    return path.with_suffix(".json")


def open_coder(folder: Path, part: int, compute_dtype: str = "float32") -> tuple[VideoCoder, str]:
    """The autoencoder in a folder and its content hash."""
    return VideoCoder(folder, part=part, compute_dtype=compute_dtype), content_digest(str(folder))
