"""The training step: accumulation, meshes, skipped steps, frozen parameters, keys."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import (
    config,  # noqa: E402
    nested,
)
from jvgen.config import ConfigError  # noqa: E402
from jvgen.parallel.mesh import MeshConfig, make_mesh, single_device_mesh  # noqa: E402
from jvgen.preflight import collectives  # noqa: E402
from jvgen.tasks.task import CodeUse  # noqa: E402
from jvgen.training import state  # noqa: E402
from jvgen.training.checkpoint import digest  # noqa: E402
from jvgen.training.checkpoint.manager import Checkpoints  # noqa: E402
from jvgen.training.config import CheckpointConfig  # noqa: E402
from jvgen.training.evaluation import parameter_variants  # noqa: E402
from jvgen.training.optimization import parameter_paths  # noqa: E402
from jvgen.training.optimization.optimizer import OptimizerConfig  # noqa: E402
from jvgen.training.program import Program  # noqa: E402
from jvgen.training.step import _only_if_active, accumulate  # noqa: E402
from jvgen.training.telemetry.metrics import to_host  # noqa: E402
from tests import quick_xla

# Most tests compile the same programs again.
pytestmark = pytest.mark.usefixtures("shared_compilations")


def run(experiment, steps: int = 2, mesh=None, bucket: int = 0, change_batch=None):
    """The last state and the metrics of some steps; the batches are those of the fake loader for one bucket."""
    program, compiled = compiled_step(experiment, mesh or single_device_mesh(), bucket)
    loader, shape = toys.FakeLoader(experiment.data, seed=0, preprocess=None), experiment.data.buckets[bucket]
    current, rows = program.init(), []
    for step in range(steps):
        arrays = loader.at(step * len(experiment.data.buckets) + bucket).arrays
        arrays = arrays if change_batch is None else change_batch(step, arrays)
        current, metrics = compiled(current, program.shard_batch(arrays, shape))
        rows.append(to_host(metrics))
    return current, rows


_COMPILED = {}


def compiled_step(experiment, mesh, bucket: int):
    name = (config.dump(experiment), mesh, bucket)
    if name not in _COMPILED:
        program = Program.build(experiment, mesh)
        _COMPILED[name] = (
            program,
            program.lower(experiment.data.buckets[bucket]).compile(compiler_options=quick_xla.OPTIONS),
        )
    return _COMPILED[name]


def assert_close(ours, theirs, tolerance=2e-6):
    theirs = nested.flatten(theirs)
    assert nested.flatten(ours).keys() == theirs.keys()
    for path, a in nested.flatten(ours).items():
        b = theirs[path]
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=tolerance, err_msg=path)


def test_accumulation_gives_the_step_of_the_whole_batch():
    """Draws belong to slots, `Mean` metrics add up: only rounding differs."""
    whole, expected = run(toys.experiment())
    parts, found = run(toys.experiment(**{"training.accumulation": 4}))
    assert_close(parts.parameters, whole.parameters)
    for name in ("loss", "high", "input", "gradient_norm"):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in expected], rtol=1e-5, err_msg=name)


def test_counts_of_codes_add_up_over_microbatches_and_belong_to_active_steps():
    batch = {"ids": jnp.arange(8) % 3, "slot": jnp.arange(8)}

    def loss(parameters, batch):
        return parameters["scale"], {"codes": CodeUse(jnp.bincount(batch["ids"], length=4))}

    (_, metrics), _ = accumulate(loss, {"scale": jnp.float32(1)}, batch, 4)
    np.testing.assert_array_equal(metrics["codes"].counts, [3, 3, 2, 0])
    active, inactive = (to_host(_only_if_active(metrics, jnp.bool_(there))) for there in (True, False))
    assert active["codes/codes_used"] == 0.75 and not inactive


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        ({"fsdp": 8}, 2),
        ({"data": 2, "fsdp": 2, "seq": 2, "whole": True}, 1),
        ({"data": 2, "fsdp": 2, "seq": 2, "whole": False}, 1),
        ({"fsdp": 2, "tensor": 4}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
    ],
)
def test_any_mesh_gives_the_step_of_one_device(mesh, accumulation):
    one, expected = run(toys.experiment(), steps=2)
    mesh = dict(mesh)
    whole = {"sharding.whole_examples": mesh.pop("whole", True)}
    experiment = toys.experiment(**{"training.accumulation": accumulation} | whole)
    many, found = run(experiment, steps=2, mesh=make_mesh(MeshConfig(**{"fsdp": 1} | mesh)))
    assert_close(jax.device_get(many.parameters), jax.device_get(one.parameters), 1e-5)
    assert_close(jax.device_get(many.ema), jax.device_get(one.ema), 1e-5)
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)


def test_microbatches_of_whole_examples_give_the_step_of_one_device():
    """Of 16 examples in two microbatches each of the 8 devices has one, where two would split each example."""
    larger = {"data.buckets.0.batch_size": 16}
    one, expected = run(toys.experiment(**larger), steps=2)
    experiment = toys.experiment(**{"training.accumulation": 2} | larger)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    assert Program.build(experiment, mesh).sharding_of(experiment.data.buckets[0]).spread_parts == 2
    many, found = run(experiment, steps=2, mesh=mesh)
    assert_close(jax.device_get(many.parameters), jax.device_get(one.parameters), 1e-5)
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)


def test_replicas_exchange_gradients_once_a_step():
    """Whatever the number of microbatches: the sum over `data` is taken of the accumulated gradients."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    sent = {}
    for accumulation in (2, 4):
        _, compiled = compiled_step(toys.experiment(**{"training.accumulation": accumulation}), mesh, 1)
        # 2 devices: one shard of two replicas. 8: all devices.
        between_replicas = [one for one in collectives.read(compiled.as_text()) if one.devices in (2, 8)]
        sent[accumulation] = sum(one.total for one in between_replicas if one.bytes > 64)
    assert sent[4] == sent[2] > 0, sent


def test_state_is_sharded_as_the_parameters():
    program = Program.build(toys.experiment(), make_mesh(MeshConfig(fsdp=8)))
    places = parameter_paths.name_leaves(program.shardings)
    kernel = places["parameters/model/blocks/layers/up/kernel"]
    assert "fsdp" in str(kernel.spec)
    for name in ("optimizer/model/adam/mu", "optimizer/model/adam/nu", "ema/0.9"):
        assert places[f"{name}/model/blocks/layers/up/kernel"] == kernel
    fresh = program.init()
    actual = parameter_paths.name_leaves(jax.tree.map(lambda leaf: leaf.sharding, fresh))
    assert all(actual[name].is_equivalent_to(places[name], 3) or not places[name].spec for name in places)


def test_compute_dtype_casts_matrices_and_keeps_gradients_and_state_in_float32():
    seen = {}

    class DtypeRecorder(toys.ToyTask):
        def loss(self, parameters, frozen, batch, key):
            seen.update(nested.flatten(jax.tree.map(lambda leaf: leaf.dtype, parameters)))
            return super().loss(parameters, frozen, batch, key)

    experiment = toys.experiment(**{"training.compute_dtype": "bfloat16"})
    program = Program.build(experiment, single_device_mesh(), DtypeRecorder(experiment.task))
    program.lower(experiment.data.buckets[0])
    assert {str(d) for p, d in seen.items() if p.endswith("kernel")} == {"bfloat16"}
    # A stacked norm's scale has two axes, and is still one vector per layer.
    assert {str(d) for p, d in seen.items() if p.endswith(("scale", "bias"))} == {"float32"}
    floats = [leaf for leaf in jax.tree.leaves(program.abstract) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {str(leaf.dtype) for leaf in floats} == {"float32"}


def test_two_objectives_update_their_own_parameters():
    experiment = toys.experiment().replace(
        task=toys.GameConfig(),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0),
        optimizers={"critic": OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.0)},
    )
    after, rows = run(experiment, steps=1)
    values = {name: float(tree["value"][0]) for name, tree in after.parameters.items()}
    # Adam's first update is the learning rate times the sign: the generator descends x*y, the critic ascends it.
    np.testing.assert_allclose(values["generator"], 1.0 - 0.1, rtol=1e-6)
    np.testing.assert_allclose(values["critic"], 2.0 + 0.01, rtol=1e-6)
    assert rows[0]["generator/loss"] == 2.0 and rows[0]["critic/loss"] == -2.0
    assert rows[0]["generator/gradient_norm"] == 2.0 and rows[0]["critic/gradient_norm"] == 1.0
    names = parameter_paths.name_leaves(after.optimizer)
    assert "generator/adam/mu/generator/value" in names and "generator/adam/mu/critic/value" not in names


def test_a_step_with_nan_changes_nothing_but_the_counts():
    poisoned = 16 * 2 * 1 + 3  # slot 3 of step 2 (bucket 0 has every second step)
    experiment = toys.experiment(**{"task.poison": poisoned, "optimizer.warmup_steps": 4})
    before, _ = run(experiment, steps=1)
    after, rows = run(experiment, steps=2)
    assert [r["skipped"] for r in rows] == [0, 1] and np.isnan(rows[1]["loss"])
    toys.assert_equal(after.parameters, before.parameters)
    toys.assert_equal(after.optimizer, before.optimizer)
    toys.assert_equal(after.ema, before.ema)
    assert int(after.step) == 2 and rows[1]["skipped_total"] == 1 and rows[1]["consecutive_skips"] == 1
    assert int(after.health.count) == 1
    _, rows = run(experiment, steps=3)
    assert rows[2]["skipped"] == 0 and rows[2]["consecutive_skips"] == 0 and rows[2]["skipped_total"] == 1
    assert np.isfinite(rows[2]["loss"])


def test_a_spike_of_the_gradient_norm_is_skipped_after_the_warmup():
    def spike(step, arrays):
        return arrays | {"x": arrays["x"] * 30} if step == at else arrays

    at, guarded = 8, toys.experiment(**{"training.spike_sigma": 6.0})
    _, rows = run(guarded, steps=10, change_batch=spike)
    assert [r["skipped"] for r in rows] == [0] * 8 + [1, 0]
    assert rows[8]["gradient_norm"] > 5 * rows[7]["gradient_norm"] and np.isfinite(rows[8]["loss"])
    assert rows[9]["spikes_total"] == rows[9]["skipped_total"] == 1
    at = 3
    _, rows = run(guarded, steps=5, change_batch=spike)
    assert not any(r["skipped"] for r in rows)


def test_a_skipped_step_makes_no_changes_after_the_update_either():
    class Restarting(toys.ToyTask):
        def after_update(self, parameters, frozen, batch, key, step):
            out = parameters["model"]["out"]
            return nested.merge(parameters, {"model": {"out": {"bias": out["bias"] + jnp.max(batch["x"]) + 40}}})

    experiment = toys.experiment(**{"task.poison": 3})
    shape = experiment.data.buckets[0]
    program = Program.build(experiment, single_device_mesh(), Restarting(experiment.task))
    compiled = program.lower(shape).compile(compiler_options=quick_xla.OPTIONS)
    loader = toys.FakeLoader(experiment.data, seed=0, preprocess=None)
    current, before = program.init(), program.init().parameters
    current, metrics = compiled(current, program.shard_batch(loader.at(0).arrays, shape))
    assert to_host(metrics)["skipped"] == 1
    toys.assert_equal(current.parameters, before)
    current, metrics = compiled(current, program.shard_batch(loader.at(2).arrays, shape))
    assert to_host(metrics)["skipped"] == 0
    assert np.min(current.parameters["model"]["out"]["bias"]) > 40


def test_frozen_parameters_get_no_gradient_and_do_not_change():
    experiment = toys.experiment(**{"optimizer.frozen": "model/blocks"})
    fresh = Program.build(experiment, single_device_mesh()).init()
    after, _ = run(experiment)
    toys.assert_equal(after.parameters["model"]["blocks"], fresh.parameters["model"]["blocks"])
    assert not np.array_equal(after.parameters["model"]["out"]["kernel"], fresh.parameters["model"]["out"]["kernel"])
    assert not any("blocks" in name for name in parameter_paths.name_leaves((after.optimizer, after.ema)))
    lowered = Program.build(experiment, single_device_mesh()).lower(experiment.data.buckets[0]).as_text()
    everything = Program.build(toys.experiment(), single_device_mesh()).lower(experiment.data.buckets[0]).as_text()
    # Weight gradients of the blocks are not computed.
    assert lowered.count("dot_general") < everything.count("dot_general")


def test_frozen_networks_are_read_cast_and_returned_unchanged():
    experiment = toys.experiment(**{"task.frozen": "true", "training.compute_dtype": "bfloat16"})
    after, rows = run(experiment)
    assert (
        after.frozen["encoder"]["kernel"].dtype == jnp.bfloat16 and after.frozen["encoder"]["bias"].dtype == jnp.float32
    )
    np.testing.assert_array_equal(np.asarray(after.frozen["encoder"]["kernel"].astype(jnp.float32)), np.eye(16))
    assert np.isfinite(rows[-1]["loss"]) and not any(name.startswith("frozen") for name in after.saved())


def test_state_is_donated():
    experiment = toys.experiment()
    program, compiled = compiled_step(experiment, single_device_mesh(), 0)
    fresh = program.init()
    batch = toys.FakeLoader(experiment.data, seed=0, preprocess=None).at(0).arrays
    compiled(fresh, program.shard_batch(batch, experiment.data.buckets[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(fresh.parameters))
    analysis = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract))
    assert analysis.alias_size_in_bytes >= 0.95 * held


def test_keys_depend_on_step_and_purpose_only():
    key = jax.random.key(3)
    found = {
        jax.random.key_data(state.key_for(key, purpose, step)).tobytes()
        for purpose in (state.INIT, state.TRAIN, state.EVALUATE, state.VISUALIZE)
        for step in range(20)
    }
    assert len(found) == 80


def test_learning_rate_follows_the_step_and_not_the_updates():
    """A skipped step must not delay the schedule: data and schedule stay in step after a resume."""
    experiment = toys.experiment(**{"task.poison": 16 * 2 * 1 + 3, "optimizer.warmup_steps": 4})
    _, rows = run(experiment, steps=3)
    assert [r["skipped"] for r in rows] == [0, 1, 0]
    np.testing.assert_allclose([r["learning_rate"] for r in rows], [0.0025, 0.005, 0.0075], rtol=1e-6)


@pytest.mark.parametrize(("mesh", "accumulation"), [({"fsdp": 8}, 4), ({"data": 8, "fsdp": 1}, 4)])
def test_a_batch_that_does_not_divide_is_named_before_anything_runs(mesh, accumulation):
    experiment = toys.experiment(**{"training.accumulation": accumulation})
    with pytest.raises(
        ConfigError, match=r"batch_size = 16 must be a multiple of .* = 32; the nearest are 32 and 32|nearest"
    ):
        Program.build(experiment, make_mesh(MeshConfig(**mesh))).check()


@pytest.mark.parametrize(
    "changes", [{"ema.parameters": "net/"}, {"optimizer.frozen": "model/.*kernel", "ema.parameters": ".*kernel"}]
)
def test_an_average_of_nothing_is_refused(changes):
    """It would be the parameters themselves under its name: in evaluations, samples and exports."""
    program = Program.build(toys.experiment(**changes), make_mesh(MeshConfig(fsdp=8)))
    with pytest.raises(ConfigError, match="ema.parameters = .*: matches no trained parameter.* model/"):
        program.check()


def test_copies_of_state_that_fsdp_cannot_split_are_counted_and_named():
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert Program.build(toys.experiment(), mesh).replicated_bytes() == {}
    # 15 x 15: eight copies; 15 x 30: four copies of two shards. Each has two moments and one EMA, float32.
    task = {"task.width": 15, "task.layers": 1}
    program = Program.build(toys.experiment(**task), mesh)
    extra = program.replicated_bytes()
    assert extra["model/out/kernel"] == 15 * 15 * 4 * 4 * 7 // 8
    assert extra["model/blocks/layers/up/kernel"] == 15 * 15 * 4 * 4 * 3 // 4
    warning = program.replication_warning()
    assert "mesh.fsdp = 8" in warning and "model/" in warning
    assert Program.build(toys.experiment(), mesh).replication_warning() is None


def test_parameters_split_over_several_dimensions_train_and_are_restored_on_any_mesh(tmp_path, monkeypatch):
    """No dimension of 12 x 12 is a multiple of eight devices: shards are 3 x 6."""
    monkeypatch.setattr(toys.FakeLoader, "width", 12)
    experiment = toys.experiment(**{"task.width": 12})
    one, expected = run(experiment, steps=2)
    mesh = make_mesh(MeshConfig(fsdp=8))
    many, found = run(experiment, steps=2, mesh=mesh)
    kernel = many.parameters["model"]["out"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 6)
    assert_close(jax.device_get(many.parameters), jax.device_get(one.parameters), 1e-5)
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, many.saved(), {}, {})
    checkpoints.wait()
    for target in (mesh, single_device_mesh(), make_mesh(MeshConfig(data=2, fsdp=4))):
        wanted = Program.build(experiment, target).abstract_state().saved()
        restored = checkpoints.restore(wanted).arrays
        assert all(np.array_equal(restored[name], array) for name, array in many.saved().items())
    checkpoints.close()


@pytest.mark.parametrize("changes", [{}, {"ema.every": 2}])
def test_state_in_host_memory_gives_the_same_run_and_comes_back_from_a_checkpoint(tmp_path, changes):
    mesh = make_mesh(MeshConfig(fsdp=2, seq=2, data=2))
    offload = {"sharding.host_offload": "optimizer,ema"}
    plain, expected = run(toys.experiment(**changes), steps=3, mesh=mesh)
    after, found = run(toys.experiment(**changes, **offload), steps=3, mesh=mesh)
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    for part in ("optimizer", "ema"):
        pairs = zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(plain, part)), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(jax.device_get(ours), jax.device_get(theirs))
            assert ours.sharding.memory_kind == ("pinned_host" if ours.shape else "device")
            assert theirs.sharding.memory_kind == "device"
    assert digest.of_arrays(after.saved()) == digest.of_arrays(plain.saved())
    variants = parameter_variants(after)
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(variants))
    program = Program.build(toys.experiment(**offload), mesh)
    checkpoints = Checkpoints(tmp_path, program.experiment.checkpoint, log=print)
    checkpoints.save(3, after.saved(), {}, {})
    checkpoints.wait()
    restored = checkpoints.restore(program.abstract_state().saved())
    checkpoints.close()
    kinds = {name.split("/")[0]: a.sharding.memory_kind for name, a in restored.arrays.items() if a.ndim}
    assert kinds == {"parameters": "device", "optimizer": "pinned_host", "ema": "pinned_host"}
    assert digest.of_arrays(restored.arrays) == digest.of_arrays(plain.saved())
