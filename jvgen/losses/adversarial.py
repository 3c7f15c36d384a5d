"""Hinge losses of an autoencoder against a discriminator, and the adaptive weight between them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def hinge_discriminator(real: Float[Array, "..."], reconstructed: Float[Array, "..."]) -> Float[Array, ""]:
    """`(mean relu(1 - real) + mean relu(1 + reconstructed)) / 2` of discriminator scores (Lim and Ye 2017), float32."""
    real, reconstructed = real.astype(jnp.float32), reconstructed.astype(jnp.float32)
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + reconstructed)))


def hinge_generator(reconstructed: Float[Array, "..."]) -> Float[Array, ""]:
    """`-mean` of discriminator scores: the autoencoder's loss against `hinge_discriminator`, float32."""
    return -jnp.mean(reconstructed.astype(jnp.float32))


def adaptive_weight(
    reconstruction_grad: Float[Array, "..."],
    adversarial_grad: Float[Array, "..."],
    *,
    limit: float = 1e4,
    epsilon: float = 1e-4,
    floor: float = 0.0,
) -> Float[Array, ""]:
    """The weight that scales the adversarial gradient to the reconstruction gradient (Esser et al. 2021, VQGAN, eq. 7).

    Args:
      reconstruction_grad, adversarial_grad: gradients of the two losses with respect to the kernel of the decoder's
        last layer.
      limit: largest weight, in the units of these two losses: VQGAN's 1e4 for a reconstruction loss that is a mean over
        pixel values. For one that Stable Diffusion's code sums over the N values of an image and that is a mean here,
        the same limit is 1e4 / N.
      epsilon: added to the norm of the adversarial gradient.
      floor: smallest norm to divide by.

    Returns:
      `min(|reconstruction_grad| / max(|adversarial_grad| + epsilon, floor), limit)`, float32, without a gradient.
    """
    norms = [jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in (reconstruction_grad, adversarial_grad)]
    return jax.lax.stop_gradient(jnp.minimum(norms[0] / jnp.maximum(norms[1] + epsilon, floor), limit))


def surrogate_loss(x: Float[Array, "..."], gradient: Float[Array, "..."]) -> Float[Array, ""]:
    """A float32 zero whose gradient with respect to `x` is `gradient`.

    Injects a gradient that was computed already, so that no second backward pass computes it again.
    """
    product = jnp.sum(x.astype(jnp.float32) * jax.lax.stop_gradient(gradient.astype(jnp.float32)))
    return product - jax.lax.stop_gradient(product)
