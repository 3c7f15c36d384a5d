"""Which mesh, rematerialization and batch size suit a run and a pod: by arithmetic, and the best by compiling."""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import Var
from rich.console import Console
from rich.table import Table

from jvgen import config as configuration
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.nn.kernel_report import KernelReport, collecting
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.preflight import topology
from jvgen.preflight.ahead_of_time import compile_bucket
from jvgen.preflight.check import undivided
from jvgen.preflight.estimate import lower_bound
from jvgen.preflight.report import GIB, BucketReport
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.state import size_of

# From what is recomputed least.
REMATS = (Remat.NONE, Remat.SAVE_MATMULS, Remat.SAVE_ATTENTION, Remat.FULL)
SEQUENCE_SHARDS = (1, 2, 4, 8, 16)
# Of a device's memory; what one layer needs while it runs is not in the estimate.
FILLED = 0.9


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the first batch shape of an experiment.

    Attributes:
      mesh: sizes of the mesh axes.
      remat: what is stored for the backward pass; None if the task has no such field.
      batch_size: of the global batch.
      experiment: with these settings.
      estimated: bytes per device by arithmetic: state, gradients and what is stored for the backward pass.
      places: of the batch shape among `data.buckets` of the config; several where stages repeat it.
    """

    mesh: dict[str, int]
    remat: Remat | None
    batch_size: int
    experiment: Experiment
    estimated: float
    places: tuple[int, ...] = (0,)

    @property
    def settings(self) -> str:
        """The `--set` assignments that give it."""
        found = [f"mesh.{name}={size}" for name, size in self.mesh.items()]
        if self.remat is not None:
            found.append(f"{remat_path(self.experiment)}={self.remat.value}")
        return " ".join([*found, *(f"data.buckets.{place}.batch_size={self.batch_size}" for place in self.places)])


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate and its compiled step; the report is None if it was not compiled."""

    candidate: Candidate
    report: BucketReport | None = None
    problem: str = ""

    def fits(self, hbm_bytes: float) -> bool:
        """Whether it was compiled and fits into the memory of a device."""
        return self.report is not None and self.report.memory is not None and self.report.memory.total <= hbm_bytes

    @property
    def seconds(self) -> float | None:
        """Likely seconds per step; None if not known, or not of all kernels."""
        time = None if self.report is None else self.report.time
        return time.seconds.likely if time is not None and time.is_whole else None

    @property
    def per_example(self) -> float:
        """Seconds per step and example of the global batch; infinite if not known."""
        return float("inf") if self.seconds is None else self.seconds / self.candidate.batch_size


def search(
    experiment: Experiment,
    topology_name: str,
    *,
    slices: int = 1,
    batch_sizes: Sequence[int] = (),
    compilations: int = 6,
    places: Sequence[int] = (0,),
    on_found: Callable[[Found], None] = lambda found: None,
) -> "SearchReport":
    """Try meshes, rematerialization and batch sizes of the first batch shape on a described pod.

    Candidates that do not fit by arithmetic are dropped. Of the others those that should be fastest are compiled: each
    rematerialization and batch size with the fewest shards of a sequence, less recomputation first, then those with
    more shards, which send more. The result has the fastest per example first.

    Args:
      batch_sizes: global ones; those of the config by default.
      compilations: how many candidates are compiled; one can take half an hour.
      places: of this batch shape in the config, if `experiment` has not all of its batch shapes.
      on_found: called after every compilation.

    Raises:
      ConfigError: unknown topology, libtpu is missing, no candidate fits, or another mesh axis than `fsdp` is -1.
    """
    for axis in ("data", "tensor"):
        if getattr(experiment.mesh, axis) == -1:
            raise ConfigError(f"mesh.{axis} = -1: a search gives the remaining devices to fsdp; set mesh.{axis} to 1.")
    pod = topology.describe(topology_name, slices)
    # Of whatever stage: it is the only one here.
    bucket = experiment.data.buckets[0].replace(start_step=0, end_step=None)
    experiment = experiment.replace(data=experiment.data.replace(buckets=(bucket,)))
    every = [
        dataclasses.replace(one, places=tuple(places))
        for one in candidates(experiment, topology_name, slices, batch_sizes or (bucket.batch_size,))
    ]
    if not every:
        # What is wrong with all of them, if it is the same.
        _, mesh = topology.describe_for(experiment.mesh.replace(fsdp=-1, seq=1), topology_name, slices)
        Program.build(experiment, mesh).check()
        raise ConfigError(
            f"{bucket.name} on {pod.name}: no mesh of fsdp x seq divides the examples and tokens of a batch; try other "
            "batch sizes."
        )
    fitting = [one for one in every if one.estimated <= FILLED * pod.hbm_bytes]
    if not fitting:
        least = min((one.estimated for one in every), default=0.0)
        raise ConfigError(
            f"{bucket.name} on {pod.name}: none of {len(every)} candidates fits by arithmetic (the smallest takes "
            f"{least / GIB:.1f} of {pod.hbm_bytes / GIB:.1f} GiB per device); use more devices or a smaller batch."
        )
    fitting = by_turns(fitting)
    found = []
    for number, candidate in enumerate(fitting):
        one = _compiled(candidate, topology_name, slices) if number < compilations else Found(candidate)
        found.append(one)
        if number < compilations:
            on_found(one)
    found.sort(key=lambda one: (not one.fits(pod.hbm_bytes), one.report is None, one.per_example))
    return SearchReport(pod.name, bucket, pod.hbm_bytes, pod.peak_flops, tuple(found), len(every) - len(fitting))


def candidates(
    experiment: Experiment, topology_name: str, slices: int, batch_sizes: Sequence[int]
) -> Iterator[Candidate]:
    """What a pod allows, the likely fastest first: less recomputation, then fewer shards of a sequence, then the batch.

    `mesh.tensor` stays as configured, and `mesh.data` as well: without FSDP the state would be held several times.
    """
    path = remat_path(experiment)
    for remat in REMATS if path else (None,):
        stored: dict[int, float] = {}
        for seq in SEQUENCE_SHARDS:
            for batch_size in sorted(batch_sizes, reverse=True):
                mesh = experiment.mesh.replace(fsdp=-1, seq=seq)
                changed = _changed(experiment, mesh, path, remat, batch_size)
                program = _program(changed, topology_name, slices)
                if program is None:
                    continue
                bucket = changed.data.buckets[0]
                if program.sharding_of(bucket).spread_parts > 1:
                    # Devices take whole examples: the program of fewer shards again.
                    continue
                if batch_size not in stored:
                    stored[batch_size] = stored_bytes(program, bucket)
                # Stored arrays are split as the examples and their tokens are.
                saved = stored[batch_size] / program.sharding.mesh.size / changed.training.accumulation
                total = lower_bound(program, bucket).total + saved
                yield Candidate(dict(program.sharding.mesh.shape), remat, batch_size, changed, total)


def by_turns(found: Sequence[Candidate]) -> list[Candidate]:
    """The first of every rematerialization and batch size, then the second ones, and so on."""
    turns: Counter[tuple] = Counter()
    order = []
    for number, one in enumerate(found):
        kind = (one.remat, one.batch_size)
        order.append((turns[kind], number, one))
        turns[kind] += 1
    return [one for _, _, one in sorted(order, key=lambda entry: entry[:2])]


def remat_path(experiment: Experiment) -> str | None:
    """Dotted path of the field that decides what the trained network stores for its backward pass; None without one."""
    values = {remat.value for remat in Remat}
    found = [
        path
        for path, value in configuration.leaves(experiment)
        if path.startswith("task.") and path.endswith(".remat") and value.strip("'\"") in values
    ]
    return min(found, key=lambda path: (path.count("."), path), default=None)


def _changed(
    experiment: Experiment, mesh: MeshConfig, path: str | None, remat: Remat | None, batch_size: int
) -> Experiment:
    assignments = [f"data.buckets.0.batch_size={batch_size}"] + ([f"{path}={remat.value}"] if path else [])
    return configuration.override(experiment.replace(mesh=mesh), assignments)


def _program(experiment: Experiment, topology_name: str, slices: int) -> Program | None:
    """The program of a candidate; None if its mesh does not divide devices, examples or tokens."""
    try:
        configuration.validate_tree(experiment)
        _, mesh = topology.describe_for(experiment.mesh, topology_name, slices)
        program = Program.build(experiment, mesh)
        program.check()
    except ConfigError:
        return None
    return None if list(undivided(program)) else program


def stored_bytes(program: Program, bucket: BucketConfig) -> int:
    """Bytes over all devices that the traced forward pass of the first objective hands to its backward pass.

    Without parameters and batch; 0 for a task without losses. One microbatch is traced as if it were the whole batch.
    """
    objective = next((one for one in program.task.objectives() if one.loss is not None), None)
    if objective is None:
        return 0
    frozen, batch, key = program.abstract.frozen, program.abstract_batch(bucket), program.abstract.key
    batch = {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in batch.items()}

    def residuals(parameters: Any, frozen: Any, batch: Any, key: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            return objective.loss(parameters, frozen, batch, key)[0]

        with program.tracing():
            return jax.vjp(loss, program.cast(parameters))[1]

    # Candidates take nearly the same kernels; those of the compiled ones are in their reports.
    with collecting(KernelReport()):
        jaxpr = jax.make_jaxpr(residuals)(program.abstract.parameters, frozen, batch, key).jaxpr
    # What goes in and out unchanged (weights), constants and repeats take no memory of their own.
    kept = {variable for variable in jaxpr.outvars if isinstance(variable, Var)} - set(jaxpr.invars)
    # And neither do the cast parameters, which `lower_bound` has.
    shapes = {leaf.shape for leaf in jax.tree.leaves(program.abstract.parameters)}
    return size_of([variable.aval for variable in kept if variable.aval.shape not in shapes])[1]


def _compiled(candidate: Candidate, topology_name: str, slices: int) -> Found:
    experiment = candidate.experiment
    pod, mesh = topology.describe_for(experiment.mesh, topology_name, slices)
    try:
        report = compile_bucket(Program.build(experiment, mesh), experiment.data.buckets[0], pod.peak_flops)
    except ConfigError as error:
        return Found(candidate, problem=str(error))
    return Found(candidate, report, report.problem)


@dataclasses.dataclass(frozen=True)
class SearchReport:
    """What `jvgen compile --search` prints.

    Attributes:
      topology, bucket: target, and the batch shape of the config.
      hbm_bytes, peak_flops: per device.
      found: the fastest per example first, then what does not fit or has no estimate, then what was not compiled.
      too_large: candidates that do not fit by arithmetic.
    """

    topology: str
    bucket: BucketConfig
    hbm_bytes: float
    peak_flops: float
    found: tuple[Found, ...]
    too_large: int

    @property
    def best(self) -> Found | None:
        """The fastest per example, or the first if no time is known; None if no compiled candidate fits."""
        first = self.found[0]
        return first if first.fits(self.hbm_bytes) else None

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, highlight=False)
        console.print(f"{self.bucket.name} on {self.topology}, {self.hbm_bytes / GIB:.2f} GiB HBM/device")
        table = Table("fsdp x seq", "remat", "batch", "GiB by arithmetic", "GiB compiled", "s/step", "ms/example", "")
        for one in self.found:
            table.add_row(*self._row(one))
        console.print(table)
        console.print(
            f"{self.too_large} more candidates take more than {FILLED:.0%} of the memory by arithmetic. Seconds are "
            "estimated (see `jvgen estimate`): good for comparing rows, not measured."
        )
        if self.best is not None:
            told = (
                "best" if self.best.seconds is not None else "times are not known for these chips; the first that fits"
            )
            console.print(f"{told}: {self.best.candidate.settings}", soft_wrap=True)
        return console.file.getvalue().rstrip()

    def _row(self, one: Found) -> list[str]:
        candidate, report = one.candidate, one.report
        memory = None if report is None else report.memory
        note = one.problem[:60] if one.problem else "" if report else "not compiled"
        if memory is not None and not one.fits(self.hbm_bytes):
            note = "does not fit"
        return [
            f"{candidate.mesh['fsdp']} x {candidate.mesh['seq']}",
            candidate.remat.value if candidate.remat else "-",
            str(candidate.batch_size),
            f"{candidate.estimated / GIB:.2f}",
            f"{memory.total / GIB:.2f}" if memory else "-",
            f"{one.seconds:.3f}" if one.seconds is not None else "-",
            f"{1000 * one.per_example:.1f}" if one.seconds is not None else "-",
            note,
        ]
