"""Checks of a run before any device is used: every problem that is found goes into one error."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
from jax.sharding import NamedSharding

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.stream.source_checks import check_cache
from jvgen.nn import quantized
from jvgen.nn.attention import automatic
from jvgen.nn.kernel_report import KernelReport, collecting
from jvgen.parallel import axes
from jvgen.parallel.axes import Axes
from jvgen.parallel.mesh import make_mesh
from jvgen.parallel.rules import Sharding
from jvgen.storage import Path, StorageError, absolute, as_path, check_run_directory, is_remote
from jvgen.tasks.task import Task, TaskConfig
from jvgen.tasks.weight_files import named_files
from jvgen.training.balance import with_batch_sizes
from jvgen.training.checkpoint import init_from
from jvgen.training.checkpoint.initial import saved_steps
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program, check_batch, check_processes
from jvgen.training.state import size_of

T = TypeVar("T")
GIB = 2**30
# What to change if the mesh does not divide the dimension with this logical name.
FIXES = {
    axes.LENGTH: "pad the tokens (a token_multiple that mesh.seq divides) or choose another mesh.seq",
    axes.ACTIVATION_HEADS: "choose a mesh.tensor that divides the number of heads",
    axes.HEADS: "choose a mesh.tensor that divides the number of heads",
}


def with_buckets(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """The experiment with only the buckets of these names ("1x49x480x720"); all of them if there are no names.

    Their batch sizes are those that they have beside the others.

    Raises:
      ConfigError: no bucket has the name.
    """
    known = [bucket.name for bucket in experiment.data.buckets]
    for name in names:
        if name not in known:
            raise ConfigError(f"bucket {name!r}: data.buckets has {', '.join(known)}.")
    if not names:
        return experiment
    data = with_batch_sizes(experiment).data
    buckets = tuple(bucket for bucket in data.buckets if bucket.name in names)
    return experiment.replace(data=data.replace(buckets=buckets, tokens_per_step=None))


def check(experiment: Experiment, workdir: Path | None = None, devices: list[jax.Device] | None = None) -> None:
    """Raise one error that lists every problem of a run.

    Checks the mesh, batch sizes, clip sizes, what the mesh has to divide (batch, heads, tokens), the data sets, the
    weight files of frozen networks, the run directory and its free disk space. Allocates no array, loads no weights.

    Args:
      experiment: the run.
      workdir: run directory; not checked if None.
      devices: devices of the mesh; all that JAX sees if None.

    Raises:
      ConfigError: lists every problem, one line each.
    """
    found = inspect_run(experiment, workdir, devices)
    problems = list(dict.fromkeys(problem for area in found.problems.values() for problem in area))
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is found out about a run.

    Attributes:
      problems: messages by area: "config", "data", "weights", "mesh", "division", "run directory".
      program: None if there is a problem with task or mesh.
      loader: the training data; None if there is a problem with it.
    """

    problems: dict[str, list[str]]
    program: Program | None
    loader: Loader | None


def inspect_run(
    experiment: Experiment, workdir: Path | None = None, devices: Sequence[jax.Device] | None = None
) -> Inspection:
    """Every problem of a run by area; arguments are those of `check`. Without devices (an empty list) there is no mesh.

    The division of tokens and heads is only looked at if config and mesh have no other problem.
    """
    problems: dict[str, list[str]] = {area: [] for area in ("config", "data", "weights", "mesh", "division")}
    problems["config"] += _buckets(experiment)
    resolved, found = _attempt(lambda: with_batch_sizes(experiment))
    experiment, problems["config"] = resolved or experiment, problems["config"] + found
    problems["config"] += _attempt(lambda: quantized.check_installed(experiment.training.precision.quantized))[1]
    loader, problems["data"] = _data(experiment)
    problems["weights"] += _weights(experiment.task)
    task, found = _attempt(experiment.task.build)
    problems["config"] += found
    mesh = program = None
    if devices is None or len(devices):
        mesh, problems["mesh"] = _attempt(lambda: make_mesh(experiment.mesh, devices))
    if task is not None and mesh is not None:
        sharding = Sharding(mesh, experiment.sharding)
        count = len({device.process_index for device in mesh.devices.flat})
        problems["mesh"] += _attempt(lambda: check_processes(experiment, count))[1]
        for bucket in experiment.data.buckets:
            problems["division"] += _attempt(lambda bucket=bucket: check_batch(experiment, bucket, sharding))[1]
        program, found = _attempt(lambda: Program.build(experiment, mesh, task))
        problems["config"] += found
        if program is not None:
            problems["run directory"] = list(_workdir(workdir, program))
            if experiment.init_from.run is not None and not (workdir is not None and saved_steps(workdir)):
                problems["weights"] += _attempt(lambda: init_from.check(program))[1]
            if not any(problems[area] for area in ("config", "mesh", "division")):
                problems["division"] += undivided(program)
    return Inspection({area: list(dict.fromkeys(found)) for area, found in problems.items()}, program, loader)


def _attempt(make: Callable[[], T]) -> tuple[T | None, list[str]]:
    """(result, []), or (None, [message]) if `make` raises ValueError, FileNotFoundError or StorageError."""
    try:
        return make(), []
    except (ValueError, FileNotFoundError, StorageError) as error:
        return None, [str(error)]


def _weights(task: TaskConfig) -> list[str]:
    """Every local file of weights that is missing, by its field, and what is wrong with another one."""
    found = _attempt(task.check_weights)[1]
    missing = {}
    for field, file in named_files(task, endings=("weights", "tokenizer")) if found else ():
        # Cached embeddings stand for the encoder and its tokenizer.
        cached = field.startswith("task.text.") and task.text.embeddings is not None
        if not cached and not is_remote(file) and not as_path(file).exists():
            missing[f"{field}: weights {file!r}: no such file or folder; --set {field}=PATH names others."] = repr(file)
    return [*missing, *(problem for problem in found if not any(file in problem for file in missing.values()))]


def _buckets(experiment: Experiment) -> Iterator[str]:
    for number, bucket in enumerate(experiment.data.buckets):
        _, found = _attempt(lambda bucket=bucket: experiment.task.check_bucket(bucket))
        yield from (f"data.buckets.{number}: {problem}" for problem in found)


def _data(experiment: Experiment) -> tuple[Loader | None, list[str]]:
    if experiment.task.collects_experience:
        return None, _attempt(lambda: experiment.task.check_data(experiment.data))[1]

    def load(evaluation: bool):
        data = experiment.data
        loader, found = _attempt(lambda: Loader(data, seed=experiment.seed, preprocess=dict, evaluation=evaluation))
        if found:  # The first data set that cannot be opened does not hide the others.
            for source in data.evaluation_sources if evaluation else data.sources:
                found += _attempt(lambda source=source: open_source(source.path, source.split))[1]
        return loader, found

    loader, problems = load(False)
    if experiment.training.evaluate_every or experiment.training.visualize_every:
        problems += load(True)[1]
    problems += _attempt(lambda: check_cache(experiment.data))[1]
    problems += _attempt(lambda: experiment.task.check_data(experiment.data))[1]
    return loader, problems


def _workdir(workdir: Path | None, program: Program) -> Iterator[str]:
    if workdir is None:
        return
    workdir = absolute(workdir)
    if is_remote(workdir):
        yield from _attempt(lambda: check_run_directory(workdir))[1]
        return
    existing = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    if not existing.is_dir():
        yield f"run directory {workdir}: {existing} is a file; name a folder."
    elif (workdir / "dataset_info.json").is_file():
        yield f"run directory {workdir}: holds a data set; name another folder."
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"run directory {workdir}: {existing} is not writable; choose another one or change its permissions."
    else:
        needed, free = size_of(program.abstract.saved())[1], shutil.disk_usage(existing).free
        if free < needed:
            yield (
                f"run directory {workdir}: a checkpoint takes {needed / GIB:.2f} GiB (parameters, optimizer state, "
                f"EMA), but {existing} has {free / GIB:.2f} GiB free; free space or choose another directory."
            )


@dataclasses.dataclass(frozen=True)
class _Split:
    """One dimension on the mesh: elements of the array, size of the dimension, mesh axes that do not divide it."""

    elements: int
    size: int
    unused_axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRecorder(Sharding):
    """Records, while a program is traced, how the mesh splits its arrays.

    Attributes:
      largest: the split of the largest array by logical name and number of dimensions, for the names in `FIXES`.
    """

    largest: dict[tuple[str, int], _Split] = dataclasses.field(default_factory=dict)

    def activation(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        place = super().activation(names, shape)
        elements = math.prod(shape)
        for name, size, entry in zip(names, shape, place.spec, strict=True):
            largest = self.largest.get((name, len(shape)))
            if name in FIXES and (largest is None or elements > largest.elements):
                placed = (entry,) if isinstance(entry, str) else entry or ()
                wanted = [axis for axis in self.config.compute.get(name, ()) if self.mesh.shape[axis] > 1]
                unused = tuple(axis for axis in wanted if axis not in placed)
                self.largest[name, len(shape)] = _Split(elements, size, unused)
        return place


def undivided(program: Program) -> Iterator[str]:
    """What `seq` and `tensor` cannot split, found by tracing the loss.

    The largest array of each logical name has to be split. Smaller ones (the tokens of a text encoder), and names that
    `FIXES` does not have, may be replicated: that only costs memory.
    """
    mesh = program.sharding.mesh
    if mesh.shape["seq"] == 1 and mesh.shape["tensor"] == 1:
        return
    for bucket in program.experiment.data.buckets:
        sharding = program.sharding_of(bucket)
        recorder = ShardingRecorder(mesh, sharding.config, spread_parts=sharding.spread_parts)
        # Kernels are reported by `kernels`, or by the program itself.
        with collecting(KernelReport()):
            _, problems = _attempt(lambda bucket=bucket, recorder=recorder: _trace(program, bucket, recorder))
        yield from problems
        for (name, _), split in sorted(recorder.largest.items()):
            if split.unused_axes:
                sizes = ", ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in split.unused_axes)
                yield f"{bucket.name}: {sizes} does not divide {split.size} ({name}); {FIXES[name]}."


def kernels(program: Program) -> tuple[KernelReport, list[str]]:
    """The kernels of the losses of all buckets, found by tracing them, and problems with them."""
    report, problems = KernelReport(), []
    for bucket in program.experiment.data.buckets:
        with collecting(report):
            problems += _attempt(lambda bucket=bucket: _trace_loss(program, bucket, program.sharding_of(bucket)))[1]
    return report, list(dict.fromkeys(problems))


def _trace(program: Program, bucket: BucketConfig, recorder: ShardingRecorder) -> None:
    by_path = nested.flatten(program.task.axes())
    for path, leaf in nested.flatten(program.abstract.parameters).items():
        recorder.activation(by_path[path], leaf.shape)
    _trace_loss(program, bucket, recorder)


def _trace_loss(program: Program, bucket: BucketConfig, partitioner: Sharding) -> None:
    task: Task = program.task

    def loss(parameters, frozen, batch, key):
        with axes.partitioned(partitioner), automatic(program.experiment.training.attention):
            cast_parameters = program.cast(parameters)
            losses = [objective.loss for objective in task.objectives() if objective.loss is not None]
            return [loss(cast_parameters, frozen, batch, key)[0] for loss in losses]

    jax.eval_shape(
        loss, program.abstract.parameters, program.abstract.frozen, program.abstract_batch(bucket), program.abstract.key
    )
