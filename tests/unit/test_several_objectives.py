"""The training step with several objectives: one pass for both, alternating, one that updates itself."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen.config import ConfigError  # noqa: E402
from jvgen.parallel.mesh import single_device_mesh  # noqa: E402
from jvgen.tasks.task import Objective, OwnUpdate  # noqa: E402
from jvgen.training.optimization.optimizer import OptimizerConfig  # noqa: E402
from jvgen.training.program import Program  # noqa: E402
from jvgen.training.telemetry.metrics import to_host  # noqa: E402
from tests import quick_xla

# Most tests compile the same programs again.
pytestmark = pytest.mark.usefixtures("shared_compilations")


class Rivals(toys.GameTask):
    """The game with one loss for both, or with alternating updates."""

    def __init__(self, shared: bool, period: int = 1):
        super().__init__()
        self.shared, self.period = shared, period

    def objectives(self):
        one, other = super().objectives()
        if self.shared:
            both = self.both
            return Objective("generator", one.parameters, both), Objective("critic", other.parameters, both)
        return tuple(dataclasses.replace(o, update_schedule=(n, self.period)) for n, o in enumerate((one, other)))

    def both(self, parameters, frozen, batch, key):
        assert batch["step"].shape == batch["slot"].shape
        generator, critic = parameters["generator"]["value"][0], parameters["critic"]["value"][0]
        constant = jax.lax.stop_gradient
        return generator * constant(critic) - constant(generator) * critic, {"step": jnp.max(batch["step"])}


def run_task(task, steps: int):
    experiment = toys.experiment(**{"training.spike_sigma": 6.0}).replace(
        task=toys.GameConfig(),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0),
        optimizers={"critic": OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.0)},
    )
    program = Program.build(experiment, single_device_mesh(), task)
    shape = experiment.data.buckets[0]
    compiled = program.lower(shape).compile(compiler_options=quick_xla.OPTIONS)
    arrays = toys.FakeLoader(experiment.data, seed=0, preprocess=None).at(0).arrays
    current, rows = program.init(), []
    for _ in range(steps):
        current, metrics = compiled(current, program.shard_batch(arrays, shape))
        rows.append(to_host(metrics))
    return current, rows


def test_objectives_with_one_loss_share_a_pass():
    """One gradient for both, and each is updated by its own optimizer, as with separate passes."""
    apart, _ = run_task(Rivals(shared=False), 2)
    shared, rows = run_task(Rivals(shared=True), 2)
    toys.assert_equal(shared.parameters, apart.parameters)
    toys.assert_equal(shared.optimizer, apart.optimizer)
    assert rows[1]["step"] == 1 and rows[0]["loss"] == 0.0
    assert rows[0]["generator/gradient_norm"] == 2.0 and rows[0]["critic/gradient_norm"] == 1.0


def test_objectives_may_alternate():
    after, rows = run_task(Rivals(shared=False, period=2), 3)
    assert [("generator/loss" in row, "critic/loss" in row) for row in rows] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert rows[1]["critic/update_norm"] > 0 and "generator/update_norm" not in rows[1]
    values = {name: float(tree["value"][0]) for name, tree in after.parameters.items()}
    # Twice 0.1 against a critic above zero, once 0.01 against a generator above zero.
    np.testing.assert_allclose(values["generator"], 1.0 - 0.2, rtol=1e-5)
    np.testing.assert_allclose(values["critic"], 2.0 + 0.01, rtol=1e-6)
    assert int(after.optimizer["generator"]["adam"].count) == 2 and int(after.optimizer["critic"]["adam"].count) == 1
    # Norms of the steps in which it was active, and of no others.
    of_critic = after.health.norms["1x4x1x1x16"]["critic"]
    np.testing.assert_allclose(of_critic.mean, rows[1]["critic/gradient_norm"])
    assert int(of_critic.count) == 1


def test_an_optimizer_of_an_unknown_objective_is_a_mistake():
    experiment = toys.experiment().replace(optimizers={"critik": OptimizerConfig()})
    with pytest.raises(ConfigError, match="critik.*not an objective"):
        Program.build(experiment, single_device_mesh())


class SelfTaught(toys.GameTask):
    """The critic changes itself, from step 2 on: its value, and the loss of a step, is the number of its updates."""

    def __init__(self, poisoned: int = -1, where: str = "loss"):
        super().__init__()
        self.poisoned, self.where = poisoned, where

    def objectives(self):
        generator, _ = super().objectives()
        generator = dataclasses.replace(generator, update_schedule=(0, 3), every_step_before=2)
        own = OwnUpdate(lambda parameters: {"count": jnp.zeros(())}, self.count)
        return generator, Objective("critic", "critic/", own=own, start_step=2)

    def count(self, parameters, state, batch, key):
        count = state["count"] + 1
        poison = jnp.where(batch["step"][0] == self.poisoned, jnp.nan, 0)
        value, loss = (count + poison if where == self.where else count for where in ("parameters", "loss"))
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), parameters), {"count": count}, {"loss": loss}


def test_an_objective_may_update_itself_and_start_later():
    experiment = toys.experiment().replace(
        task=toys.GameConfig(), optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    )
    compiled, states = {}, {}
    arrays = toys.FakeLoader(experiment.data, seed=0, preprocess=None).at(0).arrays
    shape = experiment.data.buckets[0]
    for name, poisoned, where in (("good", -1, "loss"), ("poisoned", 4, "loss"), ("diverged", 4, "parameters")):
        program = Program.build(experiment, single_device_mesh(), SelfTaught(poisoned, where))
        step = program.lower(shape).compile(compiler_options=quick_xla.OPTIONS)
        current, rows, values = program.init(), [], []
        for _ in range(7):
            current, metrics = step(current, program.shard_batch(arrays, shape))
            rows.append(to_host(metrics))
            values.append(float(current.parameters["critic"]["value"][0]))
        compiled[name], states[name] = rows, values
    assert states["good"] == [2, 2, 1, 2, 3, 4, 5]
    losses = [row.get("critic/loss") for row in compiled["good"]]
    assert losses[2:] == [1, 2, 3, 4, 5] and not any(np.isfinite(loss or np.nan) for loss in losses[:2])
    # The generator: in every step before the second, then in every third.
    trained = [np.isfinite(row.get("generator/loss") or np.nan) for row in compiled["good"]]
    assert trained == [True, True, False, True, False, False, True]
    # Programs of steps that are known to update some of them alone do the same.
    program = Program.build(experiment, single_device_mesh(), SelfTaught())
    current = program.init()
    for number, row in enumerate(compiled["good"][:4]):
        only = tuple(objective.name for objective in program.task.objectives() if objective.active(number))
        step = program.lower(shape, only).compile(compiler_options=quick_xla.OPTIONS)
        current, metrics = step(current, program.shard_batch(arrays, shape))
        assert {name: value for name, value in row.items() if "learning_rate" not in name} == {
            name: value for name, value in to_host(metrics).items() if "learning_rate" not in name
        }
        assert float(current.parameters["critic"]["value"][0]) == states["good"][number]
    # Of a step whose loss or whose parameters are not finite nothing stays.
    for name in ("poisoned", "diverged"):
        assert states[name] == [2, 2, 1, 2, 2, 3, 4] and compiled[name][4]["skipped"] == 1
    with pytest.raises(ConfigError, match=r"'critic' is not an objective of this task with an optimizer"):
        changed = experiment.replace(optimizers={"critic": OptimizerConfig()})
        Program.build(changed, single_device_mesh(), SelfTaught())
