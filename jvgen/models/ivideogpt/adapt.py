"""Weights of one shape put to use in another: other numbers of context frames, heads that the weights lack."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.nested import flatten, unflatten

# What may differ between transformers: their heads, and what is of training or of the longest sequence only.
TRANSFORMER_FIELDS = (
    "action_width", "reward", "action_reconstruction", "attention_dropout", "max_positions", "remat", "unroll",
)  # fmt: skip


def tokenizer_parameters(
    parameters: Mapping[str, Any], found: CompressiveTokenizerConfig, wanted: CompressiveTokenizerConfig
) -> dict[str, Any]:
    """Parameters of a tokenizer for fewer or more frames of context.

    For fewer, positions of the last frames are kept, as the released code does. It cannot take more: here each frame
    before those that the weights know begins with the positions of the first one known, so that taking it away again
    gives the same weights.

    Args:
      parameters: of `found`.
      found, wanted: equal but for `context_frames` and what is of training only.

    Raises:
      ValueError: configurations that differ in something else.
    """
    of_training = {name: getattr(wanted, name) for name in ("dropout", "commitment", "remat")}
    if found.replace(context_frames=wanted.context_frames, **of_training) != wanted:
        raise ValueError("tokenizers that differ in more than context_frames: train a new one.")
    more = wanted.context_frames - found.context_frames
    flat = flatten(parameters)
    for path, value in flat.items():
        if path.endswith("context_positions"):
            rows = value.shape[0] // found.context_frames
            flat[path] = jnp.concatenate([*[value[:rows]] * more, value]) if more > 0 else value[-more * rows :]
    return unflatten(flat)


def transformer_parameters(
    parameters: Mapping[str, Any], found: FrameTransformerConfig, wanted: FrameTransformerConfig
) -> dict[str, Any]:
    """The parameters that `wanted` shares with `found`; heads that differ are left out, to begin afresh.

    A map from actions that begins afresh begins at zero: the model starts as the action-free one that it was.
    """
    if found.replace(**{name: getattr(wanted, name) for name in TRANSFORMER_FIELDS}) != wanted:
        raise ValueError("transformers that differ in more than their heads: train a new one.")
    kept = {"action": found.action_width == wanted.action_width, "reward": wanted.reward}
    kept["action_reconstruction"] = wanted.action_reconstruction and kept["action"]
    return {name: value for name, value in parameters.items() if kept.get(name, True)}
