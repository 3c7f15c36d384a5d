"""Losses of an autoencoder against a discriminator, and how strongly the two are mixed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def hinge_discriminator(real: Float[Array, "..."], made: Float[Array, "..."]) -> Float[Array, ""]:
    """`(mean max(0, 1 - real) + mean max(0, 1 + made)) / 2` of a discriminator's outputs (Lim and Ye 2017), float32."""
    real, made = real.astype(jnp.float32), made.astype(jnp.float32)
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + made)))


def hinge_generator(made: Float[Array, "..."]) -> Float[Array, ""]:
    """`-mean made`: what the autoencoder minimises against `hinge_discriminator`, float32."""
    return -jnp.mean(made.astype(jnp.float32))


def adaptive_weight(
    reconstruction: Float[Array, "..."],
    adversarial: Float[Array, "..."],
    *,
    limit: float = 1e4,
    epsilon: float = 1e-4,
) -> Float[Array, ""]:
    """The weight that makes an adversarial loss pull as hard as the reconstruction (Esser et al. 2021, VQGAN, eq. 7).

    Args:
      reconstruction, adversarial: gradients of the two losses with respect to the kernel of the decoder's last layer.
      limit: largest weight.
      epsilon: added to the norm of the adversarial gradient.

    Returns:
      `min(|reconstruction| / (|adversarial| + epsilon), limit)`, float32, without a gradient.
    """
    norms = [jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in (reconstruction, adversarial)]
    return jax.lax.stop_gradient(jnp.minimum(norms[0] / (norms[1] + epsilon), limit))


def given_gradient(of: Float[Array, "..."], gradient: Float[Array, "..."]) -> Float[Array, ""]:
    """Zero, whose gradient with respect to `of` is `gradient`; float32.

    For gradients that were computed already, so that no second backward pass computes them again.
    """
    pull = jnp.sum(of.astype(jnp.float32) * jax.lax.stop_gradient(gradient.astype(jnp.float32)))
    return pull - jax.lax.stop_gradient(pull)
