"""Names and layouts of the released transformers: a plain `LlamaForCausalLM`, or one in a wrapper with more heads."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.weight_map import LAYER, LINEAR, Entry, WeightMap

CLASS_NAME = "LlamaForCausalLM"
# Prefix of the Llama inside the wrapper.
WRAPPED = "llm."
HEADS = {"action": "action_linear", "reward": "reward_linear", "action_reconstruction": "action_recon_linear"}
# No part of the released wrapper.
PLACE = "place_embedding"
# Outside every vocabulary on purpose: no id ends a sequence.
NO_TOKEN = 50256


def transformer_map(config: FrameTransformerConfig) -> WeightMap:
    """The table between `FrameTransformer` and the released files.

    Without heads for actions and rewards the names are those of transformers' Llama; with them, those of the wrapper.
    """
    heads = {"action": config.action_width, "reward": config.reward}
    heads["action_reconstruction"] = config.action_reconstruction
    prefix = WRAPPED if any(heads.values()) or config.tokens_per_frame else ""
    block, layers = f"{prefix}model.layers.{LAYER}.", "blocks/layers/"
    entries = [
        Entry("embedding/table", f"{prefix}model.embed_tokens.weight"),
        Entry("final_norm/scale", f"{prefix}model.norm.weight"),
        Entry("head/kernel", f"{prefix}lm_head.weight", LINEAR),
        Entry(f"{layers}attention_norm/scale", f"{block}input_layernorm.weight"),
        Entry(f"{layers}feed_forward_norm/scale", f"{block}post_attention_layernorm.weight"),
    ]
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
        entries.append(Entry(f"{layers}attention/{ours}/kernel", f"{block}self_attn.{theirs}_proj.weight", LINEAR))
    for ours, theirs in {"gate": "gate", "hidden": "up", "output": "down"}.items():
        entries.append(Entry(f"{layers}feed_forward/{ours}/kernel", f"{block}mlp.{theirs}_proj.weight", LINEAR))
    for name, present in heads.items():
        if present:
            entries.append(Entry(f"{name}/kernel", f"{HEADS[name]}.weight", LINEAR))
            entries.append(Entry(f"{name}/bias", f"{HEADS[name]}.bias"))
    if config.tokens_per_frame is not None:
        entries.append(Entry("place/table", f"{PLACE}.weight"))
    return WeightMap(tuple(entries), ignored=(r".*rotary_emb\.inv_freq",))


def transformer_to_json(config: FrameTransformerConfig) -> dict[str, Any]:
    """Contents of config.json: the keys that transformers reads, and which heads the file has."""
    return {
        "architectures": [CLASS_NAME],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": NO_TOKEN,
        "eos_token_id": NO_TOKEN,
        "action_dim": config.action_width,
        "reward_prediction": config.reward,
        "action_recon": config.action_reconstruction,
        **({} if config.tokens_per_frame is None else {"tokens_per_frame": list(config.tokens_per_frame)}),
        **({"action_everywhere": True} if config.action_everywhere else {}),
    }


def transformer_from_json(values: Mapping[str, Any]) -> FrameTransformerConfig:
    """The configuration that a config.json of a Llama describes; missing keys have transformers' defaults.

    The config.json of released files does not list their heads: see `heads_in`.

    Raises:
      ValueError: a variant of Llama that this transformer does not support.
    """
    heads = values.get("num_attention_heads", 32)
    width = values.get("hidden_size", 4096)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rules = {
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "num_key_value_heads": (values.get("num_key_value_heads") or heads, heads),
        "head_dim": ((values.get("head_dim") or width // heads) * heads, width),
        "attention_bias": (values.get("attention_bias", False), False),
        "mlp_bias": (values.get("mlp_bias", False), False),
        "tie_word_embeddings": (values.get("tie_word_embeddings", False), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    wrong = [f"{name} = {values.get(name, found)!r}" for name, (found, rule) in rules.items() if found != rule]
    if wrong:
        raise ValueError(
            f"config.json: {', '.join(wrong)}: this transformer is a Llama with as many key heads as heads, SiLU, no "
            "biases, untied embeddings and plain rotary positions."
        )
    config = FrameTransformerConfig(
        vocabulary=values.get("vocab_size", 32000),
        width=width,
        layers=values.get("num_hidden_layers", 32),
        heads=heads,
        hidden=values.get("intermediate_size", 11008),
        max_positions=values.get("max_position_embeddings", 2048),
        action_width=values.get("action_dim", 0),
        reward=bool(values.get("reward_prediction", False)),
        action_reconstruction=bool(values.get("action_recon", False)),
        tokens_per_frame=None if values.get("tokens_per_frame") is None else tuple(values["tokens_per_frame"]),
        action_everywhere=bool(values.get("action_everywhere", False)),
        attention_dropout=float(values.get("attention_dropout", 0.0)),
        norm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
    )
    config.validate()
    return config


def heads_in(names: Iterable[str], shape_of: Callable[[str], tuple[int, ...]]) -> dict[str, Any]:
    """Keys of config.json that follow from a file's tensors: the width of an action, and which heads it has."""
    present = set(names)
    action = f"{HEADS['action']}.weight"
    return {
        "action_dim": int(shape_of(action)[1]) if action in present else 0,
        "reward_prediction": f"{HEADS['reward']}.weight" in present,
        "action_recon": f"{HEADS['action_reconstruction']}.weight" in present,
    }
