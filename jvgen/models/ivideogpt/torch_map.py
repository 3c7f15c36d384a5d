"""Released files of both networks, chosen by configuration; and weights adapted to a related configuration."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jvgen.models.ivideogpt import tokenizer_map, transformer_map
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.weight_map import WeightMap
from jvgen.nested import flatten, unflatten

Configs = CompressiveTokenizerConfig | FrameTransformerConfig

# What may differ between transformers that share weights: their heads, and fields of training or of the longest
# sequence only.
TRANSFORMER_FIELDS = (
    "action_width", "reward", "action_reconstruction", "tokens_per_frame", "action_everywhere", "attention_dropout",
    "max_positions", "remat", "unroll",
)  # fmt: skip


def weight_map(config: Configs) -> WeightMap:
    """Names and layouts of the released files."""
    if isinstance(config, CompressiveTokenizerConfig):
        return tokenizer_map.tokenizer_map(config)
    return transformer_map.transformer_map(config)


def to_diffusers_config(config: Configs) -> dict[str, Any]:
    """Contents of config.json."""
    if isinstance(config, CompressiveTokenizerConfig):
        return tokenizer_map.tokenizer_to_json(config)
    return transformer_map.transformer_to_json(config)


def from_diffusers_config(values: dict[str, Any]) -> Configs:
    """The configuration that a config.json describes."""
    if values.get("_class_name") == tokenizer_map.CLASS_NAME:
        return tokenizer_map.tokenizer_from_json(values)
    return transformer_map.transformer_from_json(values)


def json_from_tensors(values: dict[str, Any], open_weights: Callable[[], Any]) -> dict[str, Any]:
    """Keys of config.json that the released files lack and that follow from their tensors.

    Args:
      values: the keys that are there.
      open_weights: gives a mapping of names with a method `shape`.
    """
    if values.get("_class_name") == tokenizer_map.CLASS_NAME or "action_dim" in values:
        return {}
    reader = open_weights()
    return transformer_map.heads_in(reader, reader.shape)


def adapt_parameters(parameters: dict[str, Any], found: Configs, wanted: Configs) -> dict[str, Any]:
    """Parameters of `found` for a network with another number of context frames, or other heads."""
    if isinstance(wanted, CompressiveTokenizerConfig):
        return adapt_tokenizer(parameters, found, wanted)
    return adapt_transformer(parameters, found, wanted)


def adapt_tokenizer(
    parameters: Mapping[str, Any], found: CompressiveTokenizerConfig, wanted: CompressiveTokenizerConfig
) -> dict[str, Any]:
    """Parameters of a tokenizer for fewer or more context frames.

    For fewer, positions of the last frames are kept, as in the released code, which cannot take more. For more, each
    added earlier frame starts with the positions of the first known one, so that removing it again gives the same
    weights.

    Args:
      parameters: of `found`.
      found, wanted: equal except for `context_frames` and fields of training only.

    Raises:
      ValueError: configurations that differ in something else.
    """
    of_training = {name: getattr(wanted, name) for name in ("dropout", "commitment", "remat")}
    if found.replace(context_frames=wanted.context_frames, **of_training) != wanted:
        raise ValueError("tokenizers that differ in more than context_frames: train a new one.")
    added = wanted.context_frames - found.context_frames
    flat = flatten(parameters)
    for path, value in flat.items():
        if path.endswith("context_positions"):
            rows = value.shape[0] // found.context_frames
            flat[path] = jnp.concatenate([*[value[:rows]] * added, value]) if added > 0 else value[-added * rows :]
    return unflatten(flat)


def adapt_transformer(
    parameters: Mapping[str, Any], found: FrameTransformerConfig, wanted: FrameTransformerConfig
) -> dict[str, Any]:
    """The parameters that `wanted` shares with `found`; heads that differ are left out, to be initialized anew.

    A new action projection and new embeddings of places are zero: the model starts as the one that it was.

    Raises:
      ValueError: configurations that differ in more than their heads and fields of training.
    """
    if found.replace(**{name: getattr(wanted, name) for name in TRANSFORMER_FIELDS}) != wanted:
        raise ValueError("transformers that differ in more than their heads: train a new one.")
    kept = {"action": found.action_width == wanted.action_width, "reward": wanted.reward}
    kept["place"] = found.tokens_per_frame == wanted.tokens_per_frame
    kept["action_reconstruction"] = wanted.action_reconstruction and kept["action"]
    return {name: value for name, value in parameters.items() if kept.get(name, True)}
