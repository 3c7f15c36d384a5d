"""Names and layouts of the byte encoder in safetensors: our own names, kernels in the layout of torch."""

from collections.abc import Mapping
from typing import Any

from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.weight_map import IDENTITY, LAYER, LINEAR, Entry, WeightMap

CLASS_NAME = "ByteTextEncoder"


def weight_map(config: ByteTextConfig) -> WeightMap:
    """Names of a PyTorch port, which does not exist yet."""
    layers, block = "blocks/layers/", f"blocks.{LAYER}."
    entries = [Entry("embedding/table", "embedding.weight")]
    for name in ("attention_norm", "feed_forward_norm"):
        entries += _pair(f"{layers}{name}", f"{block}{name}", "scale")
    for name in ("query", "key", "value", "output", "feed_forward/hidden", "feed_forward/output"):
        entries += _pair(f"{layers}{name}", f"{block}{name.replace('/', '.')}", "kernel")
    return WeightMap((*entries, *_pair("final_norm", "final_norm", "scale")))


def _pair(ours: str, theirs: str, kind: str) -> tuple[Entry, Entry]:
    transform = LINEAR if kind == "kernel" else IDENTITY
    return Entry(f"{ours}/{kind}", f"{theirs}.weight", transform), Entry(f"{ours}/bias", f"{theirs}.bias")


def to_diffusers_config(config: ByteTextConfig) -> dict[str, Any]:
    """The `config.json` beside the weights."""
    return {
        "_class_name": CLASS_NAME,
        "width": config.width,
        "layers": config.layers,
        "heads": config.heads,
        "feed_forward_ratio": config.feed_forward_ratio,
        "norm_epsilon": config.norm_epsilon,
    }


def from_diffusers_config(values: Mapping[str, Any]) -> ByteTextConfig:
    """The configuration written by `to_diffusers_config`.

    Raises:
      ValueError: fields are missing.
    """
    names = ("width", "layers", "heads", "feed_forward_ratio", "norm_epsilon")
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"config.json of a byte text encoder lacks {', '.join(missing)}.")
    return ByteTextConfig(**{name: values[name] for name in names})
