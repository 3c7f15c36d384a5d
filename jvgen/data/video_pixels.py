"""Frames of a decoder as RGB pixels as displayed: exact colors, the display matrix, pixels that are not square."""

from fractions import Fraction

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

# FFmpeg's default conversions truncate: pictures get darker by 1 to 2 levels.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_RED_BLUE = {Colorspace.ITU709.value: (0.2126, 0.0722)}
_BT601 = (0.299, 0.114)
_BT601_SPACES = {2, 5, 6}  # AVColorSpace: unspecified (which FFmpeg takes for it), BT470BG, SMPTE170M
# Scalers write such ratios when they round a size.
_NEARLY_SQUARE = 0.01
_MOST_ELONGATED = 8


class PixelConverter:
    """Converts the frames of one clip; setup is done once.

    Args:
      aspect: width of a pixel over its height, as the container says; None or 0 for square ones.

    Raises:
      DecodeError: an absurd aspect.
    """

    def __init__(self, aspect: Fraction | None = None):
        self.aspect = float(aspect or 1)
        if not 1 / _MOST_ELONGATED <= self.aspect <= _MOST_ELONGATED:
            raise DecodeError(f"its pixels are {aspect} times as wide as high: the file is damaged")
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3), RGB, upright and with square pixels: the width is scaled, the height kept."""
        pixels = self._rgb(frame)
        if abs(self.aspect - 1) > _NEARLY_SQUARE:
            size = max(1, round(frame.width * self.aspect)), frame.height
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if self.aspect < 1 else cv2.INTER_LINEAR)
        return np.ascontiguousarray(_upright(pixels, frame))

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        space = frame.colorspace
        even = frame.height % 2 == 0 and frame.width % 2 == 0 and frame.width > 2
        if frame.format.name in ("yuv420p", "yuvj420p") and even and (space in _BT601_SPACES or space in _RED_BLUE):
            return _from_420(frame)
        return self._reformatter.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()


def _from_420(frame: av.VideoFrame) -> np.ndarray:
    """RGB of 8-bit 4:2:0: FFmpeg's exact conversion within rounding, in a quarter of its time."""
    height, width = frame.height, frame.width
    planes = frame.to_ndarray()
    luma = planes[:height]
    # Of heights that 4 does not divide, a plane of colors ends within a row of this array.
    chroma = cv2.merge(list(planes[height:].reshape(2, height // 2, width // 2)))
    chroma = cv2.resize(chroma, (width // 2, height), interpolation=cv2.INTER_LINEAR)
    # Samples of color lie on the even columns. Pairs of bytes are interleaved as one number each, which is fast.
    # Halves are rounded down here, since rows between two rows were rounded up.
    between = cv2.addWeighted(chroma[:, :-1], 0.5, chroma[:, 1:], 0.5, -0.25)
    between = np.concatenate([between, chroma[:, -1:]], axis=1)
    pairs = [part.view(np.uint16)[..., 0] for part in (chroma, between)]
    chroma = cv2.merge(pairs).view(np.uint8).reshape(height, width, 2)
    full = frame.format.name == "yuvj420p" or frame.color_range == ColorRange.JPEG.value
    return cv2.transform(cv2.merge([luma, chroma]), _matrix(frame.colorspace, full))


def _matrix(space: int, full: bool) -> np.ndarray:
    """float32 (3, 4): RGB of (Y, Cb, Cr, 1), ITU-R BT.601 and BT.709."""
    red, blue = _RED_BLUE.get(space, _BT601)
    green = 1 - red - blue
    light, color, offset = (1.0, 1.0, 0) if full else (255 / 219, 255 / 224, 16)
    rows = np.array(
        [
            [light, 0, 2 * (1 - red) * color],
            [light, -2 * (1 - blue) * blue / green * color, -2 * (1 - red) * red / green * color],
            [light, 2 * (1 - blue) * color, 0],
        ]
    )
    return np.concatenate([rows, -rows @ [[offset], [128], [128]]], axis=1).astype(np.float32)


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turned and mirrored as the display matrix says, whose nearest quarter turn is taken."""
    try:
        found = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # side data of a kind that PyAV does not know: the turn is what can be had
        return np.rot90(pixels, round(frame.rotation / 90) % 4)
    if found is None:
        return pixels
    # Columns are multiplied from the left: (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(found), np.int32)[:5].astype(np.int64)
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return pixels[::-1] if d < 0 else pixels
