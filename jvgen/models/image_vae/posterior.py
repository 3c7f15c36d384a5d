"""The Gaussian posterior between encoder and decoder."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_VARIANCE_RANGE = (-30.0, 20.0)


def split_moments(moments: Float[Array, "... M"]) -> tuple[Float[Array, "... z"], Float[Array, "... z"]]:
    """Mean and log variance, in float32; the log variance is clamped to [-30, 20]."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


def sample(moments: Float[Array, "... M"], noise: Float[Array, "... z"]) -> Float[Array, "... z"]:
    """A latent: mean plus standard deviation times standard normal `noise`; in the dtype of `moments`."""
    mean, log_variance = split_moments(moments)
    return (mean + jnp.exp(0.5 * log_variance) * noise.astype(jnp.float32)).astype(moments.dtype)


def mode(moments: Float[Array, "... M"]) -> Float[Array, "... z"]:
    """The most likely latent: the mean."""
    return jnp.split(moments, 2, axis=-1)[0]


def kl_divergence(moments: Float[Array, "B ... M"]) -> Float[Array, "B"]:
    """Kullback-Leibler divergence from the standard normal in nats, summed over everything but the batch; float32."""
    mean, log_variance = split_moments(moments)
    terms = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return jnp.sum(terms, axis=tuple(range(1, terms.ndim)))
