"""The flat form of a CVVAEConfig, which exported config.json files have and version 0.1.0 saved.

Every field of its groups (`norm`, `padding`, `temporal_attention`) has a name of its own there, and some have another
value.
"""

from collections.abc import Mapping
from typing import Any

# Flat name -> dotted path in CVVAEConfig, and flat value -> value there (empty: the same).
_MOVED: dict[str, tuple[str, dict[Any, Any]]] = {
    "norm_epsilon": ("norm.epsilon", {}),
    "norm_over": ("norm.over_clip", {"frame": False, "clip": True}),
    "border": ("padding.border", {}),
    "downsample_sides": ("padding.downsample_around", {"after": False, "around": True}),
    "decoder_time": ("padding.decoder_time", {}),
    "upsample_time": ("padding.upsample_time", {}),
    "second_convolution": ("full_3d", {"frame": False, "clip": True}),
    "temporal_attention": ("temporal_attention.kind", {"none": "none", "replacing": "clip", "added": "causal"}),
    "temporal_window": ("temporal_attention.window", {}),
    "frames_between": ("blend_frames", {"held": False, "blended": True}),
}

# All names, in the order in which files have them.
FLAT_NAMES = (
    "channels",
    "latent_channels",
    "block_channels",
    "layers_per_block",
    "groups",
    "mid_attention",
    "quant_convolutions",
    "time_levels_down",
    "time_levels_up",
    *_MOVED,
    "scaling_factor",
    "shift_factor",
    "tile_frames",
    "tile_size",
    "tile_overlap",
    "sample_size",
)


def is_flat(fields: Mapping[str, Any]) -> bool:
    """Whether fields of a saved config are in the flat form."""
    return isinstance(fields.get("temporal_attention"), str) or bool(
        (set(_MOVED) - {"temporal_attention"}) & set(fields)
    )


def group_fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `CVVAEConfig` from the flat ones, with a dict for every group; other names are kept.

    Raises:
      ValueError: a value that the field cannot have.
    """
    grouped: dict[str, Any] = {}
    for name, value in flat.items():
        path, values = _MOVED.get(name, (name, {}))
        if values and not (isinstance(value, str) and value in values):
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(repr(known) for known in values)}.")
        group, _, field = path.rpartition(".")
        fields = grouped.setdefault(group, {}) if group else grouped
        fields[field] = values[value] if values else value
    return grouped


def flatten_fields(config: Any) -> dict[str, Any]:
    """The flat fields of a `CVVAEConfig`, without those that only decide how it runs."""
    flat = {}
    for name in FLAT_NAMES:
        path, values = _MOVED.get(name, (name, {}))
        value = config
        for part in path.split("."):
            value = getattr(value, part)
        flat[name] = {ours: theirs for theirs, ours in values.items()}[value] if values else value
    return flat
