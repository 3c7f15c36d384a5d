"""Still images as uint8 RGB pixels: 16-bit ones scaled, transparent ones on white, turned as displayed."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError)
_ORIENTATION = 0x0112  # tag of EXIF
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """An encoded clip or image whose requested frames cannot be decoded; the message gives the reason."""


def is_image(clip: bytes) -> bool:
    """Whether these bytes are a still image."""
    return clip.startswith(_MAGIC) or (clip[:4] == b"RIFF" and clip[8:12] == b"WEBP")


def decode_image(clip: bytes) -> np.ndarray:
    """uint8 (H, W, 3), RGB, as displayed: turned as its EXIF says, transparent pixels on white.

    Raises:
      DecodeError: it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(clip)) as image:
            turn = _TRANSPOSES.get(_orientation(image))
            upright = image.transpose(turn) if turn is not None else image
            if upright.mode == "I" or upright.mode.startswith("I;16"):
                return as_rgb(np.asarray(upright).astype(np.uint16))
            transparent = "A" in upright.mode or "a" in upright.mode or "transparency" in image.info
            return as_rgb(np.array(upright.convert("RGBA" if transparent else "RGB")))
    except _ERRORS as error:
        raise DecodeError(f"not a readable image ({error})") from error


def exif_orientation(clip: bytes) -> int:
    """How EXIF says that an image is turned for display: 1 as it is stored, 3 upside down, 5 to 8 on its side."""
    with Image.open(io.BytesIO(clip)) as image:
        turn = _orientation(image)
    return turn if turn in _TRANSPOSES else 1


def image_codec(clip: bytes) -> str:
    """Name of the format of an image: "png", "jpeg", ..."""
    with Image.open(io.BytesIO(clip)) as image:
        return str(image.format).lower()


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of an image with other channels or 16 bits.

    Args:
      pixels: uint8 or uint16 (H, W) or (H, W, 1 to 4): gray or RGB, with the opacity as last channel of 2 or 4. What
        is transparent becomes white: the colors below it are arbitrary.

    Raises:
      DecodeError: another shape or dtype.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or not 1 <= pixels.shape[-1] <= 4:
        raise DecodeError(f"its pixels are {pixels.dtype} {pixels.shape}: expected uint8 or uint16 (H, W, 1 to 4)")
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.shape[-1] in (2, 4):
        opacity = pixels[..., -1:].astype(np.uint32)
        pixels = ((pixels[..., :-1] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels)


def encode_image(image: np.ndarray, *, format: str = "png") -> bytes:
    """Encode one image, uint8 (H, W, 3) RGB, as "png" (exact) or "jpeg"."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=format)
    return buffer.getvalue()


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF, 1 where there is none that can be read: one broken tag says nothing about the pixels."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
