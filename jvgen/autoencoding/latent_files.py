"""Videos as files of latents, and back, in bounded memory at any length: `jvgen encode` and `jvgen decode`."""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.config import validate_tree
from jvgen.data.video_files import DecodeError, encode_image, probe_file, read_frames, write_frames
from jvgen.finite import NotFinite, narrowed
from jvgen.interop.digest import content_digest
from jvgen.storage import Path, UnreadableFile, local_copy, local_file, read_json_object, reading, write_text
from jvgen.terminal import Report

DTYPES = {"float32": np.float32, "float16": np.float16}
DISPLAY_RATE = 8.0  # frames per second of videos without a rate


@dataclasses.dataclass(frozen=True)
class Video:
    """The video that a file of latents was made from; stored beside it as JSON.

    Attributes:
      frames, height, width: of the video, before it was padded to whole latents.
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
    vae: StreamingVAE, digest: str, source: Path, target: Path, *, dtype: str = "float32", report: Report | None = None
) -> Video:
    """Write the latents of a video as `target` (.npy, `f h w z`), with a description (.json) beside it.

    Latents are posterior means, unscaled. Videos whose sizes are not whole latents are padded by repeating their last
    frame, row and column; `decode_file` crops them to their size again.

    Args:
      vae, digest: the autoencoder and its content hash.
      source: video or image file.
      target: file to create; it is written completely or not at all.
      dtype: "float32" or "float16".
      report: called with frames done and total frames.

    Raises:
      ValueError: a corrupt video.
      NotFinite: latents with NaN or infinity, or out of the range of float16.
    """
    source = local_copy(source)
    try:
        info = probe_file(source)
    except DecodeError as error:
        raise ValueError(f"{source}: {error}.") from error
    video = Video(info.frames, info.height, info.width, info.frames_per_second, digest, source.name)
    shape = vae.latent_shape(info.frames, info.height, info.width)
    done = 0
    with local_file(target) as partial:
        latents = np.lib.format.open_memmap(partial, mode="w+", dtype=DTYPES[dtype], shape=shape)
        try:
            for chunk in vae.encode(read_frames(source), info.frames):
                latents[done : done + len(chunk)] = narrowed("a latent", chunk, DTYPES[dtype])
                latents.flush()
                done += len(chunk)
                if report is not None:
                    report(min((done - 1) * vae.frames_per_latent + 1, info.frames), info.frames)
        except (DecodeError, NotFinite) as error:
            raise _about(source, error) from error
        assert done == shape[0], f"{done} of {shape[0]} latent frames"
        del latents
        write_text(sidecar(target), json.dumps(dataclasses.asdict(video), indent=1) + "\n")
    return video


def decode_file(
    vae: StreamingVAE,
    digest: str,
    source: Path,
    target: Path,
    *,
    frames_per_second: float | None = None,
    quality: int = 18,
    report: Report | None = None,
) -> Video:
    """Write the video (.mp4; .png for an image) of latents that `encode_file` wrote.

    Args:
      vae, digest: the autoencoder and its content hash, which must be the one stored with the latents.
      source: latents.
      target: file to create; it is written completely or not at all.
      frames_per_second: replaces the video's rate.
      quality: see `jvgen.data.video_files.encode_video`.
      report: called with frames done and total frames.

    Raises:
      ValueError: no such latents, of another autoencoder, or of a shape other than in their JSON.
      NotFinite: latents or pixels with NaN or infinity.
    """
    video, latents = read_latents(source)
    if video.vae != digest:
        raise ValueError(f"{source}: was encoded by the autoencoder {video.vae[:12]}, but --vae is {digest[:12]}.")
    if latents.shape != vae.latent_shape(video.frames, video.height, video.width):
        raise ValueError(
            f"{source}: latents of shape {latents.shape} are not those of {sidecar(source)}; encode the video again."
        )

    def frames() -> Iterator[np.ndarray]:
        done = 0
        rows = (np.asarray(latents[index], np.float32) for index in range(len(latents)))
        for chunk in vae.decode(rows, len(latents)):
            chunk = chunk[: video.frames - done, : video.height, : video.width]
            yield from chunk
            done += len(chunk)
            if report is not None:
                report(done, video.frames)

    try:
        with local_file(target) as partial:
            if target.suffix == ".png":
                partial.write_bytes(encode_image(next(frames())))
            else:
                rate = frames_per_second or video.frames_per_second or DISPLAY_RATE
                write_frames(partial, frames(), rate, quality=quality)
    except NotFinite as error:
        raise _about(source, error) from error
    return video


def _about(source: Path, error: ValueError) -> ValueError:
    """The error with the name of the file that was coded."""
    return (NotFinite if isinstance(error, NotFinite) else ValueError)(f"{source}: {error}")


def read_latents(path: Path) -> tuple[Video, np.ndarray]:
    """The video that a file of latents was made from, and the latents as a memory map.

    Raises:
      ValueError: not a file that `encode_file` wrote.
    """
    beside = sidecar(path)
    if not path.is_file() or not beside.is_file():
        raise ValueError(f"{path}: needs latents and {beside.name} beside them, as written by `jvgen encode`.")
    description, latents = local_copy(beside), local_copy(path)
    with reading(description, "does not describe latents", "Encode the video again."):
        video = Video(**read_json_object(description))
        validate_tree(video)
    with reading(latents, "holds no latents", "Encode the video again."):
        array = np.load(latents, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype not in DTYPES.values() or array.ndim != 4:
        raise UnreadableFile(f"{path}: expected a float32 or float16 array `f h w z`. Encode the video again.")
    return video, array


def sidecar(path: Path) -> Path:
    """Path of the description of a file of latents."""
    return path.with_suffix(".json")


def open_vae(folder: Path, chunk_frames: int, compute_dtype: str = "float32") -> tuple[StreamingVAE, str]:
    """The autoencoder in a folder and its content hash."""
    return StreamingVAE(folder, chunk_frames=chunk_frames, compute_dtype=compute_dtype), content_digest(str(folder))
