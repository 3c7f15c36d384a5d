"""Losses of the transformer: next ids of future frames, the reward of each frame, reconstructed actions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.transformer import FrameTransformer


class LossTerms(NamedTuple):
    """Losses, float32 scalars; None where the model lacks the head or the batch lacks the target.

    Attributes:
      cross_entropy: mean over the ids after the first slot.
      accuracy: share of these ids that have the highest score.
      reward: mean squared error of the rewards.
      action_reconstruction: mean squared error of the reconstructed actions.
    """

    cross_entropy: jax.Array
    accuracy: jax.Array
    reward: jax.Array | None
    action_reconstruction: jax.Array | None


def loss_terms(
    model: FrameTransformer,
    tokens: Int[Array, "B L"],
    layout: Layout,
    *,
    actions: Float[Array, "B F A"] | None = None,
    rewards: Float[Array, "B F"] | None = None,
    keys: Key[Array, "B"] | None = None,
    dtype: Any = jnp.float32,
) -> LossTerms:
    """All losses of a batch of sequences (arXiv 2405.15223, section 3.2, and the released code).

    Scores are computed at target positions only: the context, most of a sequence, is never a target.

    Args:
      model: with its parameters.
      tokens: sequences in a layout.
      actions: those that lead to the future frames (`Layout.action_frames`).
      rewards: of these actions, in the scale that the model predicts.
      keys: dropout keys, one per sequence; None for no dropout.
      dtype: of the computation.
    """
    hidden = model(tokens, layout, actions, keys, dtype=dtype)
    targets, positions = layout.targets(tokens)
    logits = model.logits(hidden[:, positions])
    log_total = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hits = jnp.argmax(logits, axis=-1) == targets
    reward = reconstruction = None
    if rewards is not None and model.reward is not None:
        predicted = model.rewards(hidden[:, layout.reward_positions])
        reward = jnp.mean(jnp.square(predicted - rewards.astype(jnp.float32)))
    if actions is not None and model.action_reconstruction is not None:
        reconstructed = model.reconstructed_actions(hidden[:, layout.prompt_length :])
        expected = jnp.repeat(actions.astype(jnp.float32), layout.frame_length, axis=1)
        reconstruction = jnp.mean(jnp.square(reconstructed - expected))
    return LossTerms(jnp.mean(log_total - of_target), jnp.mean(hits.astype(jnp.float32)), reward, reconstruction)


def symlog(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """sign(x) log(1 + |x|): compresses rewards of any size for a linear head (Hafner et al. 2023, equation 1)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))
