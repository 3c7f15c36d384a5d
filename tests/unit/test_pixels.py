"""Ranges of pixels, and that metrics get them in [0, 1]: SSIM of the same images has another value on [-1, 1]."""

import ast
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

import jvgen
from jvgen.evaluation.reconstruction import structural_similarity
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.tasks import compatibility, pixels
from jvgen.tasks.perceptual import PerceptualDistance

LEVELS = jnp.arange(256, dtype=jnp.uint8)


def test_all_levels_survive_both_ranges():
    np.testing.assert_array_equal(pixels.to_uint8(pixels.from_uint8(LEVELS)), LEVELS)
    np.testing.assert_array_equal(pixels.unit_to_uint8(pixels.unit_from_uint8(LEVELS)), LEVELS)
    signed, unit = pixels.from_uint8(LEVELS), pixels.unit_from_uint8(LEVELS)
    np.testing.assert_allclose(pixels.unit_from_signed(signed), unit, atol=1e-7)
    np.testing.assert_allclose(pixels.signed_from_unit(unit), signed, atol=2e-7)
    np.testing.assert_array_equal(pixels.unit_from_signed(jnp.asarray([-1.5, 1.5])), [0.0, 1.0])


def wang(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM of float64 images in [0, 1] with OpenCV's filter."""

    def mean(values):
        return cv2.GaussianBlur(values, (11, 11), 1.5)[5:-5, 5:-5]

    mx, my = mean(first), mean(second)
    vx, vy, cov = mean(first**2) - mx**2, mean(second**2) - my**2, mean(first * second) - mx * my
    luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
    return float(np.mean(luminance * (2 * cov + 9e-4) / (vx + vy + 9e-4)))


def test_fidelity_of_vaes_is_the_standard_one():
    """Image VAE, video VAE and `jvgen evaluate --vae` measure with this function or as it does."""
    random = np.random.default_rng(0)
    target = cv2.GaussianBlur(random.uniform(0.3, 0.7, (32, 24, 3)), (0, 0), 1.5)
    image = np.clip(cv2.GaussianBlur(target, (0, 0), 1.0) + random.normal(0, 0.02, target.shape), 0, 1)
    clips = tuple(jnp.asarray(2 * x - 1, jnp.float32)[None, None] for x in (image, target))
    distance = PerceptualDistance(PerceptualConfig(kind="none"))
    found = {name: value.item() for name, value in compatibility.fidelity({"": clips}, distance, {}).items()}
    assert found["ssim"] == pytest.approx(wang(image, target), abs=1e-5)
    assert found["psnr"] == pytest.approx(-10 * np.log10(np.mean((image - target) ** 2)), abs=1e-4)
    signed = float(structural_similarity(*(clip[0, 0] for clip in clips), data_range=2.0))
    assert abs(signed - found["ssim"]) > 0.02, "the case tells the two ranges apart"


def test_every_metric_of_images_is_computed_on_unit_pixels():
    """In the whole package SSIM and PSNR are called with data_range=1, or pass on their caller's."""
    calls = 0
    for path in Path(jvgen.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} if isinstance(node, ast.Call) else ()
            )
            if {"structural_similarity", "peak_signal_to_noise", "smoothness", "adjacent_similarity"} & set(names):
                for keyword in node.keywords:
                    if keyword.arg == "data_range" and isinstance(keyword.value, ast.Constant):
                        calls += 1
                        assert keyword.value.value == 1.0, f"{path}:{node.lineno}: data_range = {keyword.value.value}"
    assert calls >= 8
