"""Files of weights without a config.json, by their headers alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from jvgen.config import Config
from jvgen.interop.formats import format_of
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.torch_map import weight_map_sat

SAT_TABLES = [f"model.diffusion_model.mixins.pos_embed.{name}" for name in ("freqs_sin", "freqs_cos")]


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 tensors that takes no space: its data are a hole."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def files_of(network: Config, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Files with all tensors of a network, by naming scheme, and whether they lack RepVideo's gates."""
    form = format_of(network)
    shapes, found = form.network(network).shapes, {}
    extra = form.extra_weight_map(network)
    without = {name: value for name, value in shapes.items() if extra is None or name != "aggregation"}
    found["library"] = (folder / "weights.safetensors", extra is not None)
    write_header(found["library"][0], form.weight_map(network).torch_shapes(without))
    if type(network) is VideoDiTConfig:
        found["SAT"] = (folder / "sat.safetensors", False)
        tables = {name: (1,) for name in SAT_TABLES}
        write_header(found["SAT"][0], weight_map_sat(network).torch_shapes(shapes) | tables)
    return found
