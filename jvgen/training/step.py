"""The training step of every task: a pure function (state, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from jvgen import nested
from jvgen.nn import quantized
from jvgen.nn.attention import automatic
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.parallel.mesh import DATA
from jvgen.parallel.rules import Sharding
from jvgen.precision import float32_products
from jvgen.tasks.task import Batch, CodeUse, Mean, Metrics, Objective, Task
from jvgen.training.config import TrainingConfig
from jvgen.training.network_dtypes import cast_networks, network_dtypes
from jvgen.training.optimization import ema, health
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import Optimizer, clip, global_norm
from jvgen.training.state import TRAIN, TrainState, key_for

STEP = "step"

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    ema_config: EmaConfig,
    training: TrainingConfig,
    sharding: Sharding | None = None,
    *,
    bucket: str | None = None,
    stage_starts: Sequence[int] = (),
    only: Collection[str] | None = None,
) -> Step:
    """Build the training step of a task.

    The gradients of all objectives are taken at the parameters that the step starts from; each optimizer then updates
    its own parameters. Objectives with the same loss share one forward and backward pass. An objective that is inactive
    in a step (see `Objective`) reports no metrics, and nothing of it changes. One with an `OwnUpdate` makes only that.
    A step with a loss or gradient norm that is not finite, or with a spike of the norm
    (`jvgen.training.optimization.health`), is skipped: parameters, moments and EMA stay as they are, also where
    `Task.after_update` would change them, and the skip is counted.

    Args:
      optimizers: one per objective, by name, in the order of `task.objectives()`.
      sharding: constrains activations and gradients while the step is traced; None for one device.
      bucket: key of the bucket that the step is for, see `health.bucket_key`; needed by the spike guard.
      stage_starts: steps at which the statistics of the spike guard start again.
      only: names of the objectives that are active in the steps that this is for, known in advance; the others are left
        out. None: the step decides.

    Returns:
      A pure function to trace under `jax.jit` with the state donated. Its metrics: those of the task, and "loss",
      "gradient_norm" (before clipping), "update_norm" and "learning_rate" (prefixed with "NAME/" if there are several
      objectives), "parameter_norm", "skipped" (0 or 1), "consecutive_skips", "skipped_total", and "spikes_total" (of
      these, the finite ones) with the spike guard.
    """
    objectives = task.objectives()
    assert [o.name for o in objectives] == list(optimizers), "one optimizer per objective, in order"
    own = [objective for objective in objectives if objective.own is not None]
    groups = _group_by_loss([objective for objective in objectives if objective.own is None])
    parameter_axes = task.axes()
    precision, dtypes = training.precision, network_dtypes(task, training.precision)
    # Of Optax's Muon, which its authors compute in bfloat16: only a float32 run pays for more.
    library_precision = precision.matmul_precision if precision.compute_dtype == "float32" else None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = key_for(state.key, TRAIN, state.step)
        metrics: Metrics = {}
        losses, norms, gradients = {}, {}, {}
        # Of objectives that are not active in every step: whether it is active in this one, and the period.
        activity: dict[str, tuple[jax.Array, int]] = {}
        batch = {**batch, STEP: jnp.full_like(batch["slot"], state.step)}
        for index, group in enumerate(groups):
            first, names = group[0], [objective.name for objective in group]
            if only is not None and first.name not in only:
                continue
            trainable = [optimizers[name].trainable for name in names]
            trained, rest = nested.split(state.parameters, lambda path, t=trainable: any(f(path) for f in t))
            group_key = jax.random.fold_in(key, index)

            def loss(
                trained: Parameters,
                microbatch: Batch,
                objective: Objective = first,
                rest: Parameters = rest,
                key: jax.Array = group_key,
            ) -> tuple[jax.Array, Metrics]:
                parameters = cast_networks(nested.merge(rest, trained), parameter_axes, dtypes)
                return objective.loss(parameters, state.frozen, microbatch, key)

            def compute_gradient(trained: Parameters, loss: Any = loss) -> Any:
                return accumulate(loss, trained, batch, training.accumulation, sharding, parameter_axes)

            if only is not None or first.always_active:
                (value, extra), gradient = compute_gradient(trained)
            else:
                active = first.active(state.step)
                (value, extra), gradient = _if_active(active, compute_gradient, trained)
                activity |= {name: (active, first.update_schedule[1]) for name in names}
            gradient = _reduce_scatter(gradient, parameter_axes, sharding)
            extra = {**extra, "loss": value}
            if names[0] in activity:
                extra = _only_if_active(extra, activity[names[0]][0])
            prefix = f"{first.name}/" if len(groups) + len(own) > 1 else ""
            metrics |= {f"{prefix}{name}": metric for name, metric in extra.items()}
            for name in names:
                losses[name], gradients[name] = value, nested.split(gradient, optimizers[name].trainable)[0]
                norms[name] = global_norm(gradients[name])
        changed: dict[str, tuple[Parameters, Any]] = {}
        for index, objective in enumerate(own, len(groups)):
            name = objective.name
            if only is not None and name not in only:
                continue
            trained, _ = nested.split(state.parameters, optimizers[name].trainable)
            own_key = jax.random.fold_in(key, index)
            decided = only is not None or objective.always_active
            new, moments, extra = _own_update(
                objective, trained, state.optimizer[name], batch, own_key, None if decided else state.step
            )
            changed[name] = (new, moments)
            # There is no gradient to look at: parameters that are not finite make the step unsound.
            finite = jnp.isfinite(global_norm(new))
            losses[name], norms[name] = extra["loss"], jnp.where(finite, 0.0, jnp.nan)
            if not decided:
                activity[name] = (objective.active(state.step), objective.update_schedule[1])
                extra = _only_if_active(extra, activity[name][0])
            prefix = f"{name}/" if len(objectives) > 1 else ""
            metrics |= {f"{prefix}{metric}": value for metric, value in extra.items()}

        new_stage = jnp.isin(state.step, jnp.asarray(stage_starts, jnp.int32)) if stage_starts else False
        healthy, counts = health.check_step(
            training, state.health, losses, norms, bucket=bucket, new_stage=new_stage, activity=activity
        )
        parameters, moments = state.parameters, {}
        for objective in objectives:
            name, prefix = objective.name, f"{objective.name}/" if len(objectives) > 1 else ""
            if name in changed:
                new, moments[name] = changed[name]
                parameters = nested.merge(parameters, new)
                continue
            if only is not None and name not in only:
                moments[name] = state.optimizer[name]
                continue
            optimizer = optimizers[name]
            rate = optimizer.learning_rate(state.step)
            trained, _ = nested.split(state.parameters, optimizer.trainable)
            gradient = clip(gradients[name], norms[name], optimizer.clip_norm)
            with jax.default_matmul_precision(library_precision):
                updates, moments[name] = optimizer.update(gradient, state.optimizer[name], trained, rate)
            extra = {"gradient_norm": norms[name], "update_norm": global_norm(updates)}
            if name in activity:
                active, _ = activity[name]
                updates = jax.tree.map(lambda update, active=active: jnp.where(active, update, 0), updates)
                moments[name] = _select(active, moments[name], state.optimizer[name])
                extra = _only_if_active(extra, active)
            metrics |= {f"{prefix}{key}": value for key, value in extra.items()} | {f"{prefix}learning_rate": rate}
            parameters = nested.merge(parameters, jax.tree.map(jnp.add, trained, updates))
        averaged = ema.update(ema_config, state.ema, parameters, state.health.count, healthy)

        parameters = task.after_update(
            parameters, state.frozen, batch, jax.random.fold_in(key, len(objectives)), state.step
        )
        parameters = _select(healthy, parameters, state.parameters)
        metrics |= {
            "parameter_norm": global_norm(parameters),
            "skipped": 1 - healthy.astype(jnp.int32),
            "consecutive_skips": counts.consecutive,
            "skipped_total": counts.skipped,
        }
        if training.spike_sigma:
            metrics["spikes_total"] = counts.spikes
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            parameters=parameters,
            optimizer=_select(healthy, moments, state.optimizer),
            ema=averaged,
            health=counts,
        )
        return state, metrics

    def partitioned_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Around the forward and the backward pass, which are traced in here.
        with (
            axes.partitioned(sharding),
            float32_products(precision.matmul_precision),
            quantized.products(precision.quantized),
            automatic(training.attention),
        ):
            return step(state, batch)

    return partitioned_step


def _group_by_loss(objectives: Sequence[Objective]) -> list[list[Objective]]:
    """Objectives grouped by loss function, in order of the first of each group."""
    groups: list[list[Objective]] = []
    for objective in objectives:
        group = next((group for group in groups if group[0].loss == objective.loss), None)
        if group is None:
            groups.append([objective])
        else:
            assert group[0].schedule == objective.schedule, f"{objective.name}: same loss, other update schedule"
            group.append(objective)
    return groups


def _own_update(
    objective: Objective,
    trained: Parameters,
    moments: Any,
    batch: Batch,
    key: jax.Array,
    step: jax.Array | None,
) -> tuple[Parameters, Any, Metrics]:
    """Parameters, state and metrics after an objective's own update, if it is active in `step`; None: it is."""

    def apply(trained: Parameters, moments: Any) -> tuple[Parameters, Any, Metrics]:
        return objective.own.apply(trained, moments, batch, key)

    if step is None:
        return apply(trained, moments)
    apply = jax.jit(apply)
    *_, metrics = jax.eval_shape(apply, trained, moments)

    def keep(trained: Parameters, moments: Any) -> tuple[Parameters, Any, Metrics]:
        return trained, moments, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)

    return jax.lax.cond(objective.active(step), apply, keep, trained, moments)


def _if_active(active: jax.Array, compute: Callable[[Parameters], Any], trained: Parameters) -> Any:
    """`compute(trained)` (loss, metrics and gradient), or zeros that cost nothing.

    On CPUs convolutions in the branch are about fifty times slower than outside of it, so alternating adversarial
    updates are for TPUs and GPUs; `Task.program_per_activity` avoids the branch.
    """
    # Traced once: for its shapes, and for the branch.
    compute = jax.jit(compute)
    shapes = jax.eval_shape(compute, trained)

    def zeros(_: Parameters) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return jax.lax.cond(active, compute, zeros, trained)


def _only_if_active(metrics: Metrics, active: jax.Array) -> Metrics:
    """Metrics as `Mean`s, with count 0 in steps in which the objective is inactive; counts of codes are 0 then."""
    means: Metrics = {}
    for name, metric in metrics.items():
        if isinstance(metric, CodeUse):
            means[name] = CodeUse(jnp.where(active, metric.counts, 0))
            continue
        total, count = metric if isinstance(metric, Mean) else (metric.astype(jnp.float32), jnp.float32(1))
        means[name] = Mean(jnp.where(active, total, 0), jnp.where(active, count, 0))
    return means


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    # A select, not a branch: XLA fuses it into the update, which reads the old value in any case.
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def accumulate(
    loss: Callable[[Parameters, Batch], tuple[jax.Array, Metrics]],
    parameters: Parameters,
    batch: Batch,
    count: int,
    sharding: Sharding | None = None,
    parameter_axes: Parameters | None = None,
) -> tuple[tuple[jax.Array, Metrics], Parameters]:
    """Loss, metrics and gradient of a batch, computed in `count` microbatches one after the other.

    The result equals that of the whole batch up to rounding where the loss is a mean over examples; what a loss takes
    from all of its batch (the adaptive weight of a discriminator) is that of a microbatch. `Mean` metrics and
    counts of codes are summed, other metrics averaged. Random draws are the same for any `count` if the loss derives
    them from `batch["slot"]`. Each device keeps its own examples: with one replica of the parameters (mesh axis `data`)
    microbatch m holds the examples m, m + count, m + 2 count, ...

    Each replica adds up gradients of its own, and their sum over the replicas is taken once, after the last microbatch:
    the loss is mapped over a leading axis of replicas, which is split over `data`.

    Args:
      parameter_axes: logical axes of (at least) the parameters, needed with a sharding.
    """
    gradient_of = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        return gradient_of(parameters, batch)
    replicas = 1 if sharding is None else sharding.batch_replicas
    microbatches = {
        name: rearrange(value, "(replica batch micro) ... -> micro replica batch ...", replica=replicas, micro=count)
        for name, value in batch.items()
    }
    local = None if sharding is None else sharding.within_replica()

    def of_replica(microbatch: Batch) -> tuple[tuple[jax.Array, Metrics], Parameters]:
        if sharding is None:
            return gradient_of(parameters, microbatch)
        with axes.partitioned(local):
            microbatch = jax.lax.with_sharding_constraint(microbatch, local.batch(microbatch))
            result, gradient = gradient_of(parameters, microbatch)
        return result, _reduce_scatter(gradient, parameter_axes, local)

    def of_replicas(microbatch: Batch) -> tuple[tuple[jax.Array, Metrics], Parameters]:
        if replicas == 1:
            results = of_replica({name: value[0] for name, value in microbatch.items()})
            return jax.tree.map(lambda leaf: leaf[None], results)
        # One number for all, so that a condition on it stays a branch.
        steps = {STEP: microbatch[STEP][0]} if STEP in microbatch else {}
        mapped = {name: value for name, value in microbatch.items() if name != STEP}
        return jax.vmap(lambda mapped: of_replica(mapped | steps), spmd_axis_name=DATA)(mapped)

    def body(total: Parameters, microbatch: Batch) -> tuple[Parameters, tuple[jax.Array, Metrics]]:
        result, gradient = of_replicas(microbatch)
        return jax.tree.map(jnp.add, total, gradient), result

    zeros = jax.tree.map(lambda leaf: jnp.zeros((replicas, *leaf.shape), leaf.dtype), parameters)
    if sharding is not None:
        shardings = sharding.storage(nested.select(parameter_axes, parameters), parameters)
        zeros = jax.lax.with_sharding_constraint(zeros, jax.tree.map(_by_replica, shardings))
    # XLA's CPU convolutions lose their fast path inside a loop.
    total, (losses, metrics) = jax.lax.scan(body, zeros, microbatches, unroll=axes.platform() == "cpu")
    gradient = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / (count * replicas), total)
    metrics = jax.tree.map(lambda leaf: rearrange(leaf, "micro replica ... -> (micro replica) ..."), metrics)
    return (jnp.mean(losses), _merge_microbatches(metrics)), gradient


def _by_replica(sharding: NamedSharding) -> NamedSharding:
    """Of a stack of an array's copies, one for each replica."""
    return NamedSharding(sharding.mesh, PartitionSpec(DATA, *sharding.spec))


def _merge_microbatches(stacked: Metrics) -> Metrics:
    def merge(metric: jax.Array | Mean | CodeUse) -> jax.Array | Mean | CodeUse:
        if isinstance(metric, (Mean, CodeUse)):
            return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), metric)
        return jnp.mean(metric.astype(jnp.float32), axis=0)

    return {name: merge(metric) for name, metric in stacked.items()}


def _reduce_scatter(gradient: Parameters, parameter_axes: Parameters, sharding: Sharding | None) -> Parameters:
    """Gradients in the storage sharding of their parameters, so that norms and updates work on shards."""
    if sharding is None:
        return gradient
    shardings = sharding.storage(nested.select(parameter_axes, gradient), gradient)
    return jax.lax.with_sharding_constraint(gradient, shardings)
