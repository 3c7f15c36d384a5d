"""Tensor names, layouts and config.json of diffusers' `AutoencoderKL`."""

from collections.abc import Iterator, Mapping
from typing import Any

from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.weight_map import CONV2D, LINEAR, Entry, Transform, WeightMap, pointwise

CLASS_NAME = "AutoencoderKL"

# Names of the attention's projections in files written before diffusers 0.17.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def weight_map(config: ImageVAEConfig) -> WeightMap:
    """The table between `ImageVAE` and `diffusers.AutoencoderKL`."""
    entries: list[Entry] = []
    levels = len(config.block_channels)
    parts = (("encoder", "down", config.layers_per_block), ("decoder", "up", config.layers_per_block + 1))
    for part, direction, layers in parts:
        entries += _layer(f"{part}/conv_in", f"{part}.conv_in", CONV2D)
        widths = config.block_channels if part == "encoder" else config.block_channels[::-1]
        for level in range(levels):
            ours, theirs = f"{part}/levels/{level}", f"{part}.{direction}_blocks.{level}"
            for layer in range(layers):
                changes = layer == 0 and level > 0 and widths[level] != widths[level - 1]
                entries += _residual(f"{ours}/blocks/{layer}", f"{theirs}.resnets.{layer}", shortcut=changes)
            if level < levels - 1:
                entries += _layer(f"{ours}/resample/conv", f"{theirs}.{direction}samplers.0.conv", CONV2D)
        entries += _mid(f"{part}/mid", f"{part}.mid_block", config)
        entries += _norm(f"{part}/norm_out", f"{part}.conv_norm_out")
        entries += _layer(f"{part}/conv_out", f"{part}.conv_out", CONV2D)
    if config.quant_convolutions:
        entries += _layer("quant", "quant_conv", pointwise(2))
        entries += _layer("post_quant", "post_quant_conv", pointwise(2))
    return WeightMap(tuple(entries))


def _layer(ours: str, theirs: str, transform: Transform, old: str | None = None) -> Iterator[Entry]:
    for name, tail, kind in (("kernel", "weight", transform), ("bias", "bias", None)):
        aliases = () if old is None else (f"{old}.{tail}",)
        yield Entry(f"{ours}/{name}", f"{theirs}.{tail}", *(() if kind is None else (kind,)), aliases=aliases)


def _norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", f"{theirs}.weight")
    yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _residual(ours: str, theirs: str, *, shortcut: bool) -> Iterator[Entry]:
    for index in (1, 2):
        yield from _norm(f"{ours}/norm{index}", f"{theirs}.norm{index}")
        yield from _layer(f"{ours}/conv{index}", f"{theirs}.conv{index}", CONV2D)
    if shortcut:
        yield from _layer(f"{ours}/shortcut", f"{theirs}.conv_shortcut", pointwise(2))


def _mid(ours: str, theirs: str, config: ImageVAEConfig) -> Iterator[Entry]:
    yield from _residual(f"{ours}/first", f"{theirs}.resnets.0", shortcut=False)
    yield from _residual(f"{ours}/second", f"{theirs}.resnets.1", shortcut=False)
    if config.mid_attention:
        attention = f"{theirs}.attentions.0"
        yield from _norm(f"{ours}/attention/norm", f"{attention}.group_norm")
        names = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}
        for name, their_name in names.items():
            old = f"{attention}.{_OLD_NAMES[their_name]}"
            yield from _layer(f"{ours}/attention/{name}", f"{attention}.{their_name}", LINEAR, old)


def to_diffusers_config(config: ImageVAEConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
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
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or None,
        "use_quant_conv": config.quant_convolutions,
        "use_post_quant_conv": config.quant_convolutions,
        "mid_block_add_attention": config.mid_attention,
    }


def from_diffusers_config(values: Mapping[str, Any]) -> ImageVAEConfig:
    """The configuration that a config.json of diffusers describes; missing keys have diffusers' defaults.

    Raises:
      ValueError: a value that this network does not support.
    """
    fixed = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
    for name, rule in fixed.items():
        if values.get(name, rule) != rule:
            raise ValueError(f"config.json: {name} = {values[name]!r}: ImageVAE needs it to be {rule!r}.")
    for name, rule in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(kind != rule for kind in values.get(name, ())):
            raise ValueError(f"config.json: {name} = {values[name]!r}: ImageVAE has blocks of type {rule} only.")
    for first, second in (("in_channels", "out_channels"), ("use_quant_conv", "use_post_quant_conv")):
        if values.get(first) != values.get(second):
            raise ValueError(f"config.json: {first} and {second} differ; ImageVAE needs them equal.")
    config = ImageVAEConfig(
        channels=values.get("in_channels", 3),
        latent_channels=values.get("latent_channels", 4),
        block_channels=tuple(values.get("block_out_channels", (64,))),
        layers_per_block=values.get("layers_per_block", 1),
        groups=values.get("norm_num_groups", 32),
        mid_attention=values.get("mid_block_add_attention", True),
        quant_convolutions=values.get("use_quant_conv", True),
        scaling_factor=values.get("scaling_factor", 0.18215),
        shift_factor=values.get("shift_factor") or 0.0,
        sample_size=values.get("sample_size", 32),
    )
    config.validate()
    return config
