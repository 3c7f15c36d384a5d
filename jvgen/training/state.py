"""The training state: one registered dataclass of arrays, initialized shard by shard on the devices."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import nested
from jvgen.nn.compute_dtype import compute_shapes, is_cast
from jvgen.nn.network import Parameters
from jvgen.parallel.rules import HOST_MEMORY, Sharding
from jvgen.tasks.task import Task
from jvgen.training.optimization import ema, health, parameter_paths
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.health import Health
from jvgen.training.optimization.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and returns, donated to the step.

    Attributes:
      step: int32 scalar, number of steps done, skipped ones included.
      parameters: float32, `{network: ...}`.
      optimizer: optimizer state by objective name.
      ema: EMA parameters by decay ("0.9999").
      health: counts of skipped steps, statistics of gradient norms.
      key: random key of the run, constant; each use folds in its purpose and the step.
      frozen: parameters of frozen networks, read from their own files and never saved.
    """

    step: jax.Array
    parameters: Parameters
    optimizer: dict[str, Any]
    ema: dict[str, Parameters]
    health: Health
    key: jax.Array
    frozen: Parameters

    def saved(self) -> dict[str, jax.Array]:
        """The arrays of a checkpoint by name: all but `key` (derived from the seed) and `frozen`."""
        return parameter_paths.name_leaves(
            {
                "step": self.step,
                "parameters": self.parameters,
                "optimizer": self.optimizer,
                "ema": self.ema,
                "health": self.health,
            }
        )

    @staticmethod
    def may_be_missing(name: str, saved: Collection[str]) -> bool:
        """Whether a checkpoint with the arrays `saved` may lack this one, or hold it in vain.

        Statistics of the spike guard start again; so do optimizer and EMA after a checkpoint of parameters alone.
        """
        if name.startswith(("optimizer/", "ema/")):
            return not any(other.startswith(("optimizer/", "ema/")) for other in saved)
        counts = ("health/count", "health/consecutive", "health/skipped")
        return name.startswith("health/") and name not in counts

    def with_saved(self, arrays: Mapping[str, Any]) -> "TrainState":
        """A copy with the `saved()` leaves taken from `arrays`."""
        parts = {name: getattr(self, name) for name in ("step", "parameters", "optimizer", "ema", "health")}
        leaves, structure = jax.tree.flatten(parts)
        names = list(parameter_paths.name_leaves(parts))
        assert len(names) == len(leaves)
        return dataclasses.replace(self, **structure.unflatten([arrays[name] for name in names]))


def init(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    ema_config: EmaConfig,
    key: jax.Array,
    frozen: Parameters,
    guarded_buckets: Sequence[str] = (),
) -> TrainState:
    """A fresh state. Pure: trace it under `jax.jit` with `out_shardings`.

    Args:
      guarded_buckets: keys of the buckets with statistics of gradient norms, see `health.bucket_key`.
    """
    parameters = task.init(jax.random.fold_in(key, INIT))
    return dataclasses.replace(start(optimizers, ema_config, parameters, guarded_buckets), key=key, frozen=frozen)


def start(
    optimizers: Mapping[str, Optimizer],
    ema_config: EmaConfig,
    parameters: Parameters,
    guarded_buckets: Sequence[str] = (),
) -> TrainState:
    """The state at step 0 with these parameters, without `key` and `frozen`. Pure."""
    trained, _ = nested.split(parameters, lambda path: any(o.trainable(path) for o in optimizers.values()))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer={
            name: optimizer.init(nested.split(parameters, optimizer.trainable)[0])
            for name, optimizer in optimizers.items()
        },
        ema=ema.init(ema_config, trained),
        health=health.Health.start(optimizers, guarded_buckets),
        key=None,
        frozen=None,
    )


# Purposes of keys: fold_in(fold_in(run key, purpose), step).
INIT, TRAIN, EVALUATE, VISUALIZE = range(4)


def key_for(key: jax.Array, purpose: int, step: jax.Array | int) -> jax.Array:
    """The random key of one purpose at one step; the same after any number of restarts."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), step)


def abstract_state(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    ema_config: EmaConfig,
    dtypes: Mapping[str, jnp.dtype],
    guarded_buckets: Sequence[str] = (),
) -> TrainState:
    """Shapes and dtypes of the state; allocates nothing and reads no file. `dtypes`: see `network_dtypes`."""
    frozen = {
        name: compute_shapes(network.shapes, network.axes, dtypes[name])
        for name, network in sorted(task.frozen_networks.items())
    }
    return jax.eval_shape(
        lambda key, frozen: init(task, optimizers, ema_config, key, frozen, guarded_buckets), jax.random.key(0), frozen
    )


def state_shardings(task: Task, abstract: TrainState, sharding: Sharding) -> TrainState:
    """Sharding of each array of the state: moments and EMA as their parameters, scalars replicated.

    Those that `sharding.host_offload` names are in host memory, scalars excepted.
    """
    parameters = sharding.storage(task.axes(), abstract.parameters)
    by_path = nested.flatten(parameters)
    shapes = {path: leaf.shape for path, leaf in nested.flatten(abstract.parameters).items()}

    def sharding_of(path: Any, leaf: Any) -> Any:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        # The path of a moment ends with the path of its parameter.
        for start in range(len(keys)):
            name = "/".join(keys[start:])
            if shapes.get(name) == leaf.shape:
                return by_path[name]
        return sharding.replicated

    def held(part: str, shardings: Any) -> Any:
        return in_host_memory(shardings, getattr(abstract, part)) if part in sharding.config.host_offload else shardings

    return TrainState(
        step=sharding.replicated,
        parameters=parameters,
        optimizer=held("optimizer", jax.tree_util.tree_map_with_path(sharding_of, abstract.optimizer)),
        ema=held("ema", {name: nested.select(parameters, averaged) for name, averaged in abstract.ema.items()}),
        health=jax.tree.map(lambda _: sharding.replicated, abstract.health),
        key=sharding.replicated,
        frozen=sharding.frozen(task.frozen_axes(), abstract.frozen) if abstract.frozen else {},
    )


def in_host_memory(shardings: Any, abstract: Any) -> Any:
    """The shardings with the arrays in host memory; scalars stay on the devices, where they cost nothing."""
    return jax.tree.map(lambda s, leaf: s.with_memory_kind(HOST_MEMORY) if leaf.shape else s, shardings, abstract)


def on_devices(tree: Any) -> Any:
    """Arrays of the state, or their shardings, in device memory; those that are there already are returned as is."""

    def moved(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        place = leaf.sharding if is_array else leaf
        if place.memory_kind != HOST_MEMORY:
            return leaf
        place = place.with_memory_kind("device")
        return jax.device_put(leaf, place) if is_array else place

    return jax.tree.map(moved, tree, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.Sharding))


def load_frozen(task: Task, dtypes: Mapping[str, jnp.dtype], shardings: Parameters) -> Parameters:
    """Parameters of the frozen networks, read from their files and sharded, in these dtypes."""
    loaded = task.load_frozen()
    if not loaded:
        return {}
    axes = nested.flatten(task.frozen_axes())
    shardings = nested.flatten(shardings)

    def shard(path: str, value: np.ndarray) -> jax.Array:
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        wanted = dtypes[path.split("/")[0]]
        dtype = wanted if floating and is_cast(value.shape, axes[path]) else value.dtype
        return jax.make_array_from_callback(
            value.shape, shardings[path], lambda index: np.asarray(value[index]).astype(dtype)
        )

    return nested.map_with_path(shard, loaded)


def size_of(tree: Any) -> tuple[int, int]:
    """Number of elements and bytes over all leaves."""
    leaves = jax.tree.leaves(tree)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return count, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
