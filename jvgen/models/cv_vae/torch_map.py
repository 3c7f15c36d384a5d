"""Tensor names, layouts and config.json of CV-VAE: those of the two published PyTorch classes, and this library's own.

`CVVAEModel` (z = 4) has the names of CompVis's code, `CVVAESD3Model` those of diffusers' AutoencoderKL. Any other
network is written as `CVVAE` with diffusers' names, which no PyTorch class reads.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jvgen.models.cv_vae.config import GROUPS, CVVAEConfig
from jvgen.models.cv_vae.flat_fields import FLAT_NAMES, flatten_fields, group_fields
from jvgen.models.weight_map import CONV2D, CONV3D, LINEAR, Entry, Transform, WeightMap, pointwise

# A convolution over each frame: (1, H, W, I, O) <-> (O, I, H, W).
FRAME_CONV = Transform(
    "frame_conv", lambda array: CONV2D.to_torch(array[0]), lambda array: CONV2D.from_torch(array)[None]
)

# Other networks in the authors' training checkpoints.
_OTHER_NETWORKS = (r"loss\..*", r"constraint_decoder\..*", r"model_ema\..*")


@dataclasses.dataclass(frozen=True)
class Names:
    """One naming scheme: patterns with {level} and {block}, and the names of layers."""

    block: Mapping[str, str]
    resample: Mapping[str, str]
    mid: str
    norm_out: str
    shortcut: tuple[str, Transform]
    attention: Mapping[str, str]
    projection: Transform
    reversed_levels: bool


COMPVIS = Names(
    block={"encoder": "down.{level}.block.{block}", "decoder": "up.{level}.block.{block}"},
    resample={"encoder": "down.{level}.downsample.conv", "decoder": "up.{level}.upsample.conv"},
    mid="mid.block_{block}",
    norm_out="norm_out",
    shortcut=("nin_shortcut", pointwise(3)),
    attention={
        "": "mid.attn_1", "norm": "norm", "query": "q", "key": "k", "value": "v", "output": "proj_out",
        "temporal/norm": "norm_t", "temporal/query": "q_t", "temporal/key": "k_t", "temporal/value": "v_t",
        "temporal/output": "proj_out_t",
    },
    projection=pointwise(2),
    reversed_levels=True,
)  # fmt: skip
DIFFUSERS = Names(
    block={"encoder": "down_blocks.{level}.resnets.{block}", "decoder": "up_blocks.{level}.resnets.{block}"},
    resample={
        "encoder": "down_blocks.{level}.downsamplers.0.conv", "decoder": "up_blocks.{level}.upsamplers.0.conv",
    },
    mid="mid_block.resnets.{block}",
    norm_out="conv_norm_out",
    shortcut=("conv_shortcut", pointwise(2)),
    attention={
        "": "mid_block.attentions.0", "norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v",
        "output": "to_out.0", "temporal/norm": "temporal.norm", "temporal/query": "temporal.to_q",
        "temporal/key": "temporal.to_k", "temporal/value": "temporal.to_v", "temporal/output": "temporal.to_out",
    },
    projection=LINEAR,
    reversed_levels=False,
)  # fmt: skip


def weight_map(config: CVVAEConfig, class_name: str | None = None) -> WeightMap:
    """The table between `CVVAE` and a PyTorch class; default: `config.class_name`."""
    names = COMPVIS if (class_name or config.class_name) == "CVVAEModel" else DIFFUSERS
    entries: list[Entry] = []
    levels = len(config.block_channels)
    for part, layers in (("encoder", config.layers_per_block), ("decoder", config.layers_per_block + 1)):
        entries += _layer(f"{part}/conv_in", f"{part}.conv_in", CONV3D)
        widths = config.block_channels if part == "encoder" else config.block_channels[::-1]
        for level in range(levels):
            theirs = levels - 1 - level if part == "decoder" and names.reversed_levels else level
            for block in range(layers):
                changes = block == 0 and level > 0 and widths[level] != widths[level - 1]
                entries += _residual(
                    f"{part}/levels/{level}/blocks/{block}",
                    f"{part}." + names.block[part].format(level=theirs, block=block),
                    config,
                    names.shortcut if changes else None,
                )
            if level < levels - 1:
                resample = f"{part}." + names.resample[part].format(level=theirs)
                entries += _layer(f"{part}/levels/{level}/resample/conv", resample, CONV3D)
        for ours, number in (("first", 0), ("second", 1)):
            number += names is COMPVIS
            entries += _residual(f"{part}/mid/{ours}", f"{part}." + names.mid.format(block=number), config, None)
        if config.mid_attention:
            temporal = part == "decoder" and config.temporal_attention.kind != "none"
            entries += _attention(f"{part}/mid/attention", part, names, temporal=temporal)
        entries += _norm(f"{part}/norm_out", f"{part}.{names.norm_out}")
        entries += _layer(f"{part}/conv_out", f"{part}.conv_out", CONV3D)
    if config.quant_convolutions:
        entries += _layer("quant", "quant_conv", pointwise(2))
        entries += _layer("post_quant", "post_quant_conv", pointwise(2))
    return WeightMap(tuple(entries), ignored=_OTHER_NETWORKS)


def _layer(ours: str, theirs: str, transform: Transform) -> Iterator[Entry]:
    yield Entry(f"{ours}/kernel", f"{theirs}.weight", transform)
    yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", f"{theirs}.weight")
    yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _residual(ours: str, theirs: str, config: CVVAEConfig, shortcut: tuple[str, Transform] | None) -> Iterator[Entry]:
    second = CONV3D if config.full_3d else FRAME_CONV
    for index, transform in ((1, CONV3D), (2, second)):
        yield from _norm(f"{ours}/norm{index}", f"{theirs}.norm{index}")
        yield from _layer(f"{ours}/conv{index}", f"{theirs}.conv{index}", transform)
    if shortcut is not None:
        yield from _layer(f"{ours}/shortcut", f"{theirs}.{shortcut[0]}", shortcut[1])


def _attention(ours: str, part: str, names: Names, *, temporal: bool) -> Iterator[Entry]:
    theirs = f"{part}.{names.attention['']}"
    for name, their_name in names.attention.items():
        along_time = name.startswith("temporal/")
        if not name or (along_time and not temporal):
            continue
        if name.endswith("norm"):
            yield from _norm(f"{ours}/{name}", f"{theirs}.{their_name}")
        else:
            yield from _layer(f"{ours}/{name}", f"{theirs}.{their_name}", LINEAR if along_time else names.projection)


def to_diffusers_config(config: CVVAEConfig) -> dict[str, Any]:
    """The config.json of the class `config.class_name`; every field in its flat form for this library's own class."""
    tiling = {
        "en_de_n_frames_a_time": config.tile_frames,
        "time_n_compress": config.temporal_downsampling,
        "spatial_n_compress": config.downsampling,
        "tile_spatial_size": config.tile_size,
        "tile_overlap_ratio": config.tile_overlap,
        "half_3d": not config.full_3d,
        "causal_encoder": True,
        "causal_decoder": False,
        "double_z": True,
    }
    if config.class_name == "CVVAEModel":
        base = config.block_channels[0]
        return {
            "_class_name": "CVVAEModel",
            "z_channels": config.latent_channels,
            "in_channels": config.channels,
            "out_ch": config.channels,
            "ch": base,
            "ch_mult": [width // base for width in config.block_channels],
            "num_res_blocks": config.layers_per_block,
            "attn_resolutions": [],
            "dropout": 0.0,
            "use_3d_conv": True,
            "encoder_attn_type": "vanilla-xformers",
            "decoder_attn_type": "spatial-temporal-xformer",
            "scaling_factor": config.scaling_factor,
            **tiling,
        }
    if config.class_name == "CVVAESD3Model":
        levels = len(config.block_channels)
        return {
            "_class_name": "CVVAESD3Model",
            "in_channels": config.channels,
            "out_channels": config.latent_channels,
            "down_block_types": ["DownEncoderBlock3D"] * levels,
            "up_block_types": ["UpDecoderBlock3D"] * levels,
            "block_out_channels": list(config.block_channels),
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.groups,
            "act_fn": "silu",
            "mid_block_add_attention": config.mid_attention,
            **tiling,
        }
    fields = flatten_fields(config)
    return {
        "_class_name": "CVVAE",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
    }


def from_diffusers_config(values: Mapping[str, Any]) -> CVVAEConfig:
    """The configuration that a config.json describes; missing keys have the defaults of the class.

    Raises:
      ValueError: a key or value that no CVVAE has.
    """
    read = {"CVVAEModel": _from_sd21, "CVVAESD3Model": _from_sd3}.get(values.get("_class_name", "CVVAE"), _from_own)
    config = read(values)
    config.validate()
    return config


def _check(values: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
    for name, rule in rules.items():
        if values.get(name, rule) != rule:
            raise ValueError(f"config.json: {name} = {values[name]!r}: CVVAE needs it to be {rule!r}.")


def _tiling(values: Mapping[str, Any]) -> dict[str, Any]:
    _check(values, {"causal_encoder": True, "causal_decoder": False, "double_z": True, "num_video_frames": None})
    return {
        "tile_frames": values.get("en_de_n_frames_a_time", 16),
        "tile_size": values.get("tile_spatial_size", 576),
        "tile_overlap": values.get("tile_overlap_ratio", 0.2222),
        "full_3d": not values.get("half_3d", True),
    }


def _from_sd21(values: Mapping[str, Any]) -> CVVAEConfig:
    _check(
        values,
        {
            "dropout": 0.0, "attn_resolutions": [], "use_3d_conv": True, "encoder_attn_type": "vanilla-xformers",
            "decoder_attn_type": "spatial-temporal-xformer", "out_ch": values.get("in_channels", 3),
        },
    )  # fmt: skip
    base, factors = values.get("ch", 128), values.get("ch_mult", [1, 2, 4, 4])
    down = tuple(range(0, len(factors) - 1, 2))
    return CVVAEConfig.sd21().replace(
        channels=values.get("in_channels", 3),
        latent_channels=values.get("z_channels", 4),
        block_channels=tuple(base * factor for factor in factors),
        layers_per_block=values.get("num_res_blocks", 2),
        # Not an argument of the class, whose norms always have 32 groups.
        groups=values.get("norm_num_groups", 32),
        time_levels_down=down,
        time_levels_up=tuple(len(factors) - 2 - level for level in reversed(down)),
        scaling_factor=values.get("scaling_factor", 0.18215),
        **_tiling(values),
    )


def _from_sd3(values: Mapping[str, Any]) -> CVVAEConfig:
    _check(values, {"act_fn": "silu"})
    for name, rule in (("down_block_types", "DownEncoderBlock3D"), ("up_block_types", "UpDecoderBlock3D")):
        if any(kind != rule for kind in values.get(name, ())):
            raise ValueError(f"config.json: {name} = {values[name]!r}: CVVAE has blocks of type {rule} only.")
    widths = tuple(values.get("block_out_channels", (128, 256, 512, 512)))
    every_other = tuple(range(0, len(widths) - 1, 2))
    return CVVAEConfig.sd3().replace(
        channels=values.get("in_channels", 3),
        latent_channels=values.get("out_channels", 16),
        block_channels=widths,
        layers_per_block=values.get("layers_per_block", 2),
        groups=values.get("norm_num_groups", 32),
        mid_attention=values.get("mid_block_add_attention", True),
        time_levels_down=every_other,
        time_levels_up=every_other,
        **_tiling(values),
    )


def _from_own(values: Mapping[str, Any]) -> CVVAEConfig:
    unknown = sorted(set(values) - {*FLAT_NAMES, "_class_name"})
    if unknown:
        raise ValueError(f"config.json: CVVAE has no field {unknown[0]!r}; it has {', '.join(sorted(FLAT_NAMES))}.")
    flat = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "_class_name"}
    try:
        fields = group_fields(flat)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    return CVVAEConfig(**fields | {name: kind(**fields[name]) for name, kind in GROUPS.items() if name in fields})
