"""Weights go from files to runs and back through host memory: nothing of them is on an accelerator meanwhile."""

import gc
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen.interop.digest import content_digest  # noqa: E402
from jvgen.interop.to_torch import export_network  # noqa: E402
from jvgen.models.image_vae.model import ImageVAE  # noqa: E402
from jvgen.nn.network import Network  # noqa: E402
from jvgen.parallel.mesh import MeshConfig, make_mesh, single_device_mesh  # noqa: E402
from jvgen.runs import exporting  # noqa: E402
from jvgen.training.checkpoint import initial  # noqa: E402
from jvgen.training.checkpoint.manager import Checkpoints  # noqa: E402
from jvgen.training.checkpoint.restore import load_for_inference, restore_state  # noqa: E402
from jvgen.training.config import CheckpointConfig  # noqa: E402
from jvgen.training.experiment import load_experiment  # noqa: E402
from jvgen.training.program import Program  # noqa: E402

pytestmark = pytest.mark.usefixtures("shared_compilations")

EXPERIMENT = "configs/demo_image_vae.py"


@pytest.fixture
def accelerator(monkeypatch):
    """Bytes of arrays on all devices but the last, which stands for the host; a number per look at them."""
    host, seen = jax.devices()[-1], []
    for module in (initial, exporting):
        monkeypatch.setattr(module, "host_device", lambda: host)

    def look(function):
        def looking(*arguments, **options):
            arrays = [array for array in jax.live_arrays() if array.devices() != {host} and id(array) not in before]
            seen.append(sum(array.nbytes for array in arrays))
            return function(*arguments, **options)

        return looking

    before = {id(array) for array in jax.live_arrays()}
    monkeypatch.setattr(Checkpoints, "save", look(Checkpoints.save))
    monkeypatch.setattr(initial, "to_host", look(initial.to_host))
    monkeypatch.setattr(exporting, "to_host", initial.to_host)
    monkeypatch.setattr(exporting, "export_networks", look(exporting.export_networks))
    return seen


def test_weights_are_imported_and_exported_without_an_accelerator(tmp_path, accelerator):
    experiment = load_experiment(EXPERIMENT)
    config = experiment.task.network
    parameters = Network.of(lambda rngs: ImageVAE(config, rngs=rngs)).init(jax.random.key(3))
    parameters = jax.tree.map(np.array, parameters)
    # Initialization leaves its arrays in reference cycles.
    gc.collect()
    export_network(config, parameters, tmp_path / "weights")
    exporting.import_run(tmp_path / "weights", experiment, tmp_path / "run")
    exporting.export_run(tmp_path / "run", tmp_path / "exported")
    # A random key, perhaps.
    assert len(accelerator) > 2 and max(accelerator) < 1024
    old, new = (
        next(Path(folder).rglob("*.safetensors")).read_bytes()
        for folder in (tmp_path / "weights", tmp_path / "exported")
    )
    assert old == new
    # The card says where they are from.
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"`{tmp_path / 'weights'}`, SHA-256 `{content_digest(tmp_path / 'weights')}`" in card and "None:" not in card
    about = json.loads((tmp_path / "exported" / "jvgen_run.json").read_text())
    assert about["config_digest"] in card


def test_an_import_holds_parameters_alone_and_training_starts_from_them(tmp_path):
    experiment = toys.experiment()
    given = Program.build(experiment, single_device_mesh()).init().parameters
    given = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, given)
    initial.write_first_checkpoint(experiment, tmp_path, {"model": {"out": given["model"]["out"]}})
    program = Program.build(experiment, make_mesh(MeshConfig(fsdp=8)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    _, saved, document = checkpoints.contents(None)
    assert not any(name.startswith(("optimizer", "ema")) for name in saved)
    state = restore_state(program, checkpoints, None, document, False, lambda message: None)
    checkpoints.close()
    fresh = program.init()
    assert state.saved().keys() == fresh.saved().keys()
    jax.tree.map(np.testing.assert_array_equal, state.parameters["model"]["out"], given["model"]["out"])
    jax.tree.map(
        np.testing.assert_array_equal, state.parameters["model"]["blocks"], fresh.parameters["model"]["blocks"]
    )
    jax.tree.map(np.testing.assert_array_equal, state.ema["0.9"], state.parameters)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, fresh.optimizer)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.ema["0.9"]) == jax.tree.map(
        lambda leaf: leaf.sharding, state.parameters
    )
    _, _, parameters, _ = load_for_inference(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, parameters, state.parameters)
