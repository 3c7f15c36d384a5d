"""Camera geometry as pure functions of arrays: poses, camera files, epipolar lines, Plücker rays, homographies, paths.

Functions take numpy or JAX arrays and know nothing of networks or data sets.

The names below are usable as `jvgen.geometry.NAME`; each is imported when it is first used.
"""

import importlib
from typing import Any

_MODULES = {
    "Band": "epipolar",
    "between": "cameras",
    "Cameras": "cameras",
    "CameraTrack": "camera_file",
    "centers": "cameras",
    "default_intrinsics": "paths",
    "epipolar_bias": "epipolar",
    "epipolar_lines": "epipolar",
    "EpipolarBias": "epipolar",
    "fundamental_matrices": "epipolar",
    "homographies": "homography",
    "infinite_homographies": "epipolar",
    "inverse": "cameras",
    "look_at": "paths",
    "Motion": "homography",
    "named_paths": "paths",
    "PATHS": "paths",
    "project": "cameras",
    "rays": "plucker",
    "read_cameras": "camera_file",
    "relative": "cameras",
    "resized_and_cropped": "cameras",
    "token_points": "epipolar",
    "write_cameras": "camera_file",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jvgen.geometry' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jvgen.geometry.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
