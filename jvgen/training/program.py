"""A run as a program: task, optimizers, shardings and training step, lowered for real or described devices."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.nn import quantized
from jvgen.nn.attention import automatic
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.parallel.rows import global_array, rows_by_process
from jvgen.parallel.rules import Sharding
from jvgen.precision import float32_products
from jvgen.tasks.task import Batch, Metrics, Task
from jvgen.training import state
from jvgen.training.experiment import Experiment
from jvgen.training.network_dtypes import cast_networks, describe_precision, network_dtypes
from jvgen.training.optimization import health, parameter_paths
from jvgen.training.optimization.optimizer import Optimizer, make_optimizer, own_optimizer
from jvgen.training.state import TrainState, on_devices
from jvgen.training.step import Step, make_train_step

# Index of each example in the global batch, int32. Tasks fold it into random keys, so that draws do not depend on
# microbatches, processes or the mesh.
SLOT = "slot"


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything about a run that is known without data, weights or a device.

    Attributes:
      experiment, task: the run.
      optimizers: one per objective, in order.
      sharding: mesh and sharding rules.
      abstract: shapes and dtypes of the state.
      shardings: sharding of each array of the state.
    """

    experiment: Experiment
    task: Task
    optimizers: dict[str, Optimizer]
    sharding: Sharding
    abstract: TrainState
    shardings: TrainState

    @classmethod
    def build(cls, experiment: Experiment, mesh: Mesh, task: Task | None = None) -> "Program":
        """Build the program for a mesh, whose devices may be described ones that are not attached.

        Raises:
          ConfigError: an optimizer pattern that matches nothing, or an optimizer of an unknown objective.
        """
        task = experiment.task.build() if task is None else task
        sharding = Sharding(mesh, experiment.sharding)
        objectives = task.objectives()
        optimizers = {
            objective.name: own_optimizer(objective.parameters, objective.own.init)
            if objective.own is not None
            else make_optimizer(
                experiment.optimizers.get(objective.name, experiment.optimizer),
                task.axes(),
                experiment.training.steps,
                objective.parameters,
            )
            for objective in objectives
        }
        configurable = [objective.name for objective in objectives if objective.own is None]
        unknown = sorted(set(experiment.optimizers) - set(configurable))
        if unknown:
            raise ConfigError(
                f"optimizers: {unknown[0]!r} is not an objective of this task with an optimizer; it has {configurable}."
            )
        for path in nested.flatten(task.axes()):
            owners = [name for name, optimizer in optimizers.items() if optimizer.trainable(path)]
            assert len(owners) <= 1, f"{path} belongs to several objectives: {owners}"
        dtypes = network_dtypes(task, experiment.training.precision)
        abstract = state.abstract_state(task, optimizers, experiment.ema, dtypes, _guarded_buckets(experiment))
        for network in task.frozen_networks.values():
            network.freeze()
        if abstract.frozen:
            sharding = sharding.holding(task.frozen_axes(), abstract.frozen)
        return cls(experiment, task, optimizers, sharding, abstract, state.state_shardings(task, abstract, sharding))

    @functools.cached_property
    def dtypes(self) -> dict[str, jnp.dtype]:
        """The dtype that each network computes in."""
        return network_dtypes(self.task, self.experiment.training.precision)

    @property
    def precision(self) -> str:
        """The precision policy in one line, for the start of a run."""
        return describe_precision(self.task, self.experiment.training.precision)

    def cast(self, parameters: Parameters) -> Parameters:
        """Parameters of the trained networks in the dtypes that training computes with."""
        return cast_networks(parameters, self.task.axes(), self.dtypes)

    def sharding_of(self, bucket: BucketConfig) -> Sharding:
        """The sharding of a batch shape's step, see `ShardingConfig.whole_examples`."""
        examples, rest = divmod(bucket.batch_size, self.experiment.training.accumulation)
        return self.sharding if rest else self._whole_examples(examples)

    def _whole_examples(self, examples: int) -> Sharding:
        if not self.sharding.config.whole_examples:
            return self.sharding
        return self.sharding.spreading(examples, (axes.HEADS, axes.MLP))

    @contextlib.contextmanager
    def tracing(self, examples: int | None = None) -> Iterator[None]:
        """Enter it inside a function to compile: it is traced with the run's sharding, precision and kernels.

        Args:
          examples: of the function's batch, to be taken whole where they divide over all devices; None for tokens that
            are split as the rules say.
        """
        training = self.experiment.training
        with (
            axes.partitioned(self.sharding if examples is None else self._whole_examples(examples)),
            float32_products(training.precision.matmul_precision),
            automatic(training.attention),
        ):
            yield

    def check(self) -> None:
        """Raise `ValueError` for batches that do not divide over the mesh, the accumulation or the networks, for an EMA
        of no parameter, and for products in 8 bits without the package that makes them."""
        quantized.check_installed(self.experiment.training.precision.quantized)
        if any(not nested.flatten(averaged) for averaged in self.abstract.ema.values()):
            trained = [
                path
                for path in nested.flatten(self.task.axes())
                if any(optimizer.trainable(path) for optimizer in self.optimizers.values())
            ]
            raise ConfigError(
                f"ema.parameters = {self.experiment.ema.parameters!r}: matches no trained parameter (it is matched "
                "from the start of the path), so EMA would be the parameters themselves. Paths are such as "
                f"{', '.join(trained[:3])}; or set ema.decays = () for none."
            )
        for bucket in self.experiment.data.buckets:
            check_batch(self.experiment, bucket, self.sharding)
            self.experiment.task.check_bucket(bucket)

    def abstract_batch(self, bucket: BucketConfig) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shapes, dtypes and shardings of a batch."""
        size = bucket.batch_size
        shapes = {
            name: jax.ShapeDtypeStruct((size, *spec.shape), jax.dtypes.canonicalize_dtype(spec.dtype))
            for name, spec in self.task.fields(bucket).items()
        }
        shapes[SLOT] = jax.ShapeDtypeStruct((size,), jnp.int32)
        shardings = self.sharding.batch(shapes)
        return {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
            for name, shape in shapes.items()
        }

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract,
            self.shardings,
        )

    def replicated_bytes(self) -> dict[str, int]:
        """What a device holds beyond its share of parameters, moments and EMA, in bytes by path of the parameter.

        Of parameters that `fsdp` and `seq` should split and cannot split completely, see `Sharding.replicas_of`;
        without those that are replicated because they are small.
        """
        arrays = list(
            parameter_paths.name_leaves((self.abstract.parameters, self.abstract.optimizer, self.abstract.ema))
        )
        shardings = nested.flatten(self.shardings.parameters)
        shapes = nested.flatten(self.abstract.parameters)
        extra = {}
        for path, names in nested.flatten(self.task.axes()).items():
            shape = shapes[path].shape
            replicas = self.sharding.replicas_of(names, shape)
            if replicas > 1 and self.sharding.splits(names, shape):
                copies = sum(name.endswith(f"/{path}") for name in arrays)
                held = math.prod(shardings[path].shard_shape(shape)) * shapes[path].dtype.itemsize * copies
                extra[path] = held - held // replicas
        return extra

    def replication_warning(self) -> str | None:
        """The message about `replicated_bytes`, if they are more than 1% of what a device holds of the state."""
        extra = self.replicated_bytes()
        arrays = self.abstract_state()
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((arrays.parameters, arrays.optimizer, arrays.ema))
        )
        if sum(extra.values()) <= held / 100:
            return None
        largest = max(extra, key=extra.__getitem__)
        shape = tuple(nested.flatten(arrays.parameters)[largest].shape)
        mesh = self.sharding.mesh.shape
        sizes = " x ".join(f"mesh.{axis} = {mesh[axis]}" for axis in self.sharding.state_axes)
        return (
            f"WARNING: {sizes} has too few factors in common with the shapes of "
            f"{len(extra)} parameters, such as {largest} {shape}: {sum(extra.values()) / 2**20:.1f} of "
            f"{held / 2**20:.1f} MiB of state per device are copies. Choose sizes that divide their dimensions, "
            "and give the other devices to mesh.data."
        )

    def active_in(self, step: int) -> tuple[str, ...] | None:
        """Names of the objectives that a step updates, if each set of them has a program; None if one does for all.

        On CPUs convolutions are fifty times slower inside a conditional.
        """
        cpu = self.sharding.mesh.devices.flat[0].platform == "cpu"
        if not (cpu and self.task.program_per_activity) or self.experiment.training.spike_sigma:
            return None
        return tuple(objective.name for objective in self.task.objectives() if objective.active(step))

    def step(self, bucket: BucketConfig, only: tuple[str, ...] | None = None) -> Step:
        """The training step of a bucket, `(state, batch) -> (state, metrics)`: pure, and not compiled yet.

        Args:
          only: see `active_in`.
        """
        experiment = self.experiment
        optimizers = (experiment.optimizer, *experiment.optimizers.values())
        step = make_train_step(
            self.task,
            self.optimizers,
            experiment.ema,
            experiment.training,
            self.sharding_of(bucket),
            bucket=health.bucket_key(bucket),
            stage_starts=health.stage_starts(experiment.data.buckets, optimizers),
            only=only,
        )
        return self._with_transfers(step) if self.sharding.config.host_offload else step

    def _with_transfers(self, step: Step) -> Step:
        """A step on a state of which parts are in host memory."""
        there = {part: getattr(self.shardings, part) for part in self.sharding.config.host_offload}

        def transferring(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            fetched = {part: jax.device_put(getattr(state, part), on_devices(places)) for part, places in there.items()}
            state, metrics = step(dataclasses.replace(state, **fetched), batch)
            stowed = {part: jax.device_put(getattr(state, part), places) for part, places in there.items()}
            return dataclasses.replace(state, **stowed), metrics

        return transferring

    def lower(self, bucket: BucketConfig, only: tuple[str, ...] | None = None) -> jax.stages.Lowered:
        """The training step for one batch shape, lowered for the devices of the mesh, with the state donated."""
        step, shardings = self.step(bucket, only), (self.shardings, self.sharding.replicated)
        jitted = jax.jit(step, out_shardings=shardings, donate_argnums=0)
        return jitted.lower(self.abstract_state(), self.abstract_batch(bucket))

    def external_inputs(self) -> tuple[jax.Array, Parameters]:
        """The parts of the state that no checkpoint holds: random key, and frozen parameters from their files."""
        seed = self.experiment.seed
        key = jax.jit(lambda: jax.random.key(seed), out_shardings=self.sharding.replicated)()
        return key, state.load_frozen(self.task, self.dtypes, self.shardings.frozen)

    def init(self) -> TrainState:
        """A fresh state; each shard is initialized on its own device."""
        key, frozen = self.external_inputs()
        make = functools.partial(
            state.init,
            self.task,
            self.optimizers,
            self.experiment.ema,
            guarded_buckets=_guarded_buckets(self.experiment),
        )
        # Key and frozen parameters exist already: they are inserted afterwards, not copied through the program.
        shardings = dataclasses.replace(self.shardings, key=None, frozen=None)
        jitted = jax.jit(lambda key: dataclasses.replace(make(key, {}), key=None, frozen=None), out_shardings=shardings)
        # It runs once and has a random generator per array: on CPU, compiling it optimized takes four times as long.
        quick = {"xla_backend_optimization_level": 0} if self.sharding.mesh.devices.flat[0].platform == "cpu" else {}
        # Initialization is compiled even where JAX_DISABLE_JIT=1 asks for a step that is not.
        with jax.disable_jit(False):
            fresh = jitted.lower(key).compile(compiler_options=quick)(key)
        fresh = self._with_initial(fresh)
        return dataclasses.replace(fresh, key=key, frozen=frozen)

    def _with_initial(self, fresh: TrainState) -> TrainState:
        """A fresh state with the parameters that the task starts with."""
        given = nested.flatten(self.task.initial_parameters())
        if not given:
            return fresh
        shapes = {path: leaf.shape for path, leaf in nested.flatten(fresh.parameters).items()}
        for path, value in given.items():
            assert shapes.get(path) == np.shape(value), f"{path}: {np.shape(value)}, the run's is {shapes.get(path)}"
        shardings = nested.flatten(self.shardings.parameters)

        def place(path: str, value: jax.Array) -> jax.Array:
            if path not in given:
                return value
            array = np.asarray(given[path], np.float32)
            return jax.make_array_from_callback(array.shape, shardings[path], lambda index: array[index])

        parameters = nested.map_with_path(place, fresh.parameters)
        return fresh.with_saved(self.start_from(parameters, list(fresh.saved())))

    def start_from(self, parameters: Parameters, names: Sequence[str]) -> dict[str, jax.Array]:
        """Arrays of the state at step 0 with these parameters, which are on the mesh, by name in checkpoints."""

        def start(parameters: Parameters) -> dict[str, jax.Array]:
            fresh = state.start(self.optimizers, self.experiment.ema, parameters, _guarded_buckets(self.experiment))
            arrays = fresh.saved()
            return {name: arrays[name] for name in names}

        shardings = self.shardings.saved()
        with jax.disable_jit(False):
            return jax.jit(start, out_shardings={name: shardings[name] for name in names})(parameters)

    def evaluation(self, method: str) -> Callable[[Parameters, Parameters, Batch, jax.Array], Metrics]:
        """A method of the task ("evaluate", "visualize", "predicted_clips"), jitted; parameters cast as in training."""

        def run(parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Any:
            with self.tracing(len(batch[SLOT])):
                return getattr(self.task, method)(self.cast(parameters), frozen, batch, key)

        return jax.jit(run, out_shardings=self.sharding.replicated)

    def lower_evaluation(self, method: str, bucket: BucketConfig) -> jax.stages.Lowered:
        """`evaluation(method)` for one batch shape, lowered for the devices of the mesh."""
        state = self.abstract_state()
        return self.evaluation(method).lower(state.parameters, state.frozen, self.abstract_batch(bucket), state.key)

    def rows_by_process(self, bucket: BucketConfig) -> dict[int, np.ndarray]:
        """Process index -> the rows (slots) of a bucket's global batch that its devices hold, increasing."""
        size = bucket.batch_size
        return rows_by_process(self.sharding.activation((axes.BATCH,), (size,)), size)

    def rows(self, bucket: BucketConfig) -> np.ndarray:
        """The rows (slots) of a bucket's global batch that the devices of this process hold, increasing."""
        return self.rows_by_process(bucket)[jax.process_index()]

    def shard_batch(self, arrays: dict[str, np.ndarray], bucket: BucketConfig) -> Batch:
        """The global batch, sharded over the mesh, from the rows of this process (`rows`), in their order."""
        rows = self.rows(bucket)
        wanted = self.abstract_batch(bucket)
        missing = sorted(set(wanted) - set(arrays) - {SLOT})
        assert not missing, f"the task's preprocess() left out {missing}, which its fields() promise"
        local = arrays | {SLOT: rows}
        return {
            name: global_array(local[name].astype(spec.dtype, copy=False), rows, spec.shape, spec.sharding)
            for name, spec in wanted.items()
        }


def _guarded_buckets(experiment: Experiment) -> list[str]:
    """Keys of the buckets whose gradient norms have statistics: those of all stages, or none without spike guard."""
    return [health.bucket_key(bucket) for bucket in experiment.data.buckets] if experiment.training.spike_sigma else []


def check_processes(experiment: Experiment, count: int) -> None:
    """Raise `ConfigError` if a task that acts while it trains would have several processes."""
    if experiment.task.collects_experience and count > 1:
        raise ConfigError(
            f"{type(experiment.task).__name__}: acts in one environment, so it runs in one process (with all of its "
            f"devices), not in {count}."
        )


def check_batch(experiment: Experiment, bucket: BucketConfig, sharding: Sharding) -> None:
    """Raise `ConfigError` unless a bucket's batch divides over the accumulation and the devices of the batch axes.

    Also if a failed read would be replaced in a row that another process reads as well, and may read successfully.
    """
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
    # An abstract mesh has no processes.
    if experiment.data.on_failed_read != "quarantine" or not isinstance(sharding.mesh, Mesh):
        return
    size = bucket.batch_size
    held = rows_by_process(sharding.activation((axes.BATCH,), (size,)), size).values()
    if sum(map(len, held)) > size:
        raise ConfigError(
            f"data.on_failed_read = 'quarantine': several processes read the same examples of {bucket.name} on this "
            "mesh (seq or tensor across processes) and could replace different ones; use 'stop'."
        )
