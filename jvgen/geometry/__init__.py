"""Camera geometry as pure functions of arrays: poses, camera files, epipolar lines, Plücker rays, homographies, paths.

Functions take numpy or JAX arrays and know nothing of networks or data sets.

The names below are usable as `jvgen.geometry.NAME`; each is imported when it is first used.
"""

from jvgen.lazy_names import lazy_names

_MODULES = {
    "Band": "geometry.epipolar",
    "between": "geometry.cameras",
    "Cameras": "geometry.cameras",
    "CameraTrack": "geometry.camera_file",
    "centers": "geometry.cameras",
    "default_intrinsics": "geometry.paths",
    "epipolar_bias": "geometry.epipolar",
    "epipolar_lines": "geometry.epipolar",
    "EpipolarBias": "geometry.epipolar",
    "fundamental_matrices": "geometry.epipolar",
    "homographies": "geometry.homography",
    "infinite_homographies": "geometry.epipolar",
    "inverse": "geometry.cameras",
    "look_at": "geometry.paths",
    "Motion": "geometry.homography",
    "named_paths": "geometry.paths",
    "PATHS": "geometry.paths",
    "project": "geometry.cameras",
    "rays": "geometry.plucker",
    "read_cameras": "geometry.camera_file",
    "relative": "geometry.cameras",
    "resized_and_cropped": "geometry.cameras",
    "token_points": "geometry.epipolar",
    "write_cameras": "geometry.camera_file",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
