"""A new run from another run's checkpoint: which arrays are taken, bit for bit, and what is refused."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import (
    exit_codes,  # noqa: E402
    saved_config,  # noqa: E402
)
from jvgen.config import ConfigError  # noqa: E402
from jvgen.parallel.mesh import make_mesh  # noqa: E402
from jvgen.training import session  # noqa: E402
from jvgen.training.checkpoint import init_from  # noqa: E402
from jvgen.training.checkpoint.reader import CheckpointReader  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.program import Program  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def program_of(**changes) -> Program:
    experiment = toys.experiment(**changes)
    return Program.build(experiment, make_mesh(experiment.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def other(tmp_path_factory, quick_compilations):
    """A run of 4 steps with EMA 0.9: its folder, and the arrays of its last checkpoint."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        changes = {"training.steps": 4, "checkpoint.every": 2}
        assert train(toys.experiment(**changes), folder, make_loader=toys.FakeLoader) == exit_codes.DONE
    return folder, saved_arrays(folder, program_of())


def saved_arrays(folder: Path, program: Program, step: int | None = None) -> dict[str, np.ndarray]:
    checkpoints = CheckpointReader(folder)
    restored = checkpoints.restore(program.abstract_state().saved(), step=step)
    checkpoints.close()
    return {name: np.asarray(array) for name, array in restored.arrays.items()}


def started(tmp_path, other, log=print, **changes) -> dict[str, np.ndarray]:
    state = init_from.init_from(program_of(**{"init_from.run": str(other[0])} | changes), tmp_path, log)
    return {name: np.asarray(array) for name, array in state.saved().items()}


def assert_equal(arrays, expected):
    assert arrays and arrays.keys() == expected.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name, strict=True)


def part(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def test_raw_parameters_and_a_new_ema_decay_that_starts_from_them(tmp_path, other):
    lines = []
    arrays = started(tmp_path, other, log=lines.append, **{"ema.decays": "0.9,0.99"})
    expected = part(other[1], "parameters/")
    for prefix in ("parameters/", "ema/0.9/", "ema/0.99/"):
        assert_equal(part(arrays, prefix), expected)
    assert arrays["step"] == 0 and arrays["health/count"] == 0
    assert not any(np.any(value) for value in part(arrays, "optimizer/").values()), "new moments"
    assert any("parameters (raw) of step 4" in line for line in lines)
    record = json.loads((tmp_path / "init_from.json").read_text())
    assert record["run"] == str(other[0]) and record["step"] == 4 and record["random"] == []


def test_ema_as_parameters_of_an_earlier_step(tmp_path, other):
    early = saved_arrays(other[0], program_of(), step=2)
    arrays = started(tmp_path, other, **{"init_from.step": 2, "init_from.ema": "0.9"})
    assert_equal(part(arrays, "parameters/"), part(early, "ema/0.9/"))
    assert_equal(part(arrays, "ema/0.9/"), part(early, "ema/0.9/"))


def test_a_kept_optimizer_keeps_moments_ema_and_the_count_of_updates(tmp_path, other):
    arrays = started(tmp_path, other, **{"init_from.keep_optimizer": "true", "ema.decays": "0.9,0.99"})
    for prefix in ("parameters/", "optimizer/", "ema/0.9/"):
        assert_equal(part(arrays, prefix), part(other[1], prefix))
    assert_equal(part(arrays, "ema/0.99/"), part(other[1], "parameters/"))
    assert arrays["step"] == 0 and arrays["health/count"] == 4


@pytest.mark.parametrize("keep", ["false", "true"])
def test_every_array_is_in_the_memory_that_the_step_reads_it_from(tmp_path, other, keep):
    changes = {"init_from.run": str(other[0]), "init_from.keep_optimizer": keep, "ema.decays": "0.9,0.99"}
    program = program_of(**changes, **{"sharding.host_offload": "optimizer,ema"})
    arrays, wanted = init_from.init_from(program, tmp_path, print).saved(), program.abstract_state().saved()
    for name, array in arrays.items():
        assert array.sharding == wanted[name].sharding, name


def test_selected_parameters_only(tmp_path, other):
    arrays = started(tmp_path, other, **{"init_from.parameters": "model/out", "seed": 7})
    fresh = {name: np.asarray(value) for name, value in program_of(seed=7).init().saved().items()}
    for name, value in part(arrays, "parameters/").items():
        source = other[1] if name.startswith("model/out") else fresh
        np.testing.assert_array_equal(value, source[f"parameters/{name}"], err_msg=name)
    assert_equal(part(arrays, "ema/0.9/"), part(arrays, "parameters/"))


def test_what_does_not_fit_is_refused_by_name_or_initialized_randomly(tmp_path, other):
    deeper = {"task.layers": 3}
    with pytest.raises(ConfigError, match=r"(?s)does not hold .*model/blocks.*allow_partial"):
        started(tmp_path, other, **deeper)
    lines = []
    arrays = started(tmp_path, other, log=lines.append, **deeper | {"init_from.allow_partial": "true"})
    expected = part(other[1], "parameters/model/out/")
    assert_equal(part(arrays, "parameters/model/out/"), expected)
    random = [line for line in lines if "initialized randomly" in line]
    assert random and all("model/blocks" in line for line in random)
    assert json.loads((tmp_path / "init_from.json").read_text())["random"]
    # Moments of the new parameters start anew, the others are kept.
    changes = deeper | {"init_from.allow_partial": "true", "init_from.keep_optimizer": "true"}
    kept = started(tmp_path, other, **changes)
    for name, value in part(kept, "optimizer/").items():
        expected = 0 if "blocks" in name else other[1][f"optimizer/{name}"]
        np.testing.assert_array_equal(value, expected, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from.run": "/nowhere"}, "not a run directory"),
        ({"init_from.step": 3}, "no checkpoint of step 3; its steps are"),
        ({"init_from.run": "{run}/checkpoints/2", "init_from.step": 4}, "step 4 is asked for, but .*/checkpoints/2"),
        ({"init_from.ema": "0.5"}, "this run keeps EMA with decay 0.9"),
        ({"init_from.parameters": "decoder"}, "matches no parameter"),
        ({"init_from.keep_optimizer": "true", "optimizer.kind": "muon"}, "optimizer/.*keep_optimizer=false"),
        ({"task.width": 8}, "model/out/kernel: checkpoint .* this run"),
    ],
)
def test_mistakes_are_named_without_reading_arrays(other, changes, message):
    changes = {name: str(value).replace("{run}", str(other[0])) for name, value in changes.items()}
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        init_from.check(program_of(**{"init_from.run": str(other[0])} | changes))


def test_a_checkpoint_can_be_named_instead_of_a_step(tmp_path, other):
    named = started(tmp_path, other, **{"init_from.run": str(other[0] / "checkpoints" / "2")})
    assert_equal(named, started(tmp_path, other, **{"init_from.step": 2}))


def test_a_run_starts_so_once_and_then_resumes_its_own_checkpoint(tmp_path, other, capfd):
    changes = {"init_from.run": str(other[0]), "optimizer.learning_rate": "1e-3", "training.steps": 4}
    experiment = toys.experiment(**changes)
    assert train(experiment, tmp_path, stop_after=1, make_loader=toys.FakeLoader) == exit_codes.DONE
    assert f"of step 4 of {other[0]}" in capfd.readouterr().out
    assert train(experiment, tmp_path, stop_after=2, make_loader=toys.FakeLoader) == exit_codes.DONE
    out = capfd.readouterr().out
    assert "restored step 1" in out and str(other[0]) not in out
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["experiment"]["init_from"]["run"] == str(other[0])


def test_a_config_saved_before_init_from_existed_is_read():
    document = json.loads(saved_config.to_json(toys.experiment()))
    del document["init_from"]
    assert saved_config.decode(document).init_from.run is None
