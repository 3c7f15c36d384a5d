"""The training step of every task: a pure function (state, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jvgen import nested
from jvgen.nn.compute_dtype import cast
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.parallel.rules import Sharding
from jvgen.tasks.task import Batch, Mean, Metrics, Objective, Task
from jvgen.training.config import TrainingConfig
from jvgen.training.optimization import ema, health, optimizer
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import Optimizer
from jvgen.training.state import TRAIN, TrainState, key_for

STEP = "step"

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    averages: EmaConfig,
    training: TrainingConfig,
    sharding: Sharding | None = None,
) -> Step:
    """Build the step of a task.

    Every objective's gradient is taken at the same parameters, the ones that the step begins with, and each optimizer
    then moves its own; objectives with the same loss share one pass. Objectives whose turn it is not are at rest: their
    metrics are left out and nothing of theirs changes. A step with a loss or gradient norm that is not finite, or with
    a spike of the norm, leaves parameters, moments and averages as they were and is counted.

    Args:
      optimizers: one per objective, by name.
      sharding: places activations and gradients while the step is traced; None for one device.

    Returns:
      A pure function to trace under `jax.jit` with the state donated. Its metrics: those of the task, and "loss",
      "gradient_norm" (before clipping), "update_norm" and "learning_rate" (after "NAME/" when there are several
      objectives), "parameter_norm", "skipped" (0 or 1), "skipped_in_a_row", "skipped_total".
    """
    objectives = task.objectives()
    assert [o.name for o in objectives] == list(optimizers), "one optimizer an objective, in order"
    groups = _sharing_a_loss(objectives)
    parameter_axes = task.axes()
    dtype = jnp.dtype(training.compute_dtype)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = key_for(state.key, TRAIN, state.step)
        metrics: Metrics = {}
        losses, norms, gradients = {}, {}, {}
        turns: dict[str, tuple[jax.Array, int]] = {}
        batch = {**batch, STEP: jnp.full_like(batch["slot"], state.step)}
        for index, group in enumerate(groups):
            first, names = group[0], [objective.name for objective in group]
            moved = [optimizers[name].trains for name in names]
            trained, rest = nested.split(state.parameters, lambda path, m=moved: any(t(path) for t in m))
            group_key = jax.random.fold_in(key, index)

            def loss(
                trained: Parameters,
                microbatch: Batch,
                objective: Objective = first,
                rest: Parameters = rest,
                key: jax.Array = group_key,
            ) -> tuple[jax.Array, Metrics]:
                parameters = cast(nested.merge(rest, trained), parameter_axes, dtype)
                return objective.loss(parameters, state.frozen, microbatch, key)

            def play(trained: Parameters, loss: Any = loss) -> Any:
                return accumulate(loss, trained, batch, training.accumulation, sharding)

            if first.turn[1] == 1:
                (value, extra), gradient = play(trained)
            else:
                acts = state.step % first.turn[1] == first.turn[0]
                (value, extra), gradient = _if_its_turn(acts, play, trained)
                turns |= {name: (acts, first.turn[1]) for name in names}
            gradient = _placed(gradient, parameter_axes, sharding)
            extra = {**extra, "loss": value}
            if names[0] in turns:
                extra = _counted(extra, turns[names[0]][0])
            prefix = f"{first.name}/" if len(groups) > 1 else ""
            metrics |= {f"{prefix}{name}": metric for name, metric in extra.items()}
            for name in names:
                losses[name], gradients[name] = value, nested.split(gradient, optimizers[name].trains)[0]
                norms[name] = optimizer.global_norm(gradients[name])

        sound = health.is_sound(training, state.health, losses, norms)
        parameters, moments = state.parameters, {}
        for objective in objectives:
            name, prefix = objective.name, f"{objective.name}/" if len(objectives) > 1 else ""
            mine = optimizers[name]
            rate = mine.learning_rate(state.step)
            trained, _ = nested.split(state.parameters, mine.trains)
            gradient = optimizer.clip(gradients[name], norms[name], mine.clip_norm)
            updates, moments[name] = mine.update(gradient, state.optimizer[name], trained, rate)
            told: Metrics = {"gradient_norm": norms[name], "update_norm": optimizer.global_norm(updates)}
            if name in turns:
                acts, _ = turns[name]
                updates = jax.tree.map(lambda update, acts=acts: jnp.where(acts, update, 0), updates)
                moments[name] = _where(acts, moments[name], state.optimizer[name])
                told = _counted(told, acts)
            metrics |= {f"{prefix}{key}": value for key, value in told.items()} | {f"{prefix}learning_rate": rate}
            parameters = nested.merge(parameters, jax.tree.map(jnp.add, trained, updates))
        averaged = ema.update(averages, state.ema, parameters, state.health.count)

        parameters = _where(sound, parameters, state.parameters)
        parameters = task.after_update(
            parameters, state.frozen, batch, jax.random.fold_in(key, len(objectives)), state.step
        )
        counts = health.update(training, state.health, norms, sound, turns)
        metrics |= {
            "parameter_norm": optimizer.global_norm(parameters),
            "skipped": 1 - sound.astype(jnp.int32),
            "skipped_in_a_row": counts.consecutive,
            "skipped_total": counts.skipped,
        }
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            parameters=parameters,
            optimizer=_where(sound, moments, state.optimizer),
            ema=_where(sound, averaged, state.ema),
            health=counts,
        )
        return state, metrics

    def partitioned_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with axes.partitioned(sharding):
            return step(state, batch)

    return partitioned_step


def _sharing_a_loss(objectives: Sequence[Objective]) -> list[list[Objective]]:
    """Objectives with equal loss functions together, in the order of the first of each."""
    groups: list[list[Objective]] = []
    for objective in objectives:
        group = next((group for group in groups if group[0].loss == objective.loss), None)
        if group is None:
            groups.append([objective])
        else:
            assert group[0].turn == objective.turn, f"{objective.name} shares a loss and not the turn"
            group.append(objective)
    return groups


def _if_its_turn(acts: jax.Array, play: Callable[[Parameters], Any], trained: Parameters) -> Any:
    """Loss, metrics and gradient, or zeros that cost nothing."""
    # Traced once: for its shapes, and for the branch.
    play = jax.jit(play)
    shapes = jax.eval_shape(play, trained)

    def rest(_: Parameters) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return jax.lax.cond(acts, play, rest, trained)


def _counted(metrics: Metrics, acts: jax.Array) -> Metrics:
    """Metrics that are left out of the steps in which a player is at rest."""
    counted: Metrics = {}
    for name, metric in metrics.items():
        total, count = metric if isinstance(metric, Mean) else (metric.astype(jnp.float32), jnp.float32(1))
        counted[name] = Mean(jnp.where(acts, total, 0), jnp.where(acts, count, 0))
    return counted


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    # A select, not a branch: XLA fuses it into the update, which reads the old value in any case.
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def accumulate(
    loss: Callable[[Parameters, Batch], tuple[jax.Array, Metrics]],
    parameters: Parameters,
    batch: Batch,
    count: int,
    sharding: Sharding | None = None,
) -> tuple[tuple[jax.Array, Metrics], Parameters]:
    """Loss, metrics and gradient of a batch, computed in `count` microbatches one after the other.

    The result is that of the whole batch (up to rounding): the loss is a mean over examples, `Mean` metrics add up and
    other metrics are averaged. Microbatch m holds the examples m, m + count, m + 2 count, ...: each device keeps its
    own examples, nothing moves between devices. Draws do not depend on it as long as the loss derives them from
    `batch["slot"]`.
    """
    gradient_of = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        return gradient_of(parameters, batch)
    microbatches = {
        name: rearrange(value, "(batch micro) ... -> micro batch ...", micro=count) for name, value in batch.items()
    }

    def body(total: Parameters, microbatch: Batch) -> tuple[Parameters, tuple[jax.Array, Metrics]]:
        if sharding is not None:
            microbatch = jax.lax.with_sharding_constraint(microbatch, sharding.batch(microbatch))
        result, gradient = gradient_of(parameters, microbatch)
        return jax.tree.map(jnp.add, total, gradient), result

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    # XLA's CPU convolutions lose their fast path inside a loop.
    total, (losses, metrics) = jax.lax.scan(body, zeros, microbatches, unroll=axes.platform() == "cpu")
    gradient = jax.tree.map(lambda leaf: leaf / count, total)
    return (jnp.mean(losses), _joined(metrics)), gradient


def _joined(stacked: Metrics) -> Metrics:
    def join(metric: jax.Array | Mean) -> jax.Array | Mean:
        if isinstance(metric, Mean):
            return Mean(jnp.sum(metric.total, axis=0), jnp.sum(metric.count, axis=0))
        return jnp.mean(metric.astype(jnp.float32), axis=0)

    return {name: join(metric) for name, metric in stacked.items()}


def _placed(gradient: Parameters, parameter_axes: Parameters, sharding: Sharding | None) -> Parameters:
    """Gradients lie as the stored parameters do: a reduce-scatter, and a norm over shards."""
    if sharding is None:
        return gradient
    shardings = sharding.storage(nested.select(parameter_axes, gradient), gradient)
    return jax.lax.with_sharding_constraint(gradient, shardings)
