"""PSNR and SSIM of images and frames, traced or eager."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

PSNR_CEILING = 100.0  # dB, reported for equal images
WINDOW, _SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window


def peak_signal_to_noise(
    prediction: Float[Array, "*B H W C"], target: Float[Array, "*B H W C"], *, data_range: float
) -> Float[Array, "*B"]:
    """PSNR in dB of each image: `10 log10(data_range^2 / mean squared error)`, at most 100.

    Args:
      prediction, target: images; leading axes (batch, frames) are kept. For a clip, average the result over its frames.
      data_range: largest minus smallest possible value: 2 for [-1, 1], 255 for 8 bits.
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    error = jnp.mean(jnp.square(difference), axis=(-3, -2, -1)) / data_range**2
    return -10.0 * jnp.log10(jnp.maximum(error, 10.0 ** (-PSNR_CEILING / 10.0)))


def structural_similarity(
    prediction: Float[Array, "*B H W C"], target: Float[Array, "*B H W C"], *, data_range: float
) -> Float[Array, "*B"]:
    """SSIM of each image (Wang et al. 2004): 11x11 Gaussian windows within it, sigma 1.5, K1 0.01, K2 0.03.

    Averaged over channels. Equals scikit-image's with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False. Unlike PSNR it depends on where zero is: it is defined for values from 0 on, so map
    images in [-1, 1] to [0, 1] first.

    Raises:
      ValueError: an image smaller than the window.
    """
    if min(prediction.shape[-3:-1]) < WINDOW:
        size = f"{prediction.shape[-3]}x{prediction.shape[-2]}"
        raise ValueError(f"SSIM needs sides of at least {WINDOW} pixels, got {size}.")
    first, second = prediction.astype(jnp.float32) / data_range, target.astype(jnp.float32) / data_range
    # Variances are differences of means of squares, accurate in float32 for centered values only.
    center = jnp.mean(first, axis=(-3, -2), keepdims=True)
    first, second = first - center, second - center
    mean_first, mean_second = _blur(first), _blur(second)
    variance_first = _blur(first * first) - mean_first**2
    variance_second = _blur(second * second) - mean_second**2
    covariance = _blur(first * second) - mean_first * mean_second
    mean_first, mean_second = mean_first + center, mean_second + center
    luminance = (2 * mean_first * mean_second + 0.01**2) / (mean_first**2 + mean_second**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_first + variance_second + 0.03**2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _blur(images: Array) -> Array:
    """Separable Gaussian filter over the windows within the image, as sums of shifted images."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = [float(w) for w in weights / weights.sum()]
    height, width = images.shape[-3] - WINDOW + 1, images.shape[-2] - WINDOW + 1
    rows = sum(w * images[..., k : k + height, :, :] for k, w in enumerate(weights))
    return sum(w * rows[..., k : k + width, :] for k, w in enumerate(weights))
