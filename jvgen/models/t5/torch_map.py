"""Names and layouts of the T5 encoder's parameters in transformers."""

from collections.abc import Mapping
from typing import Any

from jvgen.models.t5.config import T5Config
from jvgen.models.weight_map import LAYER, LINEAR, Entry, WeightMap

BLOCK = f"encoder.block.{LAYER}.layer."


def weight_map(config: T5Config) -> WeightMap:
    """Names in `T5EncoderModel`; the decoder of a complete T5 is skipped."""
    attention, feed_forward = f"{BLOCK}0.SelfAttention.", f"{BLOCK}1.DenseReluDense."
    layers = "blocks/layers/"
    entries = [
        Entry("embedding/table", "shared.weight", aliases=("encoder.embed_tokens.weight",)),
        Entry("position_bias/table", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Entry(f"{layers}attention_norm/scale", f"{BLOCK}0.layer_norm.weight"),
        Entry(f"{layers}feed_forward_norm/scale", f"{BLOCK}1.layer_norm.weight"),
        Entry("final_norm/scale", "encoder.final_layer_norm.weight"),
    ]
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
        entries.append(Entry(f"{layers}attention/{ours}/kernel", f"{attention}{theirs}.weight", LINEAR))
    for ours, theirs in {"gate": "wi_0", "hidden": "wi_1", "output": "wo"}.items():
        entries.append(Entry(f"{layers}feed_forward/{ours}/kernel", f"{feed_forward}{theirs}.weight", LINEAR))
    return WeightMap(tuple(entries), ignored=(r"decoder\..*", r"lm_head\..*"))


def to_diffusers_config(config: T5Config) -> dict[str, Any]:
    """The `config.json` of `transformers.T5EncoderModel`."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.hidden,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def from_diffusers_config(values: Mapping[str, Any]) -> T5Config:
    """The configuration that a `config.json` of a T5 v1.1 describes.

    Raises:
      ValueError: an older T5, without gated GELU in its feed-forward blocks.
    """
    kind = values.get("feed_forward_proj", "relu")
    if kind != "gated-gelu":
        raise ValueError(
            f"config.json: feed_forward_proj = {kind!r}; only T5 v1.1 and later ('gated-gelu') are supported."
        )
    default = T5Config()
    return T5Config(
        vocabulary=values.get("vocab_size", default.vocabulary),
        width=values.get("d_model", default.width),
        layers=values.get("num_layers", 6),
        heads=values.get("num_heads", 8),
        head_width=values.get("d_kv", default.head_width),
        hidden=values.get("d_ff", 2048),
        buckets=values.get("relative_attention_num_buckets", default.buckets),
        max_distance=values.get("relative_attention_max_distance", default.max_distance),
        norm_epsilon=float(values.get("layer_norm_epsilon", default.norm_epsilon)),
    )
