"""Tensor names, layouts and config.json of diffusers' `AutoencoderKLCogVideoX`, and tensor names of SAT."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jvgen.models.cogvideox_vae.config import NORM_EPSILON, CogVideoXVAEConfig
from jvgen.models.weight_map import CONV2D, CONV3D, IDENTITY, Entry, Transform, WeightMap, pointwise

CLASS_NAME = "AutoencoderKLCogVideoX"
POINTWISE = pointwise(3)
# Suffix of a tensor that is in every file of the SAT code, and in no file of diffusers.
SAT_MARK = "encoder.mid.block_1.conv1.conv.weight"


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of the modules in one of the two code bases; SAT counts the decoder's levels from the finest."""

    level: Callable[[str, int], str]
    block: str
    resample: str
    mid: Callable[[int], str]
    shortcut: str


def weight_map(config: CogVideoXVAEConfig) -> WeightMap:
    """The table between `CogVideoXVAE` and `diffusers.AutoencoderKLCogVideoX`."""
    names = _Names(
        level=lambda direction, level: f"{direction}_blocks.{level}",
        block="resnets",
        resample="samplers.0",
        mid=lambda index: f"mid_block.resnets.{index}",
        shortcut="conv_shortcut",
    )
    return WeightMap(tuple(_entries(config, names)))


def weight_map_for_names(config: CogVideoXVAEConfig, names: Iterable[str]) -> WeightMap:
    """The table of names in diffusers or, if one of the names occurs only in the SAT code, in that code."""
    for name in names:
        if name.endswith(SAT_MARK):
            return weight_map_sat(config, prefix=name.removesuffix(SAT_MARK))
    return weight_map(config)


def weight_map_sat(config: CogVideoXVAEConfig, prefix: str = "") -> WeightMap:
    """The table between `CogVideoXVAE` and the weights file released with the training code (SAT).

    Args:
      config: of the network.
      prefix: of every name; "first_stage_model." in files of a whole pipeline.
    """
    finest = len(config.block_channels) - 1
    names = _Names(
        level=lambda direction, level: f"{direction}.{finest - level if direction == 'up' else level}",
        block="block",
        resample="sample",
        mid=lambda index: f"mid.block_{index + 1}",
        shortcut="nin_shortcut",
    )
    # The file also holds the discriminator and the perceptual network of its training.
    ignored = re.escape(prefix) + r"loss\..*"
    # Files of a whole pipeline hold the denoiser and the text encoder, too.
    others = (r"model\.diffusion_model\..*", r"conditioner\..*") if prefix else ()
    return WeightMap(tuple(_entries(config, names, prefix)), ignored=(ignored, *others))


def _entries(config: CogVideoXVAEConfig, names: _Names, prefix: str = "") -> Iterator[Entry]:
    parts = (("encoder", "down", config.layers_per_block), ("decoder", "up", config.layers_per_block + 1))
    for part, direction, layers in parts:
        root, conditioned = f"{prefix}{part}", part == "decoder"
        widths = config.block_channels[::-1] if conditioned else config.block_channels
        yield from _layer(f"{part}/conv_in", f"{root}.conv_in.conv", CONV3D)
        for level in range(len(widths)):
            ours, theirs = f"{part}/levels/{level}", f"{root}.{names.level(direction, level)}"
            for layer in range(layers):
                shortcut = names.shortcut if layer == 0 < level and widths[level] != widths[level - 1] else None
                block = f"{theirs}.{names.block}.{layer}"
                yield from _residual(f"{ours}/blocks/{layer}", block, shortcut, conditioned)
            if level < len(widths) - 1:
                yield from _layer(f"{ours}/resample/conv", f"{theirs}.{direction}{names.resample}.conv", CONV2D)
        for index in range(2):
            yield from _residual(f"{part}/mid/blocks/{index}", f"{root}.{names.mid(index)}", None, conditioned)
        yield from _norm(f"{part}/norm_out", f"{root}.norm_out", conditioned)
        yield from _layer(f"{part}/conv_out", f"{root}.conv_out.conv", CONV3D)


def _layer(ours: str, theirs: str, kernel: Transform) -> Iterator[Entry]:
    yield Entry(f"{ours}/kernel", f"{theirs}.weight", kernel)
    yield Entry(f"{ours}/bias", f"{theirs}.bias", IDENTITY)


def _norm(ours: str, theirs: str, conditioned: bool) -> Iterator[Entry]:
    if conditioned:
        yield from _norm(f"{ours}/norm", f"{theirs}.norm_layer", False)
        yield from _layer(f"{ours}/scale", f"{theirs}.conv_y.conv", POINTWISE)
        yield from _layer(f"{ours}/shift", f"{theirs}.conv_b.conv", POINTWISE)
        return
    yield Entry(f"{ours}/scale", f"{theirs}.weight")
    yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _residual(ours: str, theirs: str, shortcut: str | None, conditioned: bool) -> Iterator[Entry]:
    for index in (1, 2):
        yield from _norm(f"{ours}/norm{index}", f"{theirs}.norm{index}", conditioned)
        yield from _layer(f"{ours}/conv{index}", f"{theirs}.conv{index}.conv", CONV3D)
    if shortcut:
        yield from _layer(f"{ours}/shortcut", f"{theirs}.{shortcut}", POINTWISE)


def to_diffusers_config(config: CogVideoXVAEConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    levels = len(config.block_channels)
    return {
        "_class_name": CLASS_NAME,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "block_out_channels": list(config.block_channels),
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "norm_eps": NORM_EPSILON,
        "norm_num_groups": config.groups,
        "temporal_compression_ratio": config.temporal_downsampling,
        "sample_height": config.sample_height,
        "sample_width": config.sample_width,
        "scaling_factor": config.scaling_factor,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "invert_scale_latents": config.invert_scale_latents,
    }


def from_diffusers_config(values: Mapping[str, Any]) -> CogVideoXVAEConfig:
    """The configuration that a config.json of diffusers describes; missing keys have diffusers' defaults.

    Raises:
      ValueError: a value that this network does not support.
    """
    fixed = {
        "act_fn": "silu",
        "norm_eps": NORM_EPSILON,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    for name, rule in fixed.items():
        if values.get(name, rule) != rule:
            raise ValueError(f"config.json: {name} = {values[name]!r}: CogVideoXVAE needs it to be {rule!r}.")
    for name, rule in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
        if any(kind != rule for kind in values.get(name, ())):
            raise ValueError(f"config.json: {name} = {values[name]!r}: CogVideoXVAE has blocks of type {rule} only.")
    default = CogVideoXVAEConfig()
    channels = values.get("in_channels", default.channels)
    if values.get("out_channels", default.channels) != channels:
        raise ValueError("config.json: in_channels and out_channels differ; CogVideoXVAE needs them equal.")
    config = CogVideoXVAEConfig(
        channels=channels,
        latent_channels=values.get("latent_channels", default.latent_channels),
        block_channels=tuple(values.get("block_out_channels", default.block_channels)),
        layers_per_block=values.get("layers_per_block", default.layers_per_block),
        groups=values.get("norm_num_groups", default.groups),
        temporal_downsampling=int(values.get("temporal_compression_ratio", default.temporal_downsampling)),
        scaling_factor=values.get("scaling_factor", default.scaling_factor),
        sample_height=values.get("sample_height", default.sample_height),
        sample_width=values.get("sample_width", default.sample_width),
        invert_scale_latents=values.get("invert_scale_latents", False),
    )
    config.validate()
    return config
