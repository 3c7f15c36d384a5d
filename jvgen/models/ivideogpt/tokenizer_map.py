"""Names and layouts of the released tokenizer (`CompressiveVQModel`), and its config.json."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jvgen.models.image_vae.torch_map import weight_map as autoencoder_map
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.models.weight_map import LINEAR, Entry, Transform, WeightMap, fused, pointwise

CLASS_NAME = "CompressiveVQModel"
# Keys that other programs read; the network uses none of them.
INERT = {"scaling_factor": 0.18215, "norm_type": "group", "lookup_from_codebook": True, "force_upcast": True}
# Ours -> theirs, of the encoder and decoder that attend to a context.
PREDICTION = {"encoder": ("prediction_encoder", "cond_encoder"), "decoder": ("prediction_decoder", "cond_decoder")}


def tokenizer_map(config: CompressiveTokenizerConfig) -> WeightMap:
    """The table between `CompressiveTokenizer` and the released `CompressiveVQModel`."""
    entries = list(autoencoder_map(config.backbone(mid_attention=config.context_mid_attention)).entries)
    for entry in autoencoder_map(config.backbone(mid_attention=True)).entries:
        half = entry.ours.split("/")[0]
        ours, theirs = PREDICTION[half]
        entries.append(
            dataclasses.replace(
                entry,
                ours=entry.ours.replace(half, ours, 1),
                theirs=entry.theirs.replace(half, theirs, 1),
                aliases=tuple(alias.replace(half, theirs, 1) for alias in entry.aliases),
            )
        )
    for half, sites in (("encoder", config.encoder_sites()), ("decoder", config.decoder_sites())):
        ours, theirs = PREDICTION[half]
        for number in range(len(sites)):
            entries += _site(f"{ours}/sites/{number}", f"{theirs}.cross_att_blocks.{number}")
    entries += _layer("to_context_code", "quant_conv", pointwise(2))
    entries += _layer("from_context_code", "post_quant_conv", pointwise(2))
    entries += _layer("to_future_code", "quant_linear", LINEAR)
    entries += _layer("from_future_code", "post_quant_linear", LINEAR)
    entries.append(Entry("context_codebook/table", "quantize.embedding.weight"))
    entries.append(Entry("future_codebook/table", "dynamics_quantize.embedding.weight"))
    return WeightMap(tuple(entries))


def _layer(ours: str, theirs: str, transform: Transform) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/kernel", f"{theirs}.weight", transform), Entry(f"{ours}/bias", f"{theirs}.bias")


def _site(ours: str, theirs: str) -> Iterator[Entry]:
    projections = ("query", "key", "value")
    yield from fused(f"{theirs}.att.in_proj_weight", {name: f"{ours}/{name}/kernel" for name in projections}, LINEAR)
    yield from fused(f"{theirs}.att.in_proj_bias", {name: f"{ours}/{name}/bias" for name in projections})
    yield from _layer(f"{ours}/output", f"{theirs}.att.out_proj", LINEAR)
    for name, their_name in (("context", "kv"), ("query", "q")):
        yield Entry(f"{ours}/{name}_positions", f"{theirs}.{their_name}_pos_emb")
        yield Entry(f"{ours}/{name}_norm/scale", f"{theirs}.{their_name}_norm.weight")
        yield Entry(f"{ours}/{name}_norm/bias", f"{theirs}.{their_name}_norm.bias")


def tokenizer_to_json(config: CompressiveTokenizerConfig) -> dict[str, Any]:
    """Contents of config.json, as the released code reads it."""
    levels = len(config.block_channels)
    return {
        "_class_name": CLASS_NAME,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "sample_size": config.resolution,
        "num_vq_embeddings": config.context_codes,
        "norm_num_groups": config.groups,
        "vq_embed_dim": config.code_width,
        "mid_block_add_attention": config.context_mid_attention,
        "num_dyn_embeddings": config.future_codes,
        "context_length": config.context_frames,
        "max_att_resolution": config.attention_side,
        "att_norm_groups": config.attention_groups,
        "resolution": config.resolution,
        "patch_size": config.patch,
        **INERT,
    }


def tokenizer_from_json(values: Mapping[str, Any]) -> CompressiveTokenizerConfig:
    """The configuration that a config.json of the released code describes; missing keys have that code's defaults.

    Raises:
      ValueError: a value that this network does not support, or missing keys without a default.
    """
    for name, rule in (("act_fn", "silu"), ("norm_type", "group")):
        if values.get(name, rule) != rule:
            raise ValueError(f"config.json: {name} = {values[name]!r}: this tokenizer needs it to be {rule!r}.")
    for name, rule in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(kind != rule for kind in values.get(name, ())):
            raise ValueError(f"config.json: {name} = {values[name]!r}: this tokenizer has blocks of type {rule} only.")
    if values.get("in_channels", 3) != values.get("out_channels", 3):
        raise ValueError("config.json: in_channels and out_channels differ; this tokenizer needs them equal.")
    missing = [name for name in ("block_out_channels", "latent_channels", "num_vq_embeddings") if name not in values]
    if missing:
        raise ValueError(f"config.json of a compressive tokenizer lacks {', '.join(missing)}.")
    config = CompressiveTokenizerConfig(
        resolution=values.get("resolution", 256),
        channels=values.get("in_channels", 3),
        block_channels=tuple(values["block_out_channels"]),
        layers_per_block=values.get("layers_per_block", 1),
        groups=values.get("norm_num_groups", 32),
        latent_channels=values["latent_channels"],
        code_width=values.get("vq_embed_dim") or values["latent_channels"],
        context_codes=values["num_vq_embeddings"],
        future_codes=values.get("num_dyn_embeddings", 256),
        context_frames=values.get("context_length", 1),
        patch=values.get("patch_size", 4),
        attention_side=values.get("max_att_resolution", 32),
        attention_groups=values.get("att_norm_groups", 32),
        context_mid_attention=values.get("mid_block_add_attention", True),
    )
    config.validate()
    return config
