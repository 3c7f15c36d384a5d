"""Losses of autoencoders: element errors, the learned-scale likelihood, the KL divergence of a diagonal Gaussian."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of Stable Diffusion's AutoencoderKL


def absolute_error(
    prediction: Float[Array, "B ..."], target: Float[Array, "B ..."], weights: Float[Array, "B ..."] | None = None
) -> Float[Array, "B"]:
    """Mean absolute error (L1) of each sample, float32; with weights each element's error counts that many times."""
    difference = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if weights is not None:
        difference = difference * weights
    return jnp.mean(difference, axis=tuple(range(1, difference.ndim)))


def squared_error(
    prediction: Float[Array, "B ..."], target: Float[Array, "B ..."], weights: Float[Array, "B ..."] | None = None
) -> Float[Array, "B"]:
    """Mean squared error (L2) of each sample, float32; with weights each element's error counts that many times."""
    difference = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if weights is not None:
        difference = difference * weights
    return jnp.mean(difference, axis=tuple(range(1, difference.ndim)))


def negative_log_likelihood(errors: Float[Array, "B ..."], log_variance: Float[Array, ""]) -> Float[Array, "B"]:
    """`sum(errors / exp(log_variance) + log_variance)` over the elements of each sample, float32.

    The reconstruction term of Stable Diffusion's and CV-VAE's training (CV-VAE, section 3.4): `errors` are absolute
    errors per element, to which a perceptual distance may have been added; `log_variance` is 0 or learned. For a clip
    the published term is per frame: fold frames into the batch first.
    """
    errors = errors.astype(jnp.float32)
    log_variance = log_variance.astype(jnp.float32)
    return jnp.sum(errors * jnp.exp(-log_variance) + log_variance, axis=tuple(range(1, errors.ndim)))


def gaussian_kl(mean: Float[Array, "B ..."], log_variance: Float[Array, "B ..."]) -> Float[Array, "B"]:
    """KL divergence from N(mean, exp(log_variance)) to N(0, 1), summed over the elements of each sample, in nats.

    `log_variance` is clamped to [-30, 20], as Stable Diffusion's posterior is.
    """
    mean = mean.astype(jnp.float32)
    log_variance = jnp.clip(log_variance.astype(jnp.float32), *LOG_VARIANCE_RANGE)
    terms = jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * jnp.sum(terms, axis=tuple(range(1, terms.ndim)))
