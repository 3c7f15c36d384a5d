"""Whether weights on disk are of the network that a run describes: told by their config.json, before they are read."""

import dataclasses
from pathlib import Path

from jvgen.config import Config
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import read_config
from jvgen.models.video_dit.config import Positions

# What config.json says of the use that the network was made for, and what the network does not compute with.
SAID_ONLY = {
    "CompressiveTokenizerConfig": {"dropout", "commitment"},
    "FrameTransformerConfig": {"attention_dropout", "max_positions"},
    "CVVAEConfig": {
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "tile_frames",
        "tile_size",
        "tile_overlap",
        "frames_between",
    },
    "ImageVAEConfig": {"sample_size", "scaling_factor", "shift_factor"},
    "VideoDiTConfig": {"sample_height", "sample_width", "sample_frames", "temporal_compression", "text_length"},
}


def check_architecture(folder: str | Path, wanted: Config, field: str) -> None:
    """Raise `ValueError` unless the weights in a folder are of the network `wanted`; all differences are listed.

    Args:
      folder: as `jvgen.interop.from_torch.import_folder` takes it.
      wanted: configuration of the run's network.
      field: where the run names the folder, for the message.
    """
    lines = differences(read_config(folder), wanted)
    if lines:
        raise ValueError(
            f"{field} = {str(folder)!r} holds another network than the run describes:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nName the weights of the run's network in {field}, or describe theirs in the config."
        )


def differences(found: Config, wanted: Config) -> list[str]:
    """How the network of some weights differs from the one that a run describes, one line a field.

    Fields that only decide how a network is run (remat, kernels) do not count.
    """
    if type(found) is not type(wanted):
        return [f"a network of {type(found).__name__} in the weights, of {type(wanted).__name__} in the run"]
    form = format_of(wanted)
    # Through config.json and back: what no file keeps is the same on both sides then.
    told, described = form.from_json(form.to_json(wanted)), wanted
    has_companion = form.companion_map(described) is not None
    wanted = form.with_companion(told, form.companion_json(described)) if has_companion else told
    ignored = SAID_ONLY.get(type(found).__name__, set())
    if getattr(wanted, "positions", Positions.SINCOS) is not Positions.SINCOS:
        # Rotary positions are laid over the grid of the clip that the network is made for.
        ignored = ignored - {"sample_height", "sample_width", "sample_frames"}
    values = {f.name: (getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(found)}
    return [
        f"{name}: {here!r} in the weights, {there!r} in the run"
        for name, (here, there) in values.items()
        if here != there and name not in ignored
    ]
