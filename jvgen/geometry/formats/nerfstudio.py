"""nerfstudio's `transforms.json`, in which DL3DV comes: camera-to-world matrices with OpenGL axes, one per frame.

A frame may have intrinsics of its own, besides those of the file. Pixels are counted from the outer edge of the image,
as in jvgen (https://docs.nerf.studio/quickstart/data_conventions.html).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvgen.geometry.formats.posed_images import DISTORTION, PosedImages, from_opengl
from jvgen.storage import Path, as_path, read_json_object

MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
"""Camera models that are read; all are OpenCV's, with fewer coefficients or more."""


def read_nerfstudio(path: str | Path) -> PosedImages:
    """The cameras of a `transforms.json`, in the order of the images' names.

    Raises:
      ValueError: not JSON, a missing field, an unknown camera model, a matrix that is not a rotation and a translation,
        intrinsics that fit no image of the size that it says. Names the file, the frame and the field.
    """
    path = as_path(path)
    document = read_json_object(path)
    frames = document.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: frames is {_shown(frames)}; expected a list with an object per image.")
    names, intrinsics, matrices, distortion, sizes = [], [], [], [], []
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise ValueError(f"{path}: frames[{number}] has no file_path.")
        place = f"{path}: {frame['file_path']}"
        fields = {**document, **frame}
        width, height = (_number(place, fields, key) for key in ("w", "h"))
        names.append(frame["file_path"].removeprefix("./"))
        intrinsics.append(_intrinsics(place, fields, width, height))
        distortion.append([_number(place, fields, key, 0.0) for key in DISTORTION])
        matrices.append(_matrix(place, frame))
        sizes.append((round(height), round(width)))
        model = fields.get("camera_model", "PINHOLE")
        if model not in MODELS:
            raise ValueError(
                f"{place}: camera_model = {model!r}; {', '.join(MODELS)} are read. Undistort the images first, for "
                "example with COLMAP's image_undistorter."
            )
    found = PosedImages(
        tuple(names), np.array(intrinsics), from_opengl(np.array(matrices)), np.array(distortion), np.array(sizes)
    )
    found.check(
        str(path), "transform_matrix is camera to world with OpenGL axes.", "fl_x and fl_y are in pixels",
        "fl_x, fl_y, cx and cy are in pixels of an image of w x h: one of these is wrong.",
    )  # fmt: skip
    return found.sorted()


def _intrinsics(place: str, fields: Mapping[str, Any], width: float, height: float) -> list[float]:
    if min(width, height) < 1:
        raise ValueError(f"{place}: w = {width:g}, h = {height:g}; the size of the images in pixels.")
    if "fl_x" not in fields and "camera_angle_x" in fields:
        angle = _number(place, fields, "camera_angle_x")
        focal_x = 0.5 * width / math.tan(0.5 * angle) if 0 < angle < math.pi else 0.0
    else:
        focal_x = _number(place, fields, "fl_x")
    focal_y = _number(place, fields, "fl_y", focal_x)
    center_x, center_y = _number(place, fields, "cx", width / 2), _number(place, fields, "cy", height / 2)
    return [focal_x / width, focal_y / height, center_x / width, center_y / height]


def _matrix(place: str, frame: Mapping[str, Any]) -> np.ndarray:
    try:
        matrix = np.array(frame.get("transform_matrix"), np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: transform_matrix is not a matrix of numbers ({error}).") from None
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{place}: transform_matrix has the shape {matrix.shape}; expected 4 rows of 4 numbers.")
    if len(matrix) == 4 and not np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-6):
        raise ValueError(f"{place}: the last row of transform_matrix is {matrix[3].tolist()}, not 0, 0, 0, 1.")
    return matrix[:3]


def _number(place: str, fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place}: {key} is {_shown(value)}; expected a number.")
    return float(value)


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]
