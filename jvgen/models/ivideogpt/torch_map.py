"""The tables of this room's two networks, chosen by their configuration."""

from collections.abc import Callable
from typing import Any

from jvgen.models.ivideogpt import adapt, tokenizer_map, transformer_map
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.weight_map import WeightMap

Configs = CompressiveTokenizerConfig | FrameTransformerConfig


def weight_map(config: Configs) -> WeightMap:
    """Names and layouts of the released files."""
    if isinstance(config, CompressiveTokenizerConfig):
        return tokenizer_map.tokenizer_map(config)
    return transformer_map.transformer_map(config)


def to_diffusers_config(config: Configs) -> dict[str, Any]:
    """What config.json holds."""
    if isinstance(config, CompressiveTokenizerConfig):
        return tokenizer_map.tokenizer_to_json(config)
    return transformer_map.transformer_to_json(config)


def from_diffusers_config(values: dict[str, Any]) -> Configs:
    """Our configuration from config.json."""
    if values.get("_class_name") == tokenizer_map.CLASS_NAME:
        return tokenizer_map.tokenizer_from_json(values)
    return transformer_map.transformer_from_json(values)


def json_from_tensors(values: dict[str, Any], open_weights: Callable[[], Any]) -> dict[str, Any]:
    """Keys of config.json that the released files leave to their tensors.

    Args:
      values: the keys that are there.
      open_weights: gives a mapping of names with a method `shape`.
    """
    if values.get("_class_name") == tokenizer_map.CLASS_NAME or "action_dim" in values:
        return {}
    reader = open_weights()
    return transformer_map.heads_in(reader, reader.shape)


def adapt_parameters(parameters: dict[str, Any], found: Configs, wanted: Configs) -> dict[str, Any]:
    """Parameters of `found` for a network that differs in its context or its heads; see `adapt`."""
    if isinstance(wanted, CompressiveTokenizerConfig):
        return adapt.tokenizer_parameters(parameters, found, wanted)
    return adapt.transformer_parameters(parameters, found, wanted)
