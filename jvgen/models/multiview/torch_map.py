"""Names and layouts of released weights (CVD's modules, CameraCtrl's encoder) and of jvgen's exports."""

from collections.abc import Mapping
from typing import Any

from jvgen.models.multiview.config import MultiViewDiTConfig
from jvgen.models.multiview.cvd_checkpoint import CVDCheckpointConfig
from jvgen.models.multiview.model import ADAPTED
from jvgen.models.multiview.pose_encoder import PoseEncoderConfig
from jvgen.models.weight_map import CONV2D, IDENTITY, LAYER, LINEAR, Entry, Transform, WeightMap, fused
from jvgen.saved_config import from_json, to_json

CLASS_NAME = "ViewParts"  # in config.json of exports, which keep the name of version 0.1.0
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v"}


def weight_map(config: MultiViewDiTConfig) -> WeightMap:
    """`MultiViewModules`: synchronization modules with CVD's names, rays and LoRA as a PyTorch port would name them."""
    entries: list[Entry] = []
    if config.sync is not None:
        entries += synchronization_entries("sync/layers/", f"sync.{LAYER}.", config.sync.sublayers, config.sync.depth)
    if config.rays:
        entries += _layer("rays/projection", "rays.projection")
    if config.adapter_rank:
        for name in ADAPTED:
            for part in ("down", "up"):
                entries.append(Entry(f"adapter/{name}/{part}", f"adapter.{LAYER}.{name}_lora.{part}.weight", LINEAR))
    return WeightMap(tuple(entries))


def to_diffusers_config(config: MultiViewDiTConfig) -> dict[str, Any]:
    """Contents of the `config.json` beside the weights."""
    return {"_class_name": CLASS_NAME, "config": to_json(config)}


def from_diffusers_config(values: Mapping[str, Any]) -> MultiViewDiTConfig:
    """The configuration written by `to_diffusers_config`.

    Raises:
      ValueError: the file describes another network.
    """
    config = from_json(values["config"]) if "config" in values else None
    if not isinstance(config, MultiViewDiTConfig):
        raise ValueError("config.json of multi-view modules lacks the configuration of a MultiViewDiT.")
    return config


def synchronization_entries(ours: str, theirs: str, sublayers: int, depth: int = 1) -> list[Entry]:
    """Entries of one synchronization module; prefixes include their separator."""
    entries = [
        *_norm(f"{ours}norm", f"{theirs}norm"),
        *_layer(f"{ours}input", f"{theirs}proj_in"),
        *_layer(f"{ours}output", f"{theirs}proj_out"),
    ]
    for number in range(depth):
        block = f"{ours}block/" if number == 0 else f"{ours}deeper/{number - 1}/"
        their_block = f"{theirs}transformer_blocks.{number}."
        for index in range(sublayers):
            entries += _attention(f"{block}attentions/{index}", f"{their_block}attention_blocks.{index}")
            entries += _norm(f"{block}norms/{index}", f"{their_block}norms.{index}")
        entries += _feed_forward(block, their_block)
    return entries


def cvd_checkpoint_map(config: CVDCheckpointConfig, *, prefix: str = "") -> WeightMap:
    """Names in the `unet_trainable_dict` of CVD's checkpoint: 26 tensors in each of 20 modules."""
    entries: list[Entry] = []
    for side in config.sides:
        for level in range(len(config.channels)):
            for index in range(config.modules(side)):
                theirs = f"{prefix}{side}_blocks.{level}.epi_modules.{index}.epi_transformer."
                entries += synchronization_entries(f"{side}/{level}/{index}/", theirs, config.sublayers, config.depth)
    # Position grids, buffers in the files of whole networks.
    return WeightMap(tuple(entries), ignored=(r".*\.pos_encoder\.coords",))


def pose_encoder_map(config: PoseEncoderConfig, *, prefix: str = "") -> WeightMap:
    """Names in the `pose_encoder_state_dict` of CameraCtrl's checkpoint."""
    entries = [*_layer("input", f"{prefix}encoder_conv_in", CONV2D)]
    for scale, width in enumerate(config.channels):
        for layer in range(config.layers):
            ours, theirs = f"{scale}/{layer}", f"{scale}.{layer}"
            block = f"{prefix}encoder_down_conv_blocks.{theirs}."
            if scale > 0 and layer == 0 and width != config.channels[scale - 1]:
                entries += _layer(f"residual/{ours}/widen", f"{block}in_conv", CONV2D)
            entries += _layer(f"residual/{ours}/first", f"{block}block1", CONV2D)
            entries += _layer(f"residual/{ours}/second", f"{block}block2", CONV2D)
            block = f"{prefix}encoder_down_attention_blocks.{theirs}."
            entries += _attention(f"temporal/{ours}", f"{block}attention_blocks.0")
            entries += _norm(f"temporal/{ours}/norm", f"{block}norms.0")
            entries += _feed_forward(f"temporal/{ours}/", block)
    return WeightMap(tuple(entries), ignored=(r".*\.pos_encoder\.pe",))


def _attention(ours: str, theirs: str) -> list[Entry]:
    entries = [
        Entry(f"{ours}/{name}/kernel", f"{theirs}.{theirs_}.weight", LINEAR) for name, theirs_ in ATTENTION.items()
    ]
    return [*entries, *_layer(f"{ours}/output", f"{theirs}.to_out.0")]


def _feed_forward(ours: str, theirs: str) -> list[Entry]:
    """GEGLU: one PyTorch tensor holds the hidden projection followed by the gate."""
    entries = [*_norm(f"{ours}feed_forward_norm", f"{theirs}ff_norm")]
    for kind, suffix, transform in (("kernel", "weight", LINEAR), ("bias", "bias", IDENTITY)):
        pieces = {name: f"{ours}feed_forward/{name}/{kind}" for name in ("hidden", "gate")}
        entries += fused(f"{theirs}ff.net.0.proj.{suffix}", pieces, transform)
    return [*entries, *_layer(f"{ours}feed_forward/output", f"{theirs}ff.net.2")]


def _layer(ours: str, theirs: str, transform: Transform = LINEAR) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/kernel", f"{theirs}.weight", transform), Entry(f"{ours}/bias", f"{theirs}.bias")


def _norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")
