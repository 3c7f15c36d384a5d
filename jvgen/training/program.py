"""A run as a program: task, optimizers, shardings and the step, ready to be lowered for devices real or described."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.nn.compute_dtype import cast
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.parallel.rules import Sharding
from jvgen.tasks.task import Batch, Metrics, Task
from jvgen.training import state
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import Optimizer, make_optimizer
from jvgen.training.state import TrainState
from jvgen.training.step import make_train_step

# Global number of each example of a batch, int32: what tasks fold into keys, so that draws do not depend on
# microbatches, hosts or the mesh.
SLOT = "slot"


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything about a run that can be known without data, weights or time on a device.

    Attributes:
      experiment, task: what is run.
      optimizers: one per objective, in order.
      sharding: the mesh with its rules.
      abstract: shapes and dtypes of the state.
      shardings: where the state's arrays lie.
    """

    experiment: Experiment
    task: Task
    optimizers: dict[str, Optimizer]
    sharding: Sharding
    abstract: TrainState
    shardings: TrainState

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mesh, task: Task | None = None) -> "Program":
        """Build the task and everything around it for a mesh, which may be of devices that are not there.

        Raises:
          ConfigError: an optimizer pattern without effect, an optimizer of an objective that the task does not have.
        """
        task = experiment.task.build() if task is None else task
        sharding = Sharding(mesh, experiment.sharding)
        objectives = task.objectives()
        optimizers = {
            objective.name: make_optimizer(
                experiment.optimizers.get(objective.name, experiment.optimizer),
                task.axes(),
                experiment.training.steps,
                objective.parameters,
            )
            for objective in objectives
        }
        unknown = sorted(set(experiment.optimizers) - set(optimizers))
        if unknown:
            raise ConfigError(
                f"optimizers: {unknown[0]!r} is not an objective of this task; it has {list(optimizers)}."
            )
        for path in nested.flatten(task.axes()):
            movers = [name for name, optimizer in optimizers.items() if optimizer.trains(path)]
            assert len(movers) <= 1, f"{path} belongs to several objectives: {movers}"
        dtype = jnp.dtype(experiment.training.compute_dtype)
        abstract = state.abstract_state(task, optimizers, experiment.ema, dtype)
        return cls(experiment, task, optimizers, sharding, abstract, state.state_shardings(task, abstract, sharding))

    def check(self) -> None:
        """Raise `ValueError` for batches that the mesh, the accumulation or the networks cannot divide."""
        for bucket in self.experiment.data.buckets:
            check_batch(self.experiment, bucket, self.sharding)
            self.experiment.task.check_bucket(bucket)

    def abstract_batch(self, bucket: BucketConfig, batch_size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shapes, dtypes and shardings of a batch."""
        size = bucket.batch_size if batch_size is None else batch_size
        shapes = {
            name: jax.ShapeDtypeStruct((size, *spec.shape), jax.dtypes.canonicalize_dtype(spec.dtype))
            for name, spec in self.task.fields(bucket).items()
        }
        shapes[SLOT] = jax.ShapeDtypeStruct((size,), jnp.int32)
        places = self.sharding.batch(shapes)
        return {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[name])
            for name, shape in shapes.items()
        }

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.abstract,
            self.shardings,
        )

    def lower(self, bucket: BucketConfig) -> jax.stages.Lowered:
        """The training step for one batch shape, lowered for the devices of the mesh; the state is donated."""
        step = make_train_step(self.task, self.optimizers, self.experiment.ema, self.experiment.training, self.sharding)
        jitted = jax.jit(step, out_shardings=(self.shardings, self.sharding.replicated), donate_argnums=0)
        return jitted.lower(self.abstract_state(), self.abstract_batch(bucket))

    def given(self) -> tuple[jax.Array, Parameters]:
        """What no checkpoint holds of the state: the run's key, and frozen parameters, read from their files."""
        seed = self.experiment.seed
        key = jax.jit(lambda: jax.random.key(seed), out_shardings=self.sharding.replicated)()
        dtype = jnp.dtype(self.experiment.training.compute_dtype)
        return key, state.place_frozen(self.task, dtype, self.shardings.frozen)

    def init(self) -> TrainState:
        """A fresh state, each shard made on its own device."""
        key, frozen = self.given()
        make = functools.partial(state.init, self.task, self.optimizers, self.experiment.ema)
        # Key and frozen parameters are there already: they are put in afterwards, not copied through the program.
        shardings = dataclasses.replace(self.shardings, key=None, frozen=None)
        lowered = jax.jit(
            lambda key: dataclasses.replace(make(key, {}), key=None, frozen=None), out_shardings=shardings
        ).lower(key)
        # It runs once and has a random generator for every array: on CPU, optimizing it takes four times as long.
        quick = {"xla_backend_optimization_level": 0} if self.sharding.mesh.devices.flat[0].platform == "cpu" else {}
        fresh = lowered.compile(compiler_options=quick)(key)
        return dataclasses.replace(fresh, key=key, frozen=frozen)

    def start_from(self, parameters: Parameters) -> TrainState:
        """A fresh state that begins with these parameters (of all or some networks), its averages too."""
        fresh = self.init()
        places = nested.flatten(self.shardings.parameters)

        def put(path: str, value: Any) -> jax.Array:
            assert places.get(path) is not None, f"{path} is not a parameter of this task"
            return jax.device_put(np.asarray(value, np.float32), places[path])

        given = nested.map_with_path(put, parameters)
        whole = nested.merge(fresh.parameters, given)
        averages = {name: jax.tree.map(jnp.copy, nested.select(whole, average)) for name, average in fresh.ema.items()}
        return dataclasses.replace(fresh, parameters=whole, ema=averages)

    def evaluation(self, method: str) -> Callable[[Parameters, Parameters, Batch, jax.Array], Metrics]:
        """The task's "evaluate", "visualize" or "predicted_clips", jitted, with parameters cast as in training."""
        dtype = jnp.dtype(self.experiment.training.compute_dtype)

        def run(parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Any:
            with axes.partitioned(self.sharding):
                return getattr(self.task, method)(cast(parameters, self.task.axes(), dtype), frozen, batch, key)

        return jax.jit(run, out_shardings=self.sharding.replicated)

    def place(self, arrays: dict[str, np.ndarray], bucket: BucketConfig, host: int, hosts: int) -> Batch:
        """Put this host's slice of a batch on its devices, as a part of the global batch."""
        size = next(iter(arrays.values())).shape[0]
        slots = np.arange(host * size, (host + 1) * size, dtype=np.int32)
        wanted = self.abstract_batch(bucket, size * hosts)
        missing = sorted(set(wanted) - set(arrays) - {SLOT})
        assert not missing, f"the task's prepare() left out {missing}, which its fields() promise"
        return {
            name: jax.make_array_from_process_local_data(
                spec.sharding, (arrays | {SLOT: slots})[name].astype(spec.dtype, copy=False), spec.shape
            )
            for name, spec in wanted.items()
        }


def check_batch(experiment: Experiment, bucket: BucketConfig, sharding: Sharding) -> None:
    """Raise `ConfigError` unless a bucket's batch divides over accumulation and the devices that split it."""
    spec = sharding.config.compute.get(axes.BATCH, ())
    devices = int(np.prod([sharding.mesh.shape[axis] for axis in spec], dtype=int))
    needed = devices * experiment.training.accumulation
    whole = bucket.batch_size // needed
    if bucket.batch_size % needed:
        raise ConfigError(
            f"data.buckets {bucket.name}: batch_size = {bucket.batch_size} must be a multiple of "
            f"{devices} (mesh {' x '.join(spec)}) x {experiment.training.accumulation} (training.accumulation) = "
            f"{needed}; the nearest are {max(1, whole) * needed} and {(whole + 1) * needed}."
        )
