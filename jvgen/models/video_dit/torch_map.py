"""Names and layouts of the denoiser's parameters in PyTorch: in diffusers, and in the released training code (SAT)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from einops import rearrange

from jvgen.models.video_dit.config import AggregationConfig, GateKind, Positions, VideoDiTConfig
from jvgen.models.weight_map import IDENTITY, LAYER, LINEAR, Entry, Part, Transform, WeightMap, fused
from jvgen.nn.embeddings import sincos_positions
from jvgen.nn.rope import RotaryGrid, rotation

BLOCK = "blocks/layers/"
# In config.json; diffusers, which has one epsilon for all norms over the width, ignores keys that begin like this.
OUTPUT_EPSILON = "_output_norm_epsilon"
SAT_PERIOD = 6
# Suffix of a tensor that is in every file of the SAT code, and in no file of diffusers.
SAT_MARK = "transformer.layers.0.attention.query_key_value.weight"
# Stem of the files with RepVideo's gates, beside the weights for diffusers.
EXTRA_WEIGHTS = "repvideo_gates"
MODULATION_CHUNKS = tuple(
    f"{rows}_{branch}_{what}"
    for rows in ("video", "text")
    for branch in ("attention", "feed_forward")
    for what in ("shift", "scale", "gate")
)


def weight_map(config: VideoDiTConfig) -> WeightMap:
    """Names in `CogVideoXTransformer3DModel`."""
    block = f"transformer_blocks.{LAYER}."
    attention = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}
    entries = [
        *_linear("patch_embedding/projection", "patch_embed.proj", kernel=_patch_kernel(config)),
        *_linear("text_projection", "patch_embed.text_proj"),
        *_embedding_layers("timestep_embedding", "time_embedding.linear_1", "time_embedding.linear_2"),
    ]
    if config.offset_width is not None:
        entries += _embedding_layers("offset_embedding", "ofs_embedding.linear_1", "ofs_embedding.linear_2")
    if config.positions is Positions.ROTARY_AND_LEARNED:
        entries.append(Entry("learned_positions", "patch_embed.pos_embedding", BATCH_OF_ONE))
    for ours, theirs in (("attention", "norm1"), ("feed_forward", "norm2")):
        entries += _linear(f"{BLOCK}{ours}_modulation/vectors/projection", f"{block}{theirs}.linear")
        entries += _norm(f"{BLOCK}{ours}_norm", f"{block}{theirs}.norm")
    for ours, theirs in attention.items():
        entries += _linear(f"{BLOCK}attention/{ours}", f"{block}attn1.{theirs}")
    entries += [
        *_norm(f"{BLOCK}attention/query_norm", f"{block}attn1.norm_q"),
        *_norm(f"{BLOCK}attention/key_norm", f"{block}attn1.norm_k"),
        *_linear(f"{BLOCK}feed_forward/hidden", f"{block}ff.net.0.proj"),
        *_linear(f"{BLOCK}feed_forward/output", f"{block}ff.net.2"),
        *_norm("final_norm", "norm_final"),
        *_linear("output_modulation/projection", "norm_out.linear"),
        *_norm("output_norm", "norm_out.norm"),
        *_linear("output", "proj_out", kernel=_output_kernel(config), bias=_output_bias(config)),
    ]
    return WeightMap(tuple(entries))


def weight_map_for_names(config: VideoDiTConfig, names: Iterable[str]) -> WeightMap:
    """The table of names in diffusers or, if one of the names occurs only in the SAT code, in that code."""
    for name in names:
        if name.endswith(SAT_MARK):
            return weight_map_sat(config, prefix=name.removesuffix(SAT_MARK))
    return weight_map(config)


def extra_weight_map(config: VideoDiTConfig) -> WeightMap | None:
    """Table of the parameters that the class in diffusers does not have: RepVideo's gates."""
    return None if config.aggregation is None else WeightMap((Entry("aggregation/gates", "learnable_gating"),))


def extra_weights_json(config: VideoDiTConfig) -> dict[str, Any]:
    """Description of the gates, and the epsilon that `config.json` of diffusers has no field for."""
    return {
        "period": config.aggregation.period,
        "gate": config.aggregation.gate.value,
        "output_norm_epsilon": config.output_norm_epsilon,
    }


def with_extra_weights(config: VideoDiTConfig, values: dict[str, Any]) -> VideoDiTConfig:
    """A config with the values of `extra_weights_json`."""
    aggregation = AggregationConfig(period=int(values["period"]), gate=GateKind(values["gate"]))
    return config.replace(aggregation=aggregation, output_norm_epsilon=float(values["output_norm_epsilon"]))


def weight_map_sat(config: VideoDiTConfig, prefix: str = "model.diffusion_model.") -> WeightMap:
    """Names in the SAT code, which CogVideoX and RepVideo were trained with and released for.

    A 12-fold modulation per layer there is two modulations here; queries, keys and values are fused there; the fixed
    tables of positions are skipped. RepVideo's gates are `transformer.learnable_gating`: required with aggregation, an
    error without.

    Args:
      config: of the network.
      prefix: of every name; "model.diffusion_model." in released files.

    Raises:
      ValueError: a kind of gate, a period or rotary positions that the SAT code does not support.
    """
    # Without temporal_patch its positions are those of the base grid alone, where both kinds are equal.
    if config.temporal_patch is not None:
        _check_rotary_grid(config, "the SAT code")
    layer, mixins = f"{prefix}transformer.layers.{LAYER}.", f"{prefix}mixins."
    adaln, final = f"{mixins}adaln_layer.", f"{mixins}final_layer."
    entries = [
        *_linear("patch_embedding/projection", f"{mixins}patch_embed.proj", kernel=_patch_kernel(config)),
        *_linear("text_projection", f"{mixins}patch_embed.text_proj"),
        *_embedding_layers("timestep_embedding", f"{prefix}time_embed.0", f"{prefix}time_embed.2"),
    ]
    if config.offset_width is not None:
        entries += _embedding_layers("offset_embedding", f"{prefix}ofs_embed.0", f"{prefix}ofs_embed.2")
    if config.positions is Positions.ROTARY_AND_LEARNED:
        entries.append(Entry("learned_positions", f"{mixins}pos_embed.pos_embedding", BATCH_OF_ONE))
    for branch in ("attention", "feed_forward"):
        part = Part(tuple(name for name in MODULATION_CHUNKS if f"_{branch}_" in name), MODULATION_CHUNKS)
        ours, theirs = f"{BLOCK}{branch}_modulation/vectors/projection", f"{adaln}adaLN_modulations.{LAYER}.1"
        entries.append(Entry(f"{ours}/kernel", f"{theirs}.weight", LINEAR, theirs_part=part))
        entries.append(Entry(f"{ours}/bias", f"{theirs}.bias", theirs_part=part))
    for kind, suffix, transform in (("kernel", "weight", LINEAR), ("bias", "bias", IDENTITY)):
        pieces = {name: f"{BLOCK}attention/{name}/{kind}" for name in ("query", "key", "value")}
        entries += fused(f"{layer}attention.query_key_value.{suffix}", pieces, transform)
    entries += [
        *_norm(f"{BLOCK}attention_norm", f"{layer}input_layernorm"),
        *_norm(f"{BLOCK}feed_forward_norm", f"{layer}post_attention_layernorm"),
        *_norm(f"{BLOCK}attention/query_norm", f"{adaln}query_layernorm_list.{LAYER}"),
        *_norm(f"{BLOCK}attention/key_norm", f"{adaln}key_layernorm_list.{LAYER}"),
        *_linear(f"{BLOCK}attention/output", f"{layer}attention.dense"),
        *_linear(f"{BLOCK}feed_forward/hidden", f"{layer}mlp.dense_h_to_4h"),
        *_linear(f"{BLOCK}feed_forward/output", f"{layer}mlp.dense_4h_to_h"),
        *_norm("final_norm", f"{prefix}transformer.final_layernorm"),
        *_linear("output_modulation/projection", f"{final}adaLN_modulation.1"),
        *_norm("output_norm", f"{final}norm_final"),
        *_linear("output", f"{final}linear", kernel=_output_kernel(config), bias=_output_bias(config)),
    ]
    if config.aggregation is not None:
        _check_sat_aggregation(config.aggregation)
        entries.append(Entry("aggregation/gates", f"{prefix}transformer.learnable_gating"))
    skipped = [r"mixins\.pos_embed\.freqs_(sin|cos)"]
    if config.positions is not Positions.ROTARY_AND_LEARNED:
        skipped.append(r"mixins\.pos_embed\.pos_embedding")
    escaped = prefix.replace(".", r"\.")
    # Released files may also contain the VAE and the text encoder.
    others = (r"first_stage_model\..*", r"conditioner\..*") if prefix else ()
    return WeightMap(tuple(entries), ignored=(*(f"{escaped}{name}" for name in skipped), *others))


def sat_tables(config: VideoDiTConfig, prefix: str = "model.diffusion_model.") -> dict[str, np.ndarray]:
    """Fixed tables of positions that the SAT code stores with its weights and requires when it loads them.

    For the clip size of the config. Rows of text have no position. None for CogVideoX 1.5, whose code keeps its rotary
    tables out of its files.
    """
    if config.temporal_patch is not None and config.positions is not Positions.SINCOS:
        return {}
    frames, (rows, columns) = config.sample_frames // (config.temporal_patch or 1), config.base_grid
    grid, name = (frames, rows, columns), f"{prefix}mixins.pos_embed."
    if config.positions is Positions.SINCOS:
        video = sincos_positions(
            grid,
            config.width,
            spatial_scale=config.spatial_scale,
            column_scale=config.column_scale,
            temporal_scale=config.temporal_scale,
        )
        whole = np.concatenate([np.zeros((config.text_length, config.width), np.float32), np.asarray(video)])
        return {f"{name}pos_embedding": whole[None]}
    turn = rotation(grid, head_width=config.head_width, kind=config.rotary_grid, base=config.base_grid)
    return {f"{name}freqs_sin": np.asarray(turn.sine), f"{name}freqs_cos": np.asarray(turn.cosine)}


def _check_sat_aggregation(aggregation: AggregationConfig) -> None:
    if aggregation.gate is not GateKind.SCALAR or aggregation.period != SAT_PERIOD:
        raise ValueError(
            f"aggregation.gate = {aggregation.gate.value}, period = {aggregation.period}: the SAT code has gates of "
            f"kind scalar and a period of {SAT_PERIOD} only, so it cannot load this network."
        )


def stored_rotary_grid(config: VideoDiTConfig) -> RotaryGrid:
    """The positions that diffusers and the SAT code compute for a network; no file says them."""
    return RotaryGrid.LINSPACE if config.temporal_patch is None else RotaryGrid.SLICE


def depends_on_rotary_grid(config: VideoDiTConfig) -> bool:
    """Whether `rotary_grid` matters: learned positions allow the base grid alone, where both kinds are equal."""
    return config.positions is Positions.ROTARY


def _check_rotary_grid(config: VideoDiTConfig, reader: str) -> None:
    stored = stored_rotary_grid(config)
    if depends_on_rotary_grid(config) and config.rotary_grid is not stored:
        raise ValueError(
            f"rotary_grid = {config.rotary_grid.value}, temporal_patch = {config.temporal_patch or 'none'}: {reader} "
            f"has the positions {stored.value} with this temporal_patch, so it would compute another network; set "
            f"rotary_grid to {stored.value} before training."
        )


def to_diffusers_config(config: VideoDiTConfig) -> dict[str, Any]:
    """The `config.json` of `CogVideoXTransformer3DModel`.

    Raises:
      ValueError: a value that this class does not support.
    """
    fixed = {"feed_forward_ratio": 4, "query_key_epsilon": 1e-6}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} = {getattr(config, name)}: diffusers supports {value} only, so it cannot load this network."
            )
    if config.column_scale not in (None, config.spatial_scale):
        raise ValueError(
            f"column_scale = {config.column_scale}, spatial_scale = {config.spatial_scale}: diffusers has one scale "
            "for rows and columns, so it cannot load this network."
        )
    _check_rotary_grid(config, "diffusers")
    # Gates have it in a file of their own.
    epsilon_differs = config.aggregation is None and config.output_norm_epsilon != config.norm_epsilon
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": config.condition_width,
        "ofs_embed_dim": config.offset_width,
        "text_embed_dim": config.text_width,
        "num_layers": config.layers,
        "dropout": 0.0,
        "attention_bias": True,
        "sample_width": config.sample_width,
        "sample_height": config.sample_height,
        "sample_frames": (config.sample_frames - 1) * config.temporal_compression + 1,
        "patch_size": config.patch,
        "patch_size_t": config.temporal_patch,
        "temporal_compression_ratio": config.temporal_compression,
        "max_text_seq_length": config.text_length,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": config.norm_epsilon,
        "spatial_interpolation_scale": config.spatial_scale,
        "temporal_interpolation_scale": config.temporal_scale,
        "use_rotary_positional_embeddings": config.positions is not Positions.SINCOS,
        "use_learned_positional_embeddings": config.positions is Positions.ROTARY_AND_LEARNED,
        "patch_bias": config.temporal_patch is None,
        **({OUTPUT_EPSILON: config.output_norm_epsilon} if epsilon_differs else {}),
    }


def from_diffusers_config(values: dict[str, Any]) -> VideoDiTConfig:
    """The configuration that a `config.json` of `CogVideoXTransformer3DModel` describes.

    Raises:
      ValueError: values that this network does not support; all are listed.
    """
    required = {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
    }
    wrong = [f"{k} = {values[k]!r} (must be {v!r})" for k, v in required.items() if values.get(k, v) != v]
    if values.get("patch_size_t") is None and not values.get("patch_bias", True):
        wrong.append("patch_bias = False (must be True without patch_size_t)")
    if wrong:
        raise ValueError(f"config.json describes a network that is not supported: {'; '.join(wrong)}.")
    default = VideoDiTConfig()
    compression = values.get("temporal_compression_ratio", default.temporal_compression)
    temporal_patch = values.get("patch_size_t")
    positions = Positions.SINCOS
    if values.get("use_rotary_positional_embeddings", False):
        learned = values.get("use_learned_positional_embeddings", False)
        positions = Positions.ROTARY_AND_LEARNED if learned else Positions.ROTARY
    epsilon = float(values.get("norm_eps", default.norm_epsilon))
    return VideoDiTConfig(
        layers=values.get("num_layers", default.layers),
        heads=values.get("num_attention_heads", default.heads),
        head_width=values.get("attention_head_dim", default.head_width),
        in_channels=values.get("in_channels", default.in_channels),
        out_channels=values.get("out_channels") or default.out_channels,
        patch=values.get("patch_size", default.patch),
        temporal_patch=temporal_patch,
        text_width=values.get("text_embed_dim", default.text_width),
        text_length=values.get("max_text_seq_length", default.text_length),
        condition_width=values.get("time_embed_dim", default.condition_width),
        offset_width=values.get("ofs_embed_dim"),
        positions=positions,
        rotary_grid=RotaryGrid.LINSPACE if temporal_patch is None else RotaryGrid.SLICE,
        sample_height=values.get("sample_height", default.sample_height),
        sample_width=values.get("sample_width", default.sample_width),
        sample_frames=(values.get("sample_frames", 49) - 1) // compression + 1,
        spatial_scale=float(values.get("spatial_interpolation_scale", default.spatial_scale)),
        temporal_scale=float(values.get("temporal_interpolation_scale", default.temporal_scale)),
        temporal_compression=compression,
        norm_epsilon=epsilon,
        output_norm_epsilon=float(values.get(OUTPUT_EPSILON, epsilon)),
    )


BATCH_OF_ONE = Transform("batch_of_one", lambda array: array[None], lambda array: array[0])


def _linear(ours: str, theirs: str, *, kernel: Transform = LINEAR, bias: Transform = IDENTITY) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/kernel", f"{theirs}.weight", kernel), Entry(f"{ours}/bias", f"{theirs}.bias", bias)


def _norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")


def _embedding_layers(ours: str, first: str, second: str) -> list[Entry]:
    return [*_linear(f"{ours}/hidden", first), *_linear(f"{ours}/output", second)]


def _rearranged(name: str, ours: str, theirs: str, **sizes: int) -> Transform:
    return Transform(
        name,
        lambda array: rearrange(array, f"{ours} -> {theirs}", **sizes),
        lambda array: rearrange(array, f"{theirs} -> {ours}", **sizes),
    )


def _patch_sizes(config: VideoDiTConfig) -> dict[str, int]:
    frames, rows, columns = config.patch_shape
    return {"t": frames, "r": rows, "c": columns}


def _patch_kernel(config: VideoDiTConfig) -> Transform:
    """Channels are fastest here; diffusers has a convolution for single frames (1.0), or a linear layer (1.5)."""
    if config.temporal_patch is None:
        sizes = {"r": config.patch, "c": config.patch}
        return _rearranged("patch_convolution", "(r c x) d", "d x r c", **sizes)
    return _rearranged("patch_linear", "(t r c x) d", "d (x t r c)", **_patch_sizes(config))


def _output_kernel(config: VideoDiTConfig) -> Transform:
    return _rearranged("output_patch", "d (t r c x)", "(x t r c) d", **_patch_sizes(config))


def _output_bias(config: VideoDiTConfig) -> Transform:
    return _rearranged("output_patch_bias", "(t r c x)", "(x t r c)", **_patch_sizes(config))
