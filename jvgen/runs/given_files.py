"""Image and video files that clips are made from, fitted to the clips' size."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from jvgen.data.video_files import DecodeError, decode_window, is_image, probe
from jvgen.storage import Path, read_bytes
from jvgen.tasks.given_frames import GivenPixels

Fit = Literal["crop", "pad"]
# Files whose aspect ratio differs less are resized: nobody sees it, and sizes that the network takes are rarely exact.
MAX_STRETCH = 0.02
STRENGTH = 0.8


@dataclasses.dataclass(frozen=True)
class GivenFiles:
    """What `--image`, `--last-image`, `--video`, `--strength` and `--fit` name.

    Attributes:
      images: first frames: one for all prompts or one per prompt; with views, one per view.
      last_images: last frames, as many as `images`.
      video: clip that is changed; None for none.
      strength: how much of it, above 0 and up to 1; None for 0.8, as in diffusers.
      fit: what is done with files of another aspect ratio; None refuses them.
    """

    images: tuple[Path, ...] = ()
    last_images: tuple[Path, ...] = ()
    video: Path | None = None
    strength: float | None = None
    fit: Fit | None = None

    def __post_init__(self) -> None:
        if self.last_images and len(self.last_images) != len(self.images):
            raise ValueError(
                f"--last-image is given {len(self.last_images)} times, --image {len(self.images)} times: give a last "
                "frame for each first one."
            )
        if self.strength is not None and self.video is None:
            raise ValueError(f"--strength {self.strength}: how much of a video is changed; give --video FILE.")
        if self.video is not None and self.images:
            raise ValueError("--image and --video: clips are made from one of them; leave one out.")
        if self.fit is not None and not (self.images or self.video):
            raise ValueError(f"--fit {self.fit}: what is done with --image or --video; give one of them.")

    @property
    def strength_of_video(self) -> float | None:
        """How much of the video is changed; None without one."""
        return None if self.video is None else STRENGTH if self.strength is None else self.strength

    @property
    def frames(self) -> int:
        """Images that each clip is made from."""
        return bool(self.images) + bool(self.last_images)

    def check_count(self, needed: int, of: str) -> None:
        """Raise `ValueError` unless there is one image, or as many as `needed`."""
        if len(self.images) not in (0, 1, needed):
            raise ValueError(
                f"--image is given {len(self.images)} times for {needed} {of}: give one for all, or one for each in "
                "order."
            )

    def size_of_video(self) -> int | None:
        """Frames of the video; None without one."""
        return None if self.video is None else _read(self.video, "--video", probe).frames

    def read(self, frames: int, size: tuple[int, int], rows: Sequence[int]) -> GivenPixels | None:
        """The pixels for each clip, uint8 on the host: `N K H W 3` and `N F H W 3`; None if nothing is given.

        Args:
          frames, size: of the clips, (height, width).
          rows: for each of N clips the number of its image, where there are several.

        Raises:
          ValueError: no such file, no image or video, another aspect ratio without `fit`, a video that is too short.
        """
        if self.video is not None:
            clip = self._video(frames, size)
            return GivenPixels(video=np.broadcast_to(clip, (len(rows), *clip.shape)))
        if not self.images:
            return None
        firsts = [self._image(path, "--image", size) for path in self.images]
        lasts = [self._image(path, "--last-image", size) for path in self.last_images]
        sets = np.stack([np.stack(pair) for pair in (zip(firsts, lasts, strict=True) if lasts else zip(firsts))])
        return GivenPixels(frames=sets[[row if len(sets) > 1 else 0 for row in rows]])

    def digests(self) -> dict[str, Any]:
        """What decides the clips, for the index of a folder: nothing if no file is given."""
        named = {"image": self.images, "last_image": self.last_images, "video": (self.video,) if self.video else ()}
        found: dict[str, Any] = {name: [_digest(path) for path in paths] for name, paths in named.items() if paths}
        if self.video is not None:
            found["strength"] = self.strength_of_video
        return {**found, "fit": self.fit} if found else {}

    def _image(self, path: Path, flag: str, size: tuple[int, int]) -> np.ndarray:
        def decode(content: bytes) -> np.ndarray:
            if not is_image(content):
                raise DecodeError("not a png, jpeg, webp or bmp image")
            return decode_window(content, [0])[0]

        return fitted(_read(path, flag, decode), size, self.fit, f"{flag} {path}")

    def _video(self, frames: int, size: tuple[int, int]) -> np.ndarray:
        def decode(content: bytes) -> np.ndarray:
            there = probe(content).frames
            if there < frames:
                raise DecodeError(f"has {there} frames, the clip {frames}; give --frames {there} or fewer")
            return decode_window(content, list(range(frames)))

        clip = _read(self.video, "--video", decode)
        return np.stack([fitted(frame, size, self.fit, f"--video {self.video}") for frame in clip])


NOTHING = GivenFiles()


def fitted(pixels: np.ndarray, size: tuple[int, int], fit: Fit | None, name: str) -> np.ndarray:
    """A frame `h w 3` at `size` (height, width), uint8, resized by Lanczos's filter as diffusers does.

    Args:
      fit: "crop" cuts what is too much around the center, "pad" adds black bars; None refuses another aspect ratio.
      name: of the file, for the message.

    Raises:
      ValueError: another aspect ratio and no `fit`.
    """
    (height, width), (rows, columns) = pixels.shape[:2], size
    stretch = (columns / rows) / (width / height)
    if abs(stretch - 1) <= MAX_STRETCH:
        return _resized(pixels, size)
    if fit is None:
        raise ValueError(
            f"{name}: is {height}x{width} pixels, the clips are {rows}x{columns}, which is another aspect ratio: give "
            "--fit crop (cut around the center) or --fit pad (black bars), or another --size."
        )
    choose = max if fit == "crop" else min
    scale = choose(rows / height, columns / width)
    inner = round(height * scale), round(width * scale)
    made = _resized(pixels, inner)
    if fit == "crop":
        top, left = (inner[0] - rows) // 2, (inner[1] - columns) // 2
        return made[top : top + rows, left : left + columns]
    black = np.zeros((*size, 3), np.uint8)
    top, left = (rows - inner[0]) // 2, (columns - inner[1]) // 2
    black[top : top + inner[0], left : left + inner[1]] = made
    return black


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS))


def _read(path: Path, flag: str, decode: Callable[[bytes], Any]) -> Any:
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file.")
    try:
        return decode(read_bytes(path))
    except DecodeError as error:
        raise ValueError(f"{flag} {path}: {error}.") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()
