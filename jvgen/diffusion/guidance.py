"""Classifier-free guidance: its scale at each step, and the batch with the conditional and unconditional half."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.diffusion.schedule import TIMESTEPS
from jvgen.value_rules import Bounds, Scale

Denoise = Callable[[Array, Array, Array], Array]
ConditionedDenoise = Callable[[Array, Array, Any], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Config):
    """Scale of classifier-free guidance: `unconditional + scale (conditional - unconditional)`.

    Attributes:
      kind: "none" (one forward pass per step), "constant", or "dynamic" (CogVideoX's scale, which depends on the step).
      scale: the constant scale; for "dynamic" the maximum is 1 + scale.
      exponent: of "dynamic".
      rescale: 0..1, how far the standard deviation of the guided prediction is rescaled to that of the conditional one
        (Lin et al. 2024, section 3.4).
    """

    kind: Literal["none", "constant", "dynamic"] = "constant"
    scale: Scale = 6.0
    exponent: Annotated[float, Bounds(at_least=0, at_most=100)] = 5.0
    rescale: Annotated[float, Bounds(at_least=0, at_most=1, fix="0 turns it off")] = 0.0


def guidance_scales(config: GuidanceConfig, timesteps: np.ndarray) -> np.ndarray:
    """Scale of guidance at each step, float64.

    "dynamic" is 1 + scale (1 - cos(pi ((n - t) / n)^exponent)) / 2 with n the number of steps and t the raw timestep,
    not the step index: a quirk of the published code that the weights are used with. The argument of the cosine
    reaches 1e7, so float32 gives other numbers.

    Args:
      config: kind and parameters.
      timesteps: raw timesteps in the order of sampling, one per step.
    """
    steps = len(timesteps)
    if config.kind == "none":
        return np.ones(steps)
    if config.kind == "constant":
        return np.full(steps, config.scale, np.float64)
    fraction = (steps - np.asarray(timesteps, np.float64)) / steps
    if config.exponent != int(config.exponent) and (fraction < 0).any():
        raise ValueError(
            f"exponent = {config.exponent}: dynamic guidance takes powers of negative numbers (steps - timestep, "
            f"with timesteps up to {TIMESTEPS}); choose an integer, for example 5."
        )
    return 1.0 + config.scale * (1.0 - np.cos(np.pi * fraction**config.exponent)) / 2.0


def rescale_guided(
    guided_prediction: Float[Array, "B ..."], conditional: Float[Array, "B ..."], amount: float
) -> Float[Array, "B ..."]:
    """Rescale each sample's guided prediction towards the standard deviation of its conditional prediction."""
    axes = tuple(range(1, conditional.ndim))
    wanted = jnp.std(conditional, axis=axes, keepdims=True, ddof=1)
    actual = jnp.std(guided_prediction, axis=axes, keepdims=True, ddof=1)
    return guided_prediction * (amount * (wanted / actual) + (1.0 - amount))


def guided(denoise: ConditionedDenoise, conditional: Any, unconditional: Any, *, rescale: float = 0.0) -> Denoise:
    """Run a network with and without its condition, in one batch of twice the size.

    Args:
      denoise: `(noisy [B ...], timesteps [B], condition) -> prediction [B ...]`.
      conditional, unconditional: trees of arrays of equal shapes with a leading batch axis, in the form of `condition`.
      rescale: see `GuidanceConfig.rescale`.

    Returns:
      `(noisy, timesteps, scale) -> prediction`, float32, as `jvgen.diffusion.sampler.sample` calls it.
    """
    condition = jax.tree.map(_interleave, unconditional, conditional)

    def denoise_both(noisy: Array, timesteps: Array, scale: Array) -> Array:
        prediction = denoise(_interleave(noisy, noisy), _interleave(timesteps, timesteps), condition)
        prediction = prediction.astype(jnp.float32)
        without, with_condition = prediction[0::2], prediction[1::2]
        mixed = without + scale * (with_condition - without)
        return rescale_guided(mixed, with_condition, rescale) if rescale else mixed

    return denoise_both


def unguided(denoise: ConditionedDenoise, condition: Any) -> Denoise:
    """A network with its condition, in the form that `sample` calls; ignores the scale."""
    return lambda noisy, timesteps, scale: denoise(noisy, timesteps, condition)


def _interleave(first: Array, second: Array) -> Array:
    """Pairs side by side along the batch axis: unlike two halves, they need no communication of a sharded batch."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])
