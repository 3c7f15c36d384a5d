"""CO3Dv2's `frame_annotations.jgz`: PyTorch3D cameras of all frames of a category.

R multiplies rows from the right, axes are x left, y up, z forward, and intrinsics are in PyTorch3D's normalized device
coordinates, -1 to 1 over the shorter side ("ndc_isotropic") or over each side ("ndc_norm_image_bounds").
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvgen.geometry.formats.posed_images import DISTORTION, PosedImages, from_pytorch3d
from jvgen.storage import Path, as_path, read_bytes, reading

FORMATS = ("ndc_isotropic", "ndc_norm_image_bounds")


def read_co3d(path: str | Path) -> dict[str, PosedImages | ValueError]:
    """The cameras of every sequence of a category, by the sequence's name, in the order of the frames' numbers.

    A sequence whose annotations are wrong has the error instead.

    Raises:
      UnreadableFile: not a compressed list of annotations.
    """
    path = as_path(path)
    with reading(path, "is not a file of frame annotations (gzip, JSON)"):
        annotations = json.loads(gzip.decompress(read_bytes(path)))
        if not isinstance(annotations, list):
            raise ValueError(f"it has a {type(annotations).__name__}, not a list of frames")
        sequences: dict[str, list[dict]] = {}
        for annotation in annotations:
            sequences.setdefault(str(annotation["sequence_name"]), []).append(annotation)
    found: dict[str, PosedImages | ValueError] = {}
    for name, frames in sequences.items():
        try:
            found[name] = _sequence(f"{path}: {name}", frames)
        except ValueError as error:
            found[name] = error
    return found


def _sequence(place: str, frames: Sequence[Mapping[str, Any]]) -> PosedImages:
    try:
        frames = sorted(frames, key=lambda frame: frame["frame_number"])
        names = tuple(str(frame["image"]["path"]) for frame in frames)
        sizes = np.array([frame["image"]["size"] for frame in frames], np.int64)
        views = [frame["viewpoint"] for frame in frames]
        rotation, translation = (np.array([view[key] for view in views], np.float64) for key in ("R", "T"))
        focal = np.array([view["focal_length"] for view in views], np.float64)
        principal = np.array([view["principal_point"] for view in views], np.float64)
        formats = [str(view.get("intrinsics_format", FORMATS[1])).lower() for view in views]
        seconds = np.array([frame.get("frame_timestamp", np.nan) for frame in frames], np.float64)
    except KeyError as error:
        raise ValueError(f"{place}: a frame has no field {error}.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: a field of a frame is not what it should be ({error}).") from None
    shapes = {"R": (rotation, (3, 3)), "T": (translation, (3,)), "focal_length": (focal, (2,)),
              "principal_point": (principal, (2,)), "size": (sizes, (2,))}  # fmt: skip
    for field, (array, shape) in shapes.items():
        if array.shape != (len(frames), *shape):
            raise ValueError(f"{place}: {field} has the shape {array.shape[1:]}, not {shape}.")
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise ValueError(f"{place}: intrinsics_format = {unknown[0]!r}; {' and '.join(FORMATS)} are read.")
    if sizes.min() < 1:
        raise ValueError(f"{place}: size = {sizes.min(axis=0).tolist()}; height and width of the image in pixels.")
    half = sizes[:, ::-1] / 2  # width, height
    isotropic = np.array([form == FORMATS[0] for form in formats])
    scale = np.where(isotropic[:, None], half.min(axis=1, keepdims=True), half)
    # x and y point left and up.
    intrinsics = np.concatenate([focal * scale, half - principal * scale], axis=1) / np.tile(2 * half, 2)
    # The published files have -1 for times that are not known.
    known = np.isfinite(seconds).all() and seconds.min() >= 0
    found = PosedImages(
        names, intrinsics, from_pytorch3d(rotation, translation), np.zeros((len(frames), len(DISTORTION))), sizes,
        seconds if known else np.zeros(0),
    )  # fmt: skip
    found.check(
        place, "viewpoint.R and viewpoint.T are PyTorch3D's.", "viewpoint.focal_length is wrong",
        "viewpoint.focal_length and principal_point do not fit intrinsics_format.",
    )  # fmt: skip
    return found
