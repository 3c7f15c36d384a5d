"""Pairs of views from single clips: how clips are folded, and that warped copies match their homographies."""

import cv2
import numpy as np
import pytest

from jvgen.data.stream.pairs import HomographyConfig, folded, latent_valid, warped_pair
from jvgen.geometry.homography import homographies, map_points


def test_clips_are_folded_at_their_middle_frame():
    np.testing.assert_array_equal(folded(np.arange(7)), [[3, 2, 1, 0], [3, 4, 5, 6]])
    np.testing.assert_array_equal(folded(np.arange(1)), [[0], [0]])
    with pytest.raises(ValueError, match="8 frames cannot be folded: use an odd number, 2N - 1 for two views of N"):
        folded(np.arange(8))


@pytest.fixture(scope="module")
def dots() -> np.ndarray:
    """Five black frames with a bright dot at one place."""
    video = np.zeros((5, 48, 64, 3), np.uint8)
    video[:, 18:21, 40:43] = 255
    return video


def test_a_copy_moves_by_its_homographies(dots):
    pair = warped_pair(dots, HomographyConfig(), seed=5)
    np.testing.assert_array_equal(pair.video[0], dots)
    np.testing.assert_array_equal(pair.video[1, 0], dots[0])
    np.testing.assert_array_equal(pair.homographies[0], np.eye(3))
    place = np.array([[41.5, 19.5, 1.0]])
    for number, matrix in enumerate(pair.homographies):
        weights = pair.video[1, number, ..., 0].astype(float)
        y, x = (np.sum(axis * weights) / weights.sum() + 0.5 for axis in np.indices(weights.shape))
        np.testing.assert_allclose([x, y], map_points(matrix[None].astype(float), place, (48, 64))[0, 0, :2], atol=0.2)
    assert np.abs(map_points(pair.homographies[4:].astype(float), place, (48, 64))[0, 0] - place[0]).max() > 1.0


def test_masks_exclude_pixels_without_content(dots):
    white = np.full_like(dots, 255)
    pair = warped_pair(white, HomographyConfig(strength=2.0), seed=1)
    assert pair.valid[0].all() and pair.valid[1, 0].all()
    assert 0.2 < pair.valid[1, 4].mean() < 0.98
    # What counts is white throughout; what is black throughout does not count.
    shown = pair.video[1, ..., 0]
    assert (shown[pair.valid[1]] == 255).all() and not pair.valid[1][shown < 250].any()


def test_motions_depend_on_the_seed_and_scale_with_the_image():
    config = HomographyConfig()
    np.testing.assert_array_equal(config.draw(3, 48).translation, config.draw(3, 48).translation)
    assert config.draw(3, 48).rotation != config.draw(4, 48).rotation
    small, large = (homographies(config.draw(3, height)) for height in (48, 480))
    grow = np.diag([10.0, 10.0, 1.0])
    np.testing.assert_allclose(grow @ small @ np.linalg.inv(grow), large, atol=1e-12)
    still = warped_pair(np.zeros((3, 16, 16, 3), np.uint8), config.replace(strength=0.0), seed=0)
    np.testing.assert_array_equal(still.homographies, np.broadcast_to(np.eye(3), (3, 3, 3)))
    with pytest.raises(ValueError, match="rotation = -1.0: must be at least 0"):
        config.replace(rotation=-1.0).validate()


def test_latents_of_valid_pixels():
    valid = np.ones((1, 5, 8, 16), bool)
    valid[0, 0, 3, 3] = valid[0, 2, 7, 15] = False
    made = latent_valid(valid, 4, 4)
    expected = np.ones((1, 2, 2, 4), bool)
    expected[0, 0, 0, 0] = expected[0, 1, 1, 3] = False
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(latent_valid(valid, 1, 1), valid)
    pooled = cv2.erode(valid[0, 0].astype(np.uint8), np.ones((4, 4), np.uint8), anchor=(0, 0))[::4, ::4]
    np.testing.assert_array_equal(latent_valid(valid[:, :1], 4, 1)[0, 0], pooled)
