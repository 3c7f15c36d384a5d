"""Measures of generated clips: over time, against recorded clips and captions, and of views against their cameras."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from jvgen.evaluation import i3d, vbench
from jvgen.evaluation.camera_pose import (
    THRESHOLDS,
    Matcher,
    PairError,
    PoseScore,
    pose_errors_across_views,
    pose_errors_within_video,
    views_mse,
)
from jvgen.evaluation.clip import Clip
from jvgen.evaluation.distribution import VideoDistance
from jvgen.evaluation.reconstruction import WINDOW
from jvgen.evaluation.temporal import adjacent_similarity, smoothness
from jvgen.geometry.cameras import Cameras

GENERATED, RECORDED = "generated", "recorded"
# What is not measured by name, and why or how it would be.
NotMeasured = dict[str, str]


def measure_clips(
    generated: UInt8[np.ndarray, "N F H W 3"],
    recorded: UInt8[np.ndarray, "N F H W 3"],
    captions: Sequence[str],
    *,
    features: Callable[[jax.Array], jax.Array] | None = None,
    clip: Clip | None = None,
    subjects: Callable[[np.ndarray], np.ndarray] | None = None,
    frames_per_second: float = vbench.RATE,
) -> tuple[dict[str, float], NotMeasured]:
    """Measures of clips that were generated for the captions of recorded ones, and the same measures of the recorded.

    After "generated/" or "recorded/": "temporal_flickering" (1 without any) and "adjacent_ssim" of neighboring frames
    (see `jvgen.evaluation.temporal`); "dynamic_degree", the share of clips that move, "motion_smoothness" and measures
    of frames (see `jvgen.evaluation.vbench`); with CLIP "clip_text" and "clip_frames" (see `Clip.scores`) and
    "background_consistency"; with features of subjects "subject_consistency". "fvd" is between both sides.

    Args:
      generated, recorded: equally many.
      captions: one per clip.
      features: of an I3D, see `jvgen.evaluation.i3d.features`.
      clip: CLIP.
      subjects: frames, uint8 `N H W 3`, to features `N D`; of DINOv2, see `jvgen.runs.frame_features`.
      frames_per_second: of the clips, for their "dynamic_degree".

    Returns:
      The measures by name, and what could not be measured.
    """
    frames, height, width = generated.shape[1:4]
    found: dict[str, float] = {}
    missing: NotMeasured = {}
    for side, clips in ((GENERATED, generated), (RECORDED, recorded)):
        measured = vbench.frame_measures(rearrange(clips, "n f h w c -> (n f) h w c"))
        if frames > 1:
            measured["temporal_flickering"] = _mean(smoothness, clips)
        if frames > 1 and min(height, width) >= WINDOW:
            measured["adjacent_ssim"] = _mean(adjacent_similarity, clips)
        if frames > vbench.moving_stride(frames_per_second) and min(height, width) >= vbench.MIN_SIDE:
            measured["dynamic_degree"] = float(np.mean([vbench.is_dynamic(one, frames_per_second) for one in clips]))
        if frames > 2 and min(height, width) >= vbench.MIN_SIDE:
            measured["motion_smoothness"] = float(np.mean([vbench.motion_smoothness(one) for one in clips]))
        if clip is not None:
            measured |= clip.scores(clips, captions)
        if clip is not None and frames > 1:
            measured["background_consistency"] = vbench.consistency(_by_frame(clip.frames, clips))
        if subjects is not None and frames > 1:
            measured["subject_consistency"] = vbench.consistency(_by_frame(subjects, clips))
        found |= {f"{side}/{name}": value for name, value in measured.items()}
    if frames == 1:
        missing["measures over time"] = "the run's clips have one frame"
    elif min(height, width) < vbench.MIN_SIDE:
        missing["adjacent_ssim, dynamic_degree, motion_smoothness"] = (
            f"frames of {height}x{width} are smaller than {vbench.MIN_SIDE}x{vbench.MIN_SIDE}"
        )
    else:
        if frames == 2:
            missing["motion_smoothness"] = "clips have 2 frames, and none between two others"
        if frames <= vbench.moving_stride(frames_per_second):
            missing["dynamic_degree"] = f"clips of {frames} frames at {frames_per_second:g} frames/s are too short"
    if clip is None:
        missing["clip_text, clip_frames, background_consistency"] = "give --clip-model DIR"
    if subjects is None:
        missing["subject_consistency"] = "give --dinov2 DIR"
    if features is None:
        missing["fvd"] = "give --i3d FILE"
    elif frames < i3d.MIN_FRAMES:
        missing["fvd"] = f"clips have {frames} frames, I3D takes {i3d.MIN_FRAMES} or more"
    elif len(generated) < 2:
        missing["fvd"] = "a covariance needs two clips or more: raise --samples"
    else:
        distance = VideoDistance(features)
        distance.add(*(clips.astype(np.float32) / 255.0 for clips in (recorded, generated)))
        found |= distance.result()
    return found, missing


def measure_views(
    views: UInt8[np.ndarray, "N V F H W 3"], cameras: Cameras, side: str, matcher: Matcher
) -> dict[str, float]:
    """How well views agree with their cameras (CVD, section 5.2), as "SIDE/views/..." and "SIDE/frames/...".

    "views" are corresponding frames of two views, over all pairs; "frames" are the first and each later frame of a
    view. Each has areas under the curve of rotation and translation errors up to 5, 10 and 20 degrees, the share of
    matches on their epipolar lines ("precision"), correct matches over keypoints ("matching_score") and "matches" per
    pair of frames.

    Args:
      views: sets of views.
      cameras: `N V F 4` and `N V F 3 4`, world to camera.
      matcher: of points, such as `jvgen.evaluation.camera_pose.sift()`.
    """
    across: list[PairError] = []
    within: list[PairError] = []
    for videos, *parts in zip(views, *(np.asarray(part, np.float64) for part in cameras), strict=True):
        each = [Cameras(*(part[view] for part in parts)) for view in range(len(videos))]
        for one, other in itertools.combinations(range(len(videos)), 2):
            across += pose_errors_across_views(videos[one], videos[other], each[one], each[other], matcher)
        for video, own in zip(videos, each, strict=True):
            within += pose_errors_within_video(video, own, matcher)
    found: dict[str, float] = {}
    for name, errors in (("views", across), ("frames", within)):
        if errors:
            values = _pose_values(errors)
            found |= {f"{side}/{name}/{what}": value for what, value in values.items() if math.isfinite(value)}
    return found


def measure_same_trajectory(
    first: UInt8[np.ndarray, "N F H W 3"], second: UInt8[np.ndarray, "N F H W 3"]
) -> dict[str, float]:
    """Mean squared error on [0, 1], and its PSNR in dB, of views with one trajectory, which should be equal (CVD)."""
    error = float(np.mean([views_mse(one, other) for one, other in zip(first, second, strict=True)]))
    return {"same_trajectory/mse": error, "same_trajectory/psnr": -10.0 * math.log10(max(error, 1e-10))}


def _by_frame(features: Callable[[np.ndarray], np.ndarray], clips: np.ndarray) -> np.ndarray:
    """Features `N F D` of the frames of clips."""
    count = clips.shape[1]
    return rearrange(features(rearrange(clips, "n f h w c -> (n f) h w c")), "(n f) d -> n f d", f=count)


def _pose_values(errors: Sequence[PairError]) -> dict[str, float]:
    score = PoseScore.of(errors)
    found = {"precision": score.precision, "matching_score": score.matching_score, "pairs": float(score.pairs)}
    found["matches"] = float(np.mean([error.matches for error in errors]))
    for threshold, rotation, translation in zip(THRESHOLDS, score.rotation_auc, score.translation_auc, strict=True):
        found |= {f"rotation_auc_{threshold:g}": rotation, f"translation_auc_{threshold:g}": translation}
    return found


def _mean(measure: Callable[..., jax.Array], clips: np.ndarray) -> float:
    compiled = jax.jit(lambda clip: measure(clip.astype(jnp.float32) / 255.0, data_range=1.0))
    return float(np.mean([float(compiled(clip)) for clip in clips]))
