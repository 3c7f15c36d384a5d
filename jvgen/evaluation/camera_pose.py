"""Camera pose metrics: how well frames agree with the cameras they were generated for.

Points are matched between two frames, an essential matrix is fitted to the matches by RANSAC, and the rotation and the
direction of translation in it are compared with the true ones. Rules and thresholds are those of SuperGlue's
evaluation (Sarlin et al. 2020), with rotation and translation reported separately, as in CVD (Kuang et al. 2024,
arXiv 2405.17414, section 5.2).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from jvgen.geometry import rotations
from jvgen.geometry.cameras import Cameras, between, calibration, share_a_center

THRESHOLDS = (5.0, 10.0, 20.0)  # degrees
MAX_CORRECT_ERROR = 5e-4  # squared epipolar distance in normalized coordinates below which a match is correct
MIN_MATCHES = 5
RANSAC_PIXELS = 1.0
RANSAC_CONFIDENCE = 0.99999


class Matches(NamedTuple):
    """Matched points of two images.

    Attributes:
      first, second: float (n, 2), x and y in pixels, the center of the first pixel at 0.5.
      keypoints: number of keypoints detected in the first image.
    """

    first: np.ndarray
    second: np.ndarray
    keypoints: int


# Two uint8 images `H W 3` to their matches: SIFT below, or any learned matcher.
Matcher = Callable[[np.ndarray, np.ndarray], Matches]


class PairError(NamedTuple):
    """Errors of one pair of frames.

    Attributes:
      rotation: angle between estimated and true rotation in degrees; infinite if the estimation failed.
      translation: angle between the directions, at most 90; NaN for cameras with a common center.
      precision: share of matches that agree with the true cameras; 0 without matches.
      matching_score: correct matches over keypoints of the first frame.
      matches: number of matches.
    """

    rotation: float
    translation: float
    precision: float
    matching_score: float
    matches: int


@dataclasses.dataclass(frozen=True)
class PoseScore:
    """Means over pairs of frames.

    Attributes:
      rotation_auc, translation_auc: area under the curve of recall against error up to 5, 10 and 20 degrees.
      precision, matching_score: see `PairError`.
      pairs: number of pairs.
    """

    rotation_auc: tuple[float, float, float]
    translation_auc: tuple[float, float, float]
    precision: float
    matching_score: float
    pairs: int

    @classmethod
    def of(cls, errors: Sequence[PairError]) -> "PoseScore":
        """The means over pairs.

        Raises:
          ValueError: no pairs.
        """
        if not errors:
            raise ValueError("no pairs of frames: clips need at least two frames.")
        columns = PairError(*(np.array(column, np.float64) for column in zip(*errors, strict=True)))
        moved = columns.translation[~np.isnan(columns.translation)]
        return cls(
            rotation_auc=pose_auc(columns.rotation),
            translation_auc=pose_auc(moved) if moved.size else (float("nan"),) * len(THRESHOLDS),
            precision=float(columns.precision.mean()),
            matching_score=float(columns.matching_score.mean()),
            pairs=len(errors),
        )

    def __str__(self) -> str:
        def percent(values: Sequence[float]) -> str:
            return " / ".join(f"{100 * value:.1f}" for value in values)

        return (
            f"rotation AUC@5/10/20 {percent(self.rotation_auc)}, translation AUC {percent(self.translation_auc)}, "
            f"precision {100 * self.precision:.1f}, matching score {100 * self.matching_score:.1f}, {self.pairs} pairs"
        )


def pose_auc(errors: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> tuple[float, ...]:
    """Area under recall against error up to each threshold, divided by it; trapezoid rule from (0, 0)."""
    errors = np.sort(np.asarray(errors, np.float64))
    recall = np.concatenate([[0.0], np.arange(1, len(errors) + 1) / len(errors)])
    errors = np.concatenate([[0.0], errors])
    areas = []
    for threshold in thresholds:
        last = int(np.searchsorted(errors, threshold))
        x = np.append(errors[:last], threshold)
        y = np.append(recall[:last], recall[last - 1])
        areas.append(float(np.trapezoid(y, x) / threshold))
    return tuple(areas)


def sift(*, keypoints: int = 2048, ratio: float = 0.8) -> Matcher:
    """SIFT matches: mutual nearest neighbors that pass the ratio test (Lowe 2004)."""

    def match(first: np.ndarray, second: np.ndarray) -> Matches:
        detector = cv2.SIFT_create(nfeatures=keypoints, contrastThreshold=0.01)
        (points, described), (others, described_others) = (
            detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None) for image in (first, second)
        )
        empty = np.zeros((0, 2))
        if described is None or described_others is None or len(described_others) < 2:
            return Matches(empty, empty, len(points))
        matcher = cv2.BFMatcher(cv2.NORM_L2)
        back = {m.queryIdx: m.trainIdx for m in matcher.match(described_others, described)}
        pairs = [
            near
            for near, next_near in (p for p in matcher.knnMatch(described, described_others, k=2) if len(p) == 2)
            if near.distance < ratio * next_near.distance and back.get(near.trainIdx) == near.queryIdx
        ]
        if not pairs:
            return Matches(empty, empty, len(points))
        # OpenCV has the center of the first pixel at 0.
        here = np.array([points[m.queryIdx].pt for m in pairs]) + 0.5
        there = np.array([others[m.trainIdx].pt for m in pairs]) + 0.5
        return Matches(here, there, len(points))

    return match


def pair_error(matches: Matches, first: Cameras, second: Cameras, size: tuple[int, int]) -> PairError:
    """Errors of the cameras estimated from the matches between two frames.

    Args:
      matches: between the frames.
      first, second: the true cameras, intrinsics (4,) and extrinsics (3, 4).
      size: height and width of the frames.
    """
    motion = between(*(np.asarray(camera.extrinsics, np.float64) for camera in (first, second)))
    matrices = [calibration(np.asarray(camera.intrinsics, np.float64), size) for camera in (first, second)]
    points = [
        (image - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
        for image, matrix in zip((matches.first, matches.second), matrices, strict=True)
    ]
    precision, score = 0.0, 0.0
    apart = not share_a_center(*(np.asarray(camera.extrinsics, np.float64) for camera in (first, second)))
    if len(points[0]):
        correct = (
            epipolar_errors(*points, motion) < MAX_CORRECT_ERROR
            if apart
            else _same_ray(*points, motion) < MAX_CORRECT_ERROR
        )
        precision, score = float(correct.mean()), float(correct.sum() / max(matches.keypoints, 1))
    focal = float(np.mean([matrix[[0, 1], [0, 1]] for matrix in matrices]))
    found = relative_pose(*points, focal=focal) if apart else relative_rotation(*points, focal=focal)
    if found is None:
        return PairError(np.inf, np.inf if apart else np.nan, precision, score, len(points[0]))
    rotation = np.degrees(np.arccos(np.clip((np.trace(found[:, :3].T @ motion[:, :3]) - 1) / 2, -1, 1)))
    translation = np.nan
    if apart:
        cosine = found[:, 3] @ motion[:, 3] / (np.linalg.norm(found[:, 3]) * np.linalg.norm(motion[:, 3]))
        # An essential matrix does not determine the sign.
        translation = np.degrees(np.arccos(np.clip(abs(cosine), 0, 1)))
    return PairError(float(rotation), float(translation), precision, score, len(points[0]))


def relative_pose(first: np.ndarray, second: np.ndarray, *, focal: float) -> np.ndarray | None:
    """The motion (3, 4) with unit translation from matched normalized points (n, 2) by RANSAC; None if it fails."""
    if len(first) < MIN_MATCHES:
        return None
    cv2.setRNGSeed(0)
    essential, mask = cv2.findEssentialMat(
        first, second, np.eye(3), threshold=RANSAC_PIXELS / focal, prob=RANSAC_CONFIDENCE, method=cv2.RANSAC
    )
    if essential is None:
        return None
    best, found = 0, None
    # OpenCV stacks several matrices that fit equally well.
    for candidate in np.split(essential, len(essential) // 3):
        agreeing, rotation, translation, _ = cv2.recoverPose(candidate, first, second, np.eye(3), 1e9, mask=mask.copy())
        if agreeing > best:
            best, found = agreeing, np.concatenate([rotation, translation], axis=1)
    return found


def relative_rotation(first: np.ndarray, second: np.ndarray, *, focal: float) -> np.ndarray | None:
    """The rotation (3, 3) between cameras with a common center, which have no essential matrix; None if it fails."""
    if len(first) < MIN_MATCHES:
        return None
    cv2.setRNGSeed(0)
    matrix, _ = cv2.findHomography(first, second, cv2.RANSAC, RANSAC_PIXELS / focal, confidence=RANSAC_CONFIDENCE)
    return None if matrix is None else rotations.nearest(matrix * np.sign(np.linalg.det(matrix)))


def epipolar_errors(first: np.ndarray, second: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Squared distances of normalized points (n, 2) from their epipolar lines, summed over both images."""
    one, other = (np.concatenate([points, np.ones((len(points), 1))], axis=1) for points in (first, second))
    x, y, z = motion[:, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ motion[:, :3]
    forward, backward = one @ essential.T, other @ essential
    product = np.sum(other * forward, axis=1) ** 2
    return product * (1 / np.sum(forward[:, :2] ** 2, axis=1) + 1 / np.sum(backward[:, :2] ** 2, axis=1))


def _same_ray(first: np.ndarray, second: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Squared distances of points seen by cameras with a common center, after undoing the rotation between them."""
    rotated = np.concatenate([first, np.ones((len(first), 1))], axis=1) @ motion[:, :3].T
    return 2 * np.sum((rotated[:, :2] / rotated[:, 2:] - second) ** 2, axis=1)


def pose_errors_across_views(
    first: np.ndarray, second: np.ndarray, one: Cameras, other: Cameras, matcher: Matcher
) -> list[PairError]:
    """Errors of corresponding frames of two videos, uint8 `F H W 3` with cameras `F 4` and `F 3 4`."""
    return [
        pair_error(
            matcher(a, b), Cameras(*(part[f] for part in one)), Cameras(*(part[f] for part in other)), a.shape[:2]
        )
        for f, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def pose_errors_within_video(video: np.ndarray, cameras: Cameras, matcher: Matcher) -> list[PairError]:
    """Errors between the first frame of a video, uint8 `F H W 3`, and each later one."""
    start = Cameras(*(part[0] for part in cameras))
    return [
        pair_error(matcher(video[0], video[f]), start, Cameras(*(part[f] for part in cameras)), video.shape[1:3])
        for f in range(1, len(video))
    ]


def views_mse(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared difference of two uint8 videos on a scale of 0 to 1, for views with identical trajectories."""
    return float(np.mean(np.square((first.astype(np.float64) - second) / 255.0)))
