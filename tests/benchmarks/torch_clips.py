"""The PyTorch side of the data benchmark: a Dataset that reads windows of video files with PyAV and OpenCV.

Imports nothing of jvgen or JAX: worker processes import this module.
"""

from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import Interpolation

# FFmpeg's conversion without its bias, which jvgen's is compared with.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Window(NamedTuple):
    """A part of a file: where it begins, the size to bring frames to, and the crop's corner in it."""

    path: str
    start: int
    stride: int
    frames: int
    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


class Clips(torch.utils.data.Dataset):
    """Window number -> uint8 tensor (F H W 3)."""

    def __init__(self, windows: list[Window], decoder: str = "pyav"):
        self.windows, self.decoder = windows, decoder

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> torch.Tensor:
        window = self.windows[number]
        if self.decoder == "torchcodec":
            return torch.from_numpy(read_with_torchcodec(window))
        return torch.from_numpy(read(window, EXACT if self.decoder == "pyav, exact colors" else None))


def read(window: Window, interpolation: Any = None) -> np.ndarray:
    """Seek to the keyframe before the window, decode up to its end, resize and crop; PyAV's default colors if None."""
    last = window.start + window.stride * (window.frames - 1)
    fitted = []
    with av.open(window.path) as container:
        stream = container.streams.video[0]
        # One thread a clip: workers are what runs side by side.
        stream.codec_context.thread_count = 1
        ticks = 1 / (stream.average_rate * stream.time_base)
        container.seek(int(window.start * ticks), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts / ticks)
            if number >= window.start and (number - window.start) % window.stride == 0:
                fitted.append(_fit(frame.to_ndarray(format="rgb24", interpolation=interpolation), window))
            if number >= last:
                break
    return np.stack(fitted)


def has_torchcodec() -> bool:
    """Whether torchcodec can be imported."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def read_with_torchcodec(window: Window) -> np.ndarray:
    """As `read`, decoded by torchcodec."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(window.path, dimension_order="NHWC", num_ffmpeg_threads=1)
    stop = window.start + window.stride * (window.frames - 1) + 1
    frames = decoder.get_frames_in_range(window.start, stop, window.stride).data.numpy()
    return np.stack([_fit(frame, window) for frame in frames])


def _fit(frame: np.ndarray, window: Window) -> np.ndarray:
    if frame.shape[:2] != window.scaled:
        frame = cv2.resize(frame, window.scaled[::-1], interpolation=cv2.INTER_AREA)
    (top, left), (height, width) = window.corner, window.size
    return frame[top : top + height, left : left + width]
