"""Metrics of images, clips, cameras and distributions of clips, and what presents them: plots, contact sheets, reports.

Pure functions of arrays. What runs a model to obtain the arrays is in `jvgen.tasks`, `jvgen.runs` and
`jvgen.autoencoding`.

The names below are usable as `jvgen.evaluation.NAME`; each is imported when it is first used.
"""

import importlib
from typing import Any

_MODULES = {
    "attention_between": "layer_metrics",
    "classify_clip": "motion",
    "contact_sheet": "contact_sheets",
    "epipolar_sheet": "epipolar_sheets",
    "frame_similarity": "layer_metrics",
    "frechet_distance": "distribution",
    "gif_bytes": "contact_sheets",
    "heat_maps": "plots",
    "line_plot": "plots",
    "motion_error": "temporal",
    "motion_score": "motion",
    "peak_signal_to_noise": "reconstruction",
    "png_bytes": "contact_sheets",
    "png_of": "plots",
    "pose_auc": "camera_pose",
    "pose_errors_across_views": "camera_pose",
    "pose_errors_within_video": "camera_pose",
    "PoseScore": "camera_pose",
    "save_plot": "plots",
    "Series": "plots",
    "sift": "camera_pose",
    "smoothness": "temporal",
    "structural_similarity": "reconstruction",
    "VideoDistance": "distribution",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jvgen.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jvgen.evaluation.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
