"""Metrics of images, clips, cameras and distributions of clips, and what presents them: plots, contact sheets, reports.

Pure functions of arrays. What runs a model to obtain the arrays is in `jvgen.tasks`, `jvgen.runs` and
`jvgen.autoencoding`.

The names below are usable as `jvgen.evaluation.NAME`; each is imported when it is first used.
"""

from jvgen.lazy_names import lazy_names

_MODULES = {
    "attention_between": "evaluation.layer_metrics",
    "classify_clip": "evaluation.motion",
    "contact_sheet": "evaluation.contact_sheets",
    "epipolar_sheet": "evaluation.epipolar_sheets",
    "frame_similarity": "evaluation.layer_metrics",
    "frechet_distance": "evaluation.distribution",
    "gif_bytes": "evaluation.contact_sheets",
    "heat_maps": "evaluation.plots",
    "line_plot": "evaluation.plots",
    "motion_error": "evaluation.temporal",
    "motion_score": "evaluation.motion",
    "peak_signal_to_noise": "evaluation.reconstruction",
    "png_bytes": "evaluation.contact_sheets",
    "png_of": "evaluation.plots",
    "pose_auc": "evaluation.camera_pose",
    "pose_errors_across_views": "evaluation.camera_pose",
    "pose_errors_within_video": "evaluation.camera_pose",
    "PoseScore": "evaluation.camera_pose",
    "save_plot": "evaluation.plots",
    "Series": "evaluation.plots",
    "sift": "evaluation.camera_pose",
    "smoothness": "evaluation.temporal",
    "structural_similarity": "evaluation.reconstruction",
    "VideoDistance": "evaluation.distribution",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
