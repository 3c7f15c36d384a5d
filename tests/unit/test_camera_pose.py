"""Cameras recovered from pictures: exact from exact matches, near from rendered scenes, and from real footage."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from jvgen.data.scenes.scenes import SceneConfig, render_scene
from jvgen.data.video_files import decode_window
from jvgen.evaluation.camera_pose import (
    Matches,
    PairError,
    PoseScore,
    epipolar_errors,
    pair_error,
    pose_auc,
    pose_errors_across_views,
    pose_errors_within_video,
    relative_pose,
    sift,
    views_mse,
)
from jvgen.geometry import rotations
from jvgen.geometry.camera_file import read_cameras
from jvgen.geometry.cameras import Cameras, between, compose, project

SIZE = (120, 160)


def camera(rng: np.random.Generator, spread: float) -> Cameras:
    rotation = rotations.exponential(0.15 * rng.standard_normal(3))
    return Cameras(
        np.array([0.9, 1.2, 0.5, 0.5]), np.concatenate([rotation, spread * rng.standard_normal((3, 1))], axis=1)
    )


def seen(first: Cameras, second: Cameras, count: int = 60, wrong: int = 0) -> Matches:
    """What two cameras see of random points; some matches may be wrong."""
    rng = np.random.default_rng(1)
    points = np.array([0.0, 0.0, 6.0]) + rng.uniform(-2, 2, (count, 3))
    one, other = (project(points, view, SIZE)[:, :2] for view in (first, second))
    other[:wrong] = rng.uniform(0, 1, (wrong, 2)) * [SIZE[1], SIZE[0]]
    return Matches(one, other, 2 * count)


def test_areas_under_the_curve():
    np.testing.assert_allclose(pose_auc(np.array([1.0, 2, 4, 8, 16])), [0.40, 0.58, 0.77])
    np.testing.assert_allclose(pose_auc(np.zeros(4)), [1.0, 1.0, 1.0])
    np.testing.assert_allclose(pose_auc(np.array([np.inf, np.inf])), 0.0)


@pytest.mark.parametrize("wrong", [0, 15])
def test_exact_matches_give_the_exact_camera(wrong):
    rng = np.random.default_rng(0)
    first, second = camera(rng, 0.8), camera(rng, 0.8)
    error = pair_error(seen(first, second, wrong=wrong), first, second, SIZE)
    assert error.rotation < (1.5 if wrong else 0.01) and error.translation < (6.0 if wrong else 0.01)
    assert error.precision == pytest.approx((60 - wrong) / 60, abs=0.05)
    assert error.matching_score == pytest.approx(error.precision / 2)


def test_a_wrong_camera_has_a_large_error():
    rng = np.random.default_rng(0)
    first, second = camera(rng, 0.3), camera(rng, 0.3)
    turn = np.concatenate([rotations.exponential(np.array([0.0, 0.0, np.radians(12.0)])), np.zeros((3, 1))], axis=1)
    claimed = second._replace(extrinsics=compose(turn, second.extrinsics))
    error = pair_error(seen(first, second), first, claimed, SIZE)
    assert error.rotation == pytest.approx(12.0, abs=0.2) and error.precision < 0.5


def test_cameras_with_a_common_center_have_no_translation():
    rng = np.random.default_rng(0)
    first = camera(rng, 0.3)
    turn = np.concatenate([rotations.exponential(np.array([0.02, 0.05, 0.0])), np.zeros((3, 1))], axis=1)
    second = first._replace(extrinsics=compose(turn, first.extrinsics))
    error = pair_error(seen(first, second), first, second, SIZE)
    assert np.isnan(error.translation) and error.precision == 1.0
    score = PoseScore.of([error, error])
    assert all(np.isnan(score.translation_auc)) and score.rotation_auc[2] > 0.5


def test_too_few_matches_are_a_failure():
    rng = np.random.default_rng(0)
    first, second = camera(rng, 0.3), camera(rng, 0.3)
    few = Matches(np.zeros((4, 2)), np.zeros((4, 2)), 10)
    assert pair_error(few, first, second, SIZE).rotation == np.inf
    none = Matches(np.zeros((0, 2)), np.zeros((0, 2)), 0)
    assert pair_error(none, first, second, SIZE) == PairError(np.inf, np.inf, 0.0, 0.0, 0)
    assert sift()(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)).first.shape == (0, 2)
    with pytest.raises(ValueError, match="no pairs of frames"):
        PoseScore.of([])


def test_epipolar_errors_are_symmetric_distances():
    rng = np.random.default_rng(0)
    first, second = camera(rng, 0.3), camera(rng, 0.3)
    motion = between(first.extrinsics, second.extrinsics)
    points = rng.uniform(-0.3, 0.3, (5, 2)), rng.uniform(-0.3, 0.3, (5, 2))
    back = between(second.extrinsics, first.extrinsics)
    np.testing.assert_allclose(epipolar_errors(*points, motion), epipolar_errors(*points[::-1], back), rtol=1e-9)
    assert relative_pose(points[0][:4], points[1][:4], focal=100.0) is None


@pytest.fixture(scope="module")
def rendered():
    """A still scene with a moving camera, several bodies on checkerboards: the renderer knows the cameras."""
    config = SceneConfig(
        height=240, width=320, frames=9, kinds={"static": 1.0}, objects=(4, 4), supersampling=2, background="textured",
        camera_motions=("truck left",),
    )  # fmt: skip
    return render_scene(config, seed=0, index=3)


def test_cameras_of_rendered_scenes_are_recovered(rendered):
    cameras = Cameras(rendered.intrinsics[0].astype(np.float64), rendered.extrinsics[0].astype(np.float64))
    video = rendered.video[0]
    errors = pose_errors_within_video(video, cameras, sift())
    score = PoseScore.of(errors[:4])
    assert score.rotation_auc[1] > 0.7 and score.precision > 0.8, score
    # Folded, as for training: the two halves of the clip, frame by frame.
    middle = len(video) // 2
    halves = video[middle::-1], video[middle:]
    one, other = (Cameras(*(part[half] for part in cameras)) for half in (slice(middle, None, -1), slice(middle, None)))
    across = pose_errors_across_views(*halves, one, other, sift())
    assert np.isnan(across[0].translation)
    assert PoseScore.of(across[1:3]).rotation_auc[2] > 0.7
    # The same pictures said to be taken by cameras that also roll: the score must fall.
    angles = np.radians(8.0) * np.arange(len(video))
    roll = rotations.exponential(angles[:, None] * np.array([0.0, 0.0, 1.0]))
    turned = compose(np.concatenate([roll, np.zeros((len(video), 3, 1))], axis=-1), cameras.extrinsics)
    wrong = PoseScore.of(pose_errors_within_video(video, cameras._replace(extrinsics=turned), sift())[:4])
    assert wrong.precision < 0.6 * score.precision and wrong.rotation_auc[1] < 0.4
    assert "rotation AUC@5/10/20" in str(score)


def test_other_matchers_plug_in(rendered):
    """A matcher is a function: here one by optical flow."""

    def flow(first: np.ndarray, second: np.ndarray) -> Matches:
        gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second)]
        points = cv2.goodFeaturesToTrack(gray[0], 400, 0.01, 4)
        there, found, _ = cv2.calcOpticalFlowPyrLK(*gray, points, None)
        kept = found[:, 0] > 0
        return Matches(points[kept, 0] + 0.5, there[kept, 0] + 0.5, len(points))

    cameras = Cameras(rendered.intrinsics[0].astype(np.float64), rendered.extrinsics[0].astype(np.float64))
    errors = pose_errors_within_video(rendered.video[0][:2], Cameras(*(part[:2] for part in cameras)), flow)
    assert errors[0].precision > 0.8 and errors[0].rotation < 5


def test_identical_trajectories():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (2, 8, 8, 3), np.uint8)
    assert views_mse(video, video) == 0.0
    assert views_mse(np.zeros_like(video), np.full_like(video, 255)) == 1.0


def test_cameras_of_real_footage_are_recovered():
    """RealEstate10K's own cameras explain its own footage: ID.mp4, as published, beside ID.txt."""
    folder = Path(os.environ.get("JVGEN_REAL_DATA", "")) / "realestate10k"
    clips = sorted(folder.glob("*.mp4"))
    if not clips:
        pytest.skip("JVGEN_REAL_DATA names no folder with realestate10k/ID.mp4 and ID.txt")
    errors = []
    for clip in clips:
        track = read_cameras(clip.with_suffix(".txt"))
        video = decode_window(clip.read_bytes(), range(len(track)))
        errors += pose_errors_within_video(video, track.cameras, sift())
    score = PoseScore.of(errors)
    print(score)
    assert score.rotation_auc[2] > 0.7 and score.precision > 0.6
