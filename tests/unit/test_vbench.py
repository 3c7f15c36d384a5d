"""VBench's dimensions of clips whose values are known: still, shifted, alternating, jumping; measures of frames."""

import cv2
import numpy as np
import pytest

from jvgen.evaluation import vbench

SIDE = 64


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    """Smooth random colors, larger than a frame, over the whole range."""
    noise = np.random.default_rng(0).standard_normal((SIDE + 80, SIDE + 80, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3.0)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def shifted(texture: np.ndarray, shifts) -> np.ndarray:
    """A clip whose content moves to the right, by so many pixels in all at each frame."""
    return np.stack([texture[40 : 40 + SIDE, 40 - shift : 40 - shift + SIDE] for shift in shifts])


def test_flow_is_that_of_the_content(texture):
    clip = shifted(texture, (0, 3))
    found = vbench.flow(*clip)[8:-8, 8:-8]
    np.testing.assert_allclose(np.median(found, axis=(0, 1)), [3.0, 0.0], atol=0.1)
    np.testing.assert_array_equal(vbench.flow(clip[0], clip[0]), 0.0)


@pytest.mark.parametrize(
    ("shift", "rate", "expected"),
    [
        (0, 8.0, False),
        (1, 8.0, False),  # below 6 / 256 of the shorter side, which is 1.5 pixels here
        (2, 8.0, True),
        (2, 4.0, False),  # twice the time between frames, twice the threshold
        (2, 16.0, True),  # every second frame
        (1, 16.0, True),
    ],
)
def test_a_clip_is_dynamic_above_a_speed(texture, shift, rate, expected):
    clip = shifted(texture, range(0, 16 * shift, shift) if shift else [0] * 16)
    assert vbench.is_dynamic(clip, rate) is expected


def test_a_quarter_of_a_dynamic_clip_moves(texture):
    for moving, expected in ((3, False), (4, True)):
        clip = shifted(texture, [0] * (16 - moving) + [3 * (1 + n) for n in range(moving)])
        assert vbench.is_dynamic(clip) is expected


def test_steady_motion_is_smooth_and_alternating_frames_are_not(texture):
    still, steady = shifted(texture, [0] * 5), shifted(texture, (0, 2, 4, 6, 8))
    assert vbench.motion_smoothness(still) == 1.0
    assert 0.98 < vbench.motion_smoothness(steady) < 1.0
    # Every second frame is the negative of those around it.
    alternating = np.stack([still[0], 255 - still[0]] * 2 + [still[0]])
    difference = np.abs(still[0].astype(float) - (255 - still[0].astype(float))).mean() / 255
    assert vbench.motion_smoothness(alternating) == pytest.approx(1 - difference)
    jumping = shifted(texture, (0, 6, 2, 8, 4))
    assert vbench.motion_smoothness(jumping) < vbench.motion_smoothness(steady) - 0.02
    with pytest.raises(ValueError, match="a clip of 2 frames has none between two others"):
        vbench.motion_smoothness(still[:2])


def test_consistency_of_features_is_with_the_first_frame_and_the_one_before():
    one, other = np.eye(2)
    assert vbench.consistency(np.array([[one, 3 * one, one]])) == pytest.approx(1.0)
    # Other than the first from the second frame on: its cosines are (0, 0), then (0, 1).
    assert vbench.consistency(np.array([[one, other, other]])) == pytest.approx(0.25)
    assert vbench.consistency(np.array([[one, -one]])) == 0.0  # not below zero
    assert vbench.consistency(np.array([[one, one], [one, other]])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="features of 1 frame"):
        vbench.consistency(np.ones((1, 1, 2)))


def test_measures_of_frames(texture):
    flat = np.full((1, SIDE, SIDE, 3), (60, 60, 60), np.uint8)
    assert vbench.frame_measures(flat) == {"sharpness": 0.0, "colorfulness": 0.0, "noise": 0.0}
    # One color: no spread; rg = 100, yb = (200 + 100) / 2 - 50 = 100.
    color = np.full((1, SIDE, SIDE, 3), (200, 100, 50), np.uint8)
    assert vbench.frame_measures(color)["colorfulness"] == pytest.approx(0.3 * np.hypot(100, 100))
    noisy = np.clip(128 + np.random.default_rng(1).normal(0, 10, (4, SIDE, SIDE)), 0, 255).astype(np.uint8)
    assert vbench.frame_measures(np.repeat(noisy[..., None], 3, axis=-1))["noise"] == pytest.approx(10, rel=0.05)
    sharp = texture[None, :SIDE, :SIDE]
    blurred = cv2.GaussianBlur(sharp[0], (0, 0), 3.0)[None]
    assert vbench.frame_measures(sharp)["sharpness"] > 2 * vbench.frame_measures(blurred)["sharpness"]
