"""A file of weights without a config.json goes into the run of every shipped config that has its network."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from jvgen import config
from jvgen.config import Config
from jvgen.interop.architecture import differences
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import check_weights
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.torch_map import weight_map_sat
from jvgen.runs import exporting

sys.path.insert(0, str(Path(__file__).parent))
from test_configs import CONFIGS, DUMPS  # noqa: E402

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


def of_other_tasks() -> list[str]:
    """Shipped configs but those whose task differs from an earlier one's in what an agent begins with alone."""
    found = {}
    for label in CONFIGS:
        lines = (DUMPS / f"{label}.txt").read_text().splitlines()
        task = [line for line in lines if line.startswith("task.") and not line.startswith("task.demonstrations")]
        found.setdefault("\n".join(task), label)
    return list(found.values())


@pytest.mark.parametrize("label", of_other_tasks())
def test_a_lone_file_goes_into_every_shipped_config(label, tmp_path, monkeypatch):
    """Everything but the tensors' data: which network they are for, its architecture, names, shapes and dtypes."""
    experiment = config.load(CONFIGS[label])
    task = experiment.task.build()
    # A LoRA's base is named in the config, and an agent's networks have no files.
    if getattr(experiment.task, "lora", None) or (
        experiment.task.collects_experience and not experiment.task.imagination
    ):
        assert task.network_configs == {}
        return
    imported = []

    def import_folder(path, network, **options):
        check_weights(path, network)
        return network, {"read": np.zeros(1)}

    monkeypatch.setattr(type(experiment.task), "build", lambda self: task)
    monkeypatch.setattr(type(experiment.task), "check_weights", lambda self: None)
    monkeypatch.setattr(exporting, "import_folder", import_folder)
    # Of the tensors' data, which are gigabytes of zeros.
    monkeypatch.setattr(exporting, "content_digest", lambda file: "digest")
    monkeypatch.setattr(
        exporting, "write_first_checkpoint", lambda run, workdir, given, record: imported.append(list(given))
    )
    assert task.network_configs
    for name, network in task.network_configs.items():
        assert differences(network, network) == []
        for file, lacks_gates in files_of(network, tmp_path).values():
            exporting.import_run(file, experiment, tmp_path / "run", network=name, init_gates=lacks_gates)
    assert imported and all(given[0] in task.network_configs for given in imported)
