"""COLMAP's sparse models, binary and text, in which MVImgNet comes: `cameras` and `images`, world-to-camera with OpenCV
axes as quaternions (w first) and translations. Pixels are counted from the outer edge of the image, as in jvgen
(https://colmap.github.io/format.html)."""

import struct
from typing import NamedTuple

import numpy as np

from jvgen.geometry.formats.posed_images import DISTORTION, PosedImages, checked_quaternions
from jvgen.storage import Path, as_path, read_bytes, read_utf8

SUFFIXES = (".bin", ".txt")
# Camera models by their number: name, and the parameters in order. Those of fisheye lenses are not read.
MODELS: dict[int, tuple[str, tuple[str, ...]]] = {
    0: ("SIMPLE_PINHOLE", ("f", "cx", "cy")),
    1: ("PINHOLE", ("fx", "fy", "cx", "cy")),
    2: ("SIMPLE_RADIAL", ("f", "cx", "cy", "k1")),
    3: ("RADIAL", ("f", "cx", "cy", "k1", "k2")),
    4: ("OPENCV", ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2")),
    6: ("FULL_OPENCV", ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
}
_OTHERS = {
    5: "OPENCV_FISHEYE", 7: "FOV", 8: "SIMPLE_RADIAL_FISHEYE", 9: "RADIAL_FISHEYE", 10: "THIN_PRISM_FISHEYE",
    11: "RAD_TAN_THIN_PRISM_FISHEYE",
}  # fmt: skip
_BY_NAME = {name: parameters for name, parameters in MODELS.values()}


class _Camera(NamedTuple):
    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


class _Image(NamedTuple):
    name: str
    quaternion: tuple[float, ...]
    translation: tuple[float, ...]
    camera: int


def read_colmap(folder: str | Path) -> PosedImages:
    """The cameras of the images of a sparse model, in the order of the images' names.

    Args:
      folder: with cameras.bin and images.bin, or cameras.txt and images.txt.

    Raises:
      ValueError: no such files, truncated ones, a camera model that is not read, a quaternion that is none, an image
        whose camera is missing. Names the file and the image.
    """
    folder = as_path(folder)
    suffix = next((s for s in SUFFIXES if all((folder / f"{n}{s}").is_file() for n in ("cameras", "images"))), None)
    if suffix is None:
        raise ValueError(f"{folder}: has neither cameras.bin and images.bin nor cameras.txt and images.txt (COLMAP).")
    camera_path, image_path = folder / f"cameras{suffix}", folder / f"images{suffix}"
    if suffix == ".bin":
        cameras, images = _binary_cameras(camera_path), _binary_images(image_path)
    else:
        cameras, images = _text_cameras(camera_path), _text_images(image_path)
    names = tuple(image.name for image in images)
    for image in images:
        if image.camera not in cameras:
            raise ValueError(f"{image_path}: {image.name} has camera {image.camera}, which {camera_path.name} lacks.")
    used = [cameras[image.camera] for image in images]
    rotations = checked_quaternions(str(image_path), np.array([i.quaternion for i in images]).reshape(-1, 4), names)
    translations = np.array([image.translation for image in images]).reshape(-1, 3)
    lenses = [_lens(camera_path, camera) for camera in used]
    found = PosedImages(
        names,
        np.array([intrinsics for intrinsics, _ in lenses]).reshape(-1, 4),
        np.concatenate([rotations, translations[..., None]], axis=-1),
        np.array([distortion for _, distortion in lenses]).reshape(-1, len(DISTORTION)),
        np.array([(camera.height, camera.width) for camera in used]).reshape(-1, 2),
    )
    found.check(
        str(image_path), "Images have a quaternion (w first) and a translation, world to camera.",
        f"{camera_path.name} has them in pixels",
        f"{camera_path.name} has parameters in pixels of an image of its width and height: one of these is wrong.",
    )  # fmt: skip
    return found.sorted()


def _lens(path: Path, camera: _Camera) -> tuple[list[float], list[float]]:
    """Normalized intrinsics and distortion."""
    named = dict(zip(_BY_NAME[camera.model], camera.parameters, strict=True))
    if min(camera.width, camera.height) < 1:
        raise ValueError(f"{path}: a camera has the size {camera.width}x{camera.height}.")
    focal_x, focal_y = (named.get(key, named.get("f", 0.0)) for key in ("fx", "fy"))
    intrinsics = [
        focal_x / camera.width,
        focal_y / camera.height,
        named["cx"] / camera.width,
        named["cy"] / camera.height,
    ]
    return intrinsics, [named.get(key, 0.0) for key in DISTORTION]


def _checked_model(path: Path, name: str) -> str:
    if name not in _BY_NAME:
        raise ValueError(
            f"{path}: camera model {name[:40]}; {', '.join(_BY_NAME)} are read. Undistort the images first with "
            "COLMAP's image_undistorter."
        )
    return name


# Binary.


class _Reader:
    """Little-endian values one after the other."""

    def __init__(self, path: Path):
        self.path, self.content, self.place = path, read_bytes(path), 0

    def take(self, format: str) -> tuple:
        try:
            values = struct.unpack_from("<" + format, self.content, self.place)
        except struct.error:
            raise ValueError(
                f"{self.path}: truncated: {len(self.content)} bytes, and more are needed. Get the file again."
            ) from None
        self.place += struct.calcsize("<" + format)
        return values

    def name(self) -> str:
        end = self.content.find(b"\0", self.place)
        if end < 0:
            raise ValueError(f"{self.path}: truncated within the name of an image. Get the file again.")
        name, self.place = self.content[self.place : end], end + 1
        return name.decode("utf-8", "backslashreplace")

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.content):
            raise ValueError(f"{self.path}: truncated: {len(self.content)} bytes, and more are needed.")

    def finish(self) -> None:
        if self.place != len(self.content):
            raise ValueError(f"{self.path}: {len(self.content) - self.place} bytes follow its end: not such a file.")


def _binary_cameras(path: Path) -> dict[int, _Camera]:
    reader, found = _Reader(path), {}
    [count] = reader.take("Q")
    for _ in range(count):
        number, model, width, height = reader.take("iiQQ")
        if model not in MODELS:
            _checked_model(path, _OTHERS.get(model, f"number {model}"))
        name, parameters = MODELS[model]
        found[number] = _Camera(name, width, height, reader.take(f"{len(parameters)}d"))
    reader.finish()
    return found


def _binary_images(path: Path) -> list[_Image]:
    reader, found = _Reader(path), []
    [count] = reader.take("Q")
    for _ in range(count):
        _, *pose, camera = reader.take("i7di")
        name = reader.name()
        [points] = reader.take("Q")
        reader.skip(24 * points)
        found.append(_Image(name, tuple(pose[:4]), tuple(pose[4:]), camera))
    reader.finish()
    return found


# Text.


def _text_cameras(path: Path) -> dict[int, _Camera]:
    found = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        words = line.split()
        model = _checked_model(path, words[1] if len(words) > 1 else "(none)")
        if len(words) != 4 + len(_BY_NAME[model]):
            raise ValueError(
                f"{path}, line {number}: {len(words)} words; a camera of {model} has its number, {model}, width, "
                f"height, {', '.join(_BY_NAME[model])}."
            )
        key, width, height, *parameters = _numbers(path, number, [words[0], *words[2:]])
        found[int(key)] = _Camera(model, int(width), int(height), tuple(parameters))
    return found


def _text_images(path: Path) -> list[_Image]:
    found = []
    # The second line of each image has its points, and may be empty.
    for number, line in _lines(path)[::2]:
        words = line.split(maxsplit=9)
        if not words:
            continue
        if len(words) != 10:
            raise ValueError(
                f"{path}, line {number}: {len(words)} words; an image has its number, a quaternion, a translation, "
                "the number of its camera and its name, and its points in the line below."
            )
        _, *pose, camera = _numbers(path, number, words[:9])
        found.append(_Image(words[9].strip(), tuple(pose[:4]), tuple(pose[4:]), int(camera)))
    return found


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines but for comments."""
    lines = enumerate(read_utf8(path).replace("\r\n", "\n").split("\n"), 1)
    return [(number, line) for number, line in lines if not line.startswith("#")]


def _numbers(path: Path, number: int, words: list[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}.") from None
