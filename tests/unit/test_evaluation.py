"""Reconstruction and temporal metrics against independent computations, and the classifier of clips."""

import io

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvgen.evaluation.contact_sheets import contact_sheet, evenly_spaced, gif_bytes, png_bytes
from jvgen.evaluation.motion import DIRECTIONS, classify_clip, motion_score
from jvgen.evaluation.reconstruction import peak_signal_to_noise, structural_similarity
from jvgen.evaluation.temporal import adjacent_similarity, motion_error, smoothness

PALETTE = {
    "red": (214, 40, 44),
    "yellow": (232, 206, 40),
    "green": (44, 160, 62),
    "blue": (44, 84, 212),
    "purple": (134, 56, 188),
}


def two_images(seed=0, size=(40, 33)):
    random = np.random.default_rng(seed)
    first = cv2.GaussianBlur(random.uniform(0, 255, (*size, 3)), (0, 0), 2.0)
    return first, np.clip(first + random.normal(0, 12, first.shape), 0, 255)


def cv2_ssim(first, second, data_range):
    """Wang et al. 2004 in float64 with OpenCV's filter."""

    def mean(values):
        return cv2.GaussianBlur(values, (11, 11), 1.5)[5:-5, 5:-5]

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = mean(first), mean(second)
    vx, vy, cov = mean(first**2) - mx**2, mean(second**2) - my**2, mean(first * second) - mx * my
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def test_psnr_is_the_formula_and_has_a_ceiling():
    first, second = two_images()
    expected = 10 * np.log10(255**2 / np.mean((first - second) ** 2))
    measured = peak_signal_to_noise(jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32), data_range=255)
    assert float(measured) == pytest.approx(expected, abs=1e-4)
    rounded = [np.round(image).astype(np.uint8) for image in (first, second)]
    assert float(peak_signal_to_noise(*map(jnp.asarray, rounded), data_range=255)) == pytest.approx(
        cv2.PSNR(*rounded), abs=1e-3
    )
    assert float(peak_signal_to_noise(jnp.ones((2, 2, 3)), jnp.ones((2, 2, 3)), data_range=2)) == pytest.approx(100.0)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_ssim_is_that_of_wang(offset):
    first, second = two_images()
    second = second * 0.8 + offset
    expected = cv2_ssim(first, second, 255.0)
    arrays = [jnp.asarray(image, jnp.float32)[None, None] for image in (first, second)]
    measured = structural_similarity(*arrays, data_range=255)
    assert measured.shape == (1, 1) and 0.2 < expected < 0.95
    assert float(measured[0, 0]) == pytest.approx(expected, abs=1e-5)


def test_ssim_does_not_depend_on_the_scale_of_the_range():
    first, second = (jnp.asarray(image / 255, jnp.float32) for image in two_images())
    one = structural_similarity(first, second, data_range=1)
    assert float(structural_similarity(first * 4, second * 4, data_range=4)) == pytest.approx(float(one), abs=1e-5)
    assert float(structural_similarity(first, first, data_range=1)) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="11 pixels"):
        structural_similarity(first[:8], second[:8], data_range=1)


def test_temporal_metrics_on_static_flickering_and_shifted_clips():
    still = jnp.broadcast_to(
        jnp.asarray(np.random.default_rng(0).uniform(size=(1, 16, 16, 3)), jnp.float32), (5, 16, 16, 3)
    )
    flicker = still * jnp.asarray([1.0, 0.5, 1.0, 0.5, 1.0])[:, None, None, None]
    assert float(smoothness(still, data_range=1)) == 1.0
    assert float(smoothness(flicker, data_range=1)) == pytest.approx(1 - 0.5 * float(still.mean()), abs=1e-5)
    assert float(adjacent_similarity(still, data_range=1)) == pytest.approx(1.0, abs=1e-5)
    assert float(adjacent_similarity(flicker, data_range=1)) < 0.9
    assert float(motion_error(flicker + 0.3, flicker, data_range=1)) == pytest.approx(0.0, abs=1e-6)
    assert float(motion_error(still, flicker, data_range=1)) == pytest.approx(0.5 * float(still.mean()), abs=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        smoothness(still[:1], data_range=1)


def shape_clip(color, direction, *, size=32, frames=8, blur=0.0, noise=0.0, seed=0):
    """A shaded disc over a gray gradient with a gray shadow; toward and away change its size."""
    random = np.random.default_rng(seed)
    rows, columns = np.indices((size, size)) / size
    way = {
        "left": (-1, 0, 0),
        "right": (1, 0, 0),
        "up": (0, -1, 0),
        "down": (0, 1, 0),
        "toward": (0, 0, 1),
        "away": (0, 0, -1),
    }
    dx, dy, dz = way[direction]
    clip = []
    for time in np.linspace(-0.5, 0.5, frames):
        x, y, radius = 0.5 + 0.4 * time * dx, 0.5 + 0.4 * time * dy, 0.16 * np.exp(0.7 * time * dz)
        image = np.repeat((120 + 60 * rows)[..., None], 3, axis=-1)
        image[((columns - x) ** 2 + ((rows - y - radius) * 2) ** 2) < radius**2] *= 0.6
        inside = ((columns - x) ** 2 + (rows - y) ** 2) < radius**2
        image[inside] = (np.asarray(PALETTE[color]) * (0.75 + 0.5 * (y + radius - rows) / (2 * radius))[..., None])[
            inside
        ]
        image = cv2.GaussianBlur(image, (0, 0), blur) if blur else image
        clip.append(image + random.normal(0, noise, image.shape))
    return np.clip(clip, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("blur, noise", [(0.0, 0.0), (1.5, 8.0)])
@pytest.mark.parametrize("size", [32, 64])
def test_every_color_and_direction_is_read(size, blur, noise):
    pairs = [(color, direction) for color in PALETTE for direction in DIRECTIONS]
    clips = [shape_clip(*pair, size=size, blur=blur * size / 32, noise=noise, seed=k) for k, pair in enumerate(pairs)]
    result = motion_score(clips, pairs, PALETTE)
    assert result["color_accuracy"] == result["direction_accuracy"] == result["both_accuracy"] == 1.0
    assert result["found"] == 1.0 and result["count"] == 30 and result["color_chance"] == 0.2


def test_confidence_falls_when_half_of_the_shape_has_another_color():
    clip = shape_clip("red", "right")
    mixed = clip.copy()
    mixed[:, 16:] = shape_clip("blue", "right")[:, 16:]
    whole, half = classify_clip(clip, PALETTE), classify_clip(mixed, PALETTE)
    assert whole.color == "red" and whole.color_confidence > 0.9 > 0.75 > half.color_confidence
    assert whole.direction == "right" and whole.travel[0] == pytest.approx(0.4, abs=0.03)


def test_blank_clips_gray_shapes_and_static_shapes_have_no_label():
    assert classify_clip(np.full((6, 32, 32, 3), 90, np.uint8), PALETTE).color is None
    gray = shape_clip("red", "left").mean(axis=-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    assert classify_clip(gray, PALETTE).color is None
    still = np.repeat(shape_clip("red", "left")[:1], 6, axis=0)
    assert classify_clip(still, PALETTE)[:2] == ("red", None)


def test_noise_scores_like_guessing_or_worse():
    random = np.random.default_rng(0)
    clips = [random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8) for _ in range(40)]
    labels = [(color, direction) for color in PALETTE for direction in DIRECTIONS][:40]
    result = motion_score(clips[: len(labels)], labels, PALETTE)
    assert result["color_accuracy"] < 0.35 and result["both_accuracy"] < 0.15


def test_scores_count_only_what_a_caption_names():
    clips = [shape_clip("red", "left"), shape_clip("blue", "up")]
    result = motion_score(clips, [("red", None), (None, "down")], PALETTE)
    assert result["color_accuracy"] == 1.0 and result["direction_accuracy"] == 0.0 and np.isnan(result["both_accuracy"])
    with pytest.raises(ValueError, match="one label per clip"):
        motion_score(clips, [("red", None)], PALETTE)
    with pytest.raises(ValueError, match="uint8"):
        classify_clip(clips[0].astype(np.float32), PALETTE)


def test_a_contact_sheet_shows_first_and_last_frames():
    clips = [np.stack([np.full((4, 6, 3), 10 * k, np.uint8) for k in range(count)]) for count in (9, 2)]
    sheet = contact_sheet(clips, frames=3, scale=2)
    assert sheet.shape == ((4 + 2 + 4) * 2, (3 * 6 + 2 * 2) * 2, 3)
    assert [int(sheet[0, x, 0]) for x in (0, 16, 32)] == [0, 40, 80]
    assert sheet[13, 17, 0] == 10 and sheet[13, 40, 0] == 255
    np.testing.assert_array_equal(Image.open(io.BytesIO(png_bytes(sheet))), sheet)
    np.testing.assert_array_equal(evenly_spaced(5, 9), np.arange(5))
    with pytest.raises(ValueError, match="different sizes"):
        contact_sheet([clips[0], clips[0][:, :2]])


def test_rows_of_a_contact_sheet_are_labeled():
    clips = [np.full((2, 20, 20, 3), 7, np.uint8)] * 2
    plain, labeled = contact_sheet(clips), contact_sheet(clips, labels=["recorded", "no\naction"])
    left = labeled.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(labeled[:, left:], plain)
    assert all((half[:, :left] < 128).any() for half in (labeled[:20], labeled[22:]))
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        contact_sheet(clips, labels=["one"])


def test_a_gif_loops_over_all_frames_in_nearly_true_colors():
    clip = shape_clip("green", "right")
    with Image.open(io.BytesIO(gif_bytes(clip, frames_per_second=10, scale=2))) as gif:
        assert (
            gif.n_frames == len(clip) and gif.size == (64, 64) and gif.info["loop"] == 0 and gif.info["duration"] == 100
        )
        gif.seek(3)
        shown = np.asarray(gif.convert("RGB")).astype(int)[::2, ::2]
    assert np.abs(shown - clip[3]).mean() < 4
