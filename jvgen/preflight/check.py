"""Everything about a run that can be known to be wrong before a device is touched, collected into one message."""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.loader import Loader
from jvgen.nn.compute_dtype import cast
from jvgen.parallel import axes
from jvgen.parallel.axes import Axes
from jvgen.parallel.mesh import make_mesh
from jvgen.parallel.rules import Sharding
from jvgen.tasks.task import Task
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program, check_batch
from jvgen.training.state import size_of

GIB = 2**30
FIXES = {
    axes.LENGTH: "pad the tokens (a token_multiple that mesh.seq divides) or choose another mesh.seq",
    axes.ACTIVATION_HEADS: "choose a mesh.tensor that divides the number of heads",
    axes.HEADS: "choose a mesh.tensor that divides the number of heads",
}


def check(experiment: Experiment, workdir: Path | None = None, devices: list[jax.Device] | None = None) -> None:
    """Raise one error with all that is wrong with a run; silent if nothing is.

    Looks at the mesh, batches, sizes of clips, what the mesh splits (batch, heads, tokens), the data sets and their
    buckets, files of frozen networks, and the work folder and its disk. No array is made, no weights are loaded.

    Args:
      experiment: the run.
      workdir: where it will be written; None to leave that out.
      devices: what it will run on; default all that JAX sees.

    Raises:
      ConfigError: lists every problem, one line each.
    """
    problems = [*_buckets(experiment), *_data(experiment)]
    task, broken = _attempt(experiment.task.build)
    problems += broken
    mesh, broken = _attempt(lambda: make_mesh(experiment.mesh, devices))
    problems += broken
    if task is not None and mesh is not None:
        sharding = Sharding(mesh, experiment.sharding)
        for bucket in experiment.data.buckets:
            problems += _attempt(lambda bucket=bucket: check_batch(experiment, bucket, sharding))[1]
        program, broken = _attempt(lambda: Program.build(experiment, mesh, task))
        problems += broken
        if program is not None:
            problems += _workdir(workdir, program)
            if not problems:
                problems += _splits(program)
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _attempt(make):
    """(what `make` returns, no problems), or (None, what its ValueError or FileNotFoundError says)."""
    try:
        return make(), []
    except (ValueError, FileNotFoundError) as error:
        return None, [str(error)]


def _buckets(experiment: Experiment) -> Iterator[str]:
    for number, bucket in enumerate(experiment.data.buckets):
        _, broken = _attempt(lambda bucket=bucket: experiment.task.check_bucket(bucket))
        yield from (f"data.buckets.{number}: {problem}" for problem in broken)


def _data(experiment: Experiment) -> Iterator[str]:
    evaluates = experiment.training.evaluate_every or experiment.training.visualize_every
    for evaluation in (False, True) if evaluates else (False,):
        yield from _attempt(
            lambda evaluation=evaluation: Loader(
                experiment.data, seed=experiment.seed, preprocess=dict, process_count=jax.process_count(),
                process_index=jax.process_index(), evaluation=evaluation,
            )
        )[1]  # fmt: skip
    yield from _attempt(experiment.task.check_weights)[1]
    yield from _attempt(lambda: experiment.task.check_data(experiment.data))[1]


def _workdir(workdir: Path | None, program: Program) -> Iterator[str]:
    if workdir is None:
        return
    workdir = Path(workdir).absolute()
    existing = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    if not existing.is_dir():
        yield f"work folder {workdir}: {existing} is a file; name a folder."
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"work folder {workdir}: {existing} cannot be written to; name another folder or change its permissions."
    else:
        needed, free = size_of(program.abstract.saved())[1], shutil.disk_usage(existing).free
        if free < needed:
            yield (
                f"work folder {workdir}: a checkpoint of this run takes {needed / GIB:.2f} GiB (parameters, optimizer, "
                f"averages), but {existing} has {free / GIB:.2f} GiB free; make room or name another folder."
            )


@dataclasses.dataclass(frozen=True)
class _Witness(Sharding):
    """Notes what the mesh could and could not split while a program is traced.

    `seen` has, for each logical name and number of dimensions, the largest array: its elements, the size of the named
    dimension, and the mesh axes that do not divide it.
    """

    seen: dict[tuple[str, int], tuple[int, int, tuple[str, ...]]] = dataclasses.field(default_factory=dict)

    def activation(self, names: Axes, shape: tuple[int, ...]) -> NamedSharding:
        place = super().activation(names, shape)
        elements = math.prod(shape)
        for name, size, entry in zip(names, shape, place.spec, strict=True):
            if name in FIXES and elements > self.seen.get((name, len(shape)), (0,))[0]:
                placed = (entry,) if isinstance(entry, str) else entry or ()
                wanted = [axis for axis in self.config.compute.get(name, ()) if self.mesh.shape[axis] > 1]
                missing = tuple(axis for axis in wanted if axis not in placed)
                self.seen[name, len(shape)] = (elements, size, missing)
        return place


def _splits(program: Program) -> Iterator[str]:
    """What `seq` and `tensor` cannot split, found by tracing the loss.

    The largest array of a kind has to be split. Smaller ones (the tokens of a text encoder), and what `FIXES` does not
    name, may stay whole: that costs memory and no more.
    """
    mesh = program.sharding.mesh
    if mesh.shape["seq"] == 1 and mesh.shape["tensor"] == 1:
        return
    for bucket in program.experiment.data.buckets:
        witness = _Witness(mesh, program.experiment.sharding)
        _, broken = _attempt(lambda bucket=bucket, witness=witness: _trace(program, bucket, witness))
        yield from broken
        for (name, _), (_, size, missing) in sorted(witness.seen.items()):
            if missing:
                written = ", ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in missing)
                yield f"{bucket.name}: {written} does not divide {size} ({name}); {FIXES[name]}."


def _trace(program: Program, bucket: BucketConfig, witness: _Witness) -> None:
    task: Task = program.task
    dtype = jnp.dtype(program.experiment.training.compute_dtype)
    parameter_axes = task.axes()
    by_path = nested.flatten(parameter_axes)
    for path, leaf in nested.flatten(program.abstract.parameters).items():
        witness.activation(by_path[path], leaf.shape)

    def loss(parameters, frozen, batch, key):
        with axes.partitioned(witness):
            cast_parameters = cast(parameters, parameter_axes, dtype)
            return [objective.loss(cast_parameters, frozen, batch, key)[0] for objective in task.objectives()]

    jax.eval_shape(
        loss, program.abstract.parameters, program.abstract.frozen, program.abstract_batch(bucket), program.abstract.key
    )
