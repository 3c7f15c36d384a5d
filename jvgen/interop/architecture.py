"""Compare weights on disk with the network of a run by their config.json, before the weights are read."""

import dataclasses
from collections.abc import Iterator

from jvgen.config import Config
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import check_files, read_config
from jvgen.models.video_dit.config import Positions, VideoDiTConfig
from jvgen.models.video_dit.torch_map import depends_on_rotary_grid, stored_rotary_grid
from jvgen.storage import Path

# Fields that the network does not compute with: what it was made for, and how it is used.
DESCRIPTIVE_FIELDS = {
    "CompressiveTokenizerConfig": {"dropout", "commitment"},
    "FrameTransformerConfig": {"attention_dropout", "max_positions"},
    "CVVAEConfig": {
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "tile_frames",
        "tile_size",
        "tile_overlap",
        "blend_frames",
    },
    "ImageVAEConfig": {"sample_size", "scaling_factor", "shift_factor"},
    "VideoDiTConfig": {"sample_height", "sample_width", "sample_frames", "temporal_compression", "text_length"},
}


def check_architecture(folder: str | Path, wanted: Config, field: str) -> None:
    """Raise `ValueError` unless the weights in a folder are of the network `wanted`, and whole; differences are listed.

    Args:
      folder: as `jvgen.interop.from_torch.import_folder` takes it.
      wanted: configuration of the run's network.
      field: where the run names the folder, for the message.
    """
    check_files(folder)
    lines = differences(read_config(folder), wanted)
    if lines:
        raise ValueError(
            f"{field} = {str(folder)!r} holds another network than the run's config:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nName weights of the run's network in {field}, or change the config to the network of these."
        )


def differences(found: Config, wanted: Config) -> list[str]:
    """How the network of some weights differs from the one that a run describes, one line per field.

    Fields that only decide how a network is run (remat, kernels) do not count.
    """
    if type(found) is not type(wanted):
        return [f"a network of {type(found).__name__} in the weights, of {type(wanted).__name__} in the run"]
    if found == wanted:
        return []
    found, wanted = _as_stored(found), _as_stored(wanted)
    ignored = DESCRIPTIVE_FIELDS.get(type(found).__name__, set())
    if getattr(wanted, "positions", Positions.SINCOS) is not Positions.SINCOS:
        # Rotary positions depend on the size of the clips that the network is made for.
        ignored = ignored - {"sample_height", "sample_width", "sample_frames"}
    return list(_lines(found, wanted, ignored))


def _as_stored(config: Config) -> Config:
    """Through config.json and back, so that what no file keeps is the same in all configs.

    Rotary positions stay what they are: no file says them, and networks differ by them.
    """
    if isinstance(config, VideoDiTConfig):
        # The last epsilon is in few files: a run keeps its own.
        grid = config.rotary_grid if depends_on_rotary_grid(config) else stored_rotary_grid(config)
        own = config.replace(rotary_grid=stored_rotary_grid(config))
        if config.aggregation is None:
            own = own.replace(output_norm_epsilon=config.norm_epsilon)
        return _through_file(own).replace(rotary_grid=grid)
    return _through_file(config)


def _through_file(config: Config) -> Config:
    form = format_of(config)
    stored = form.from_json(form.to_json(config))
    if form.extra_weight_map(config) is None:
        return stored
    return form.with_extra_weights(stored, form.extra_weights_json(config))


def _lines(found: Config, wanted: Config, ignored: set[str], prefix: str = "") -> Iterator[str]:
    for name in (field.name for field in dataclasses.fields(found)):
        here, there = getattr(found, name), getattr(wanted, name)
        if name in ignored or here == there:
            continue
        if isinstance(here, Config) and type(here) is type(there):
            yield from _lines(here, there, set(), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}: {here!r} in the weights, {there!r} in the run"
