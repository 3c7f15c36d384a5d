"""Compile a run's training step for a TPU pod that is not there, and report what it needs of each device."""

import dataclasses
import io
import json
import re
import time
from collections.abc import Callable

import jax
from rich.console import Console
from rich.table import Table

from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.parallel.mesh import describe as describe_mesh
from jvgen.parallel.mesh import make_mesh
from jvgen.preflight import collectives, topology
from jvgen.preflight.collectives import Collective
from jvgen.preflight.estimate import Estimate, estimate
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.telemetry.throughput import step_flops

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device of one compiled step. Outputs that reuse arguments (the donated state) count once.

    Attributes:
      arguments, outputs, aliased, temporaries, code: as XLA's memory analysis has them.
      peak: the most that is in use at one time, if the compiler says.
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    code: float
    peak: float

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        """What the compiler says of a program."""
        found = compiled.memory_analysis()
        return cls(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            code=found.generated_code_size_in_bytes,
            peak=found.peak_memory_in_bytes,
        )

    @property
    def total(self) -> float:
        """What the device has to hold: everything but the aliased part, which would count twice."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class BucketReport:
    """One batch shape's step.

    Attributes:
      bucket: batch shape.
      memory: as compiled; None where it does not fit, `problem` then says what the compiler said.
      minimum: by arithmetic.
      flops: of a step over all devices, by part, backward pass counted, recomputation not.
      collectives: transfers of one step, largest first.
      seconds: time to trace and compile.
    """

    bucket: BucketConfig
    memory: Memory | None
    minimum: Estimate
    flops: dict[str, float]
    collectives: tuple[Collective, ...]
    seconds: float
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What `jvgen compile` prints.

    Attributes:
      topology, chip: what it was compiled for.
      mesh: one line.
      devices: JAX devices of the pod.
      hbm_bytes, peak_flops: of one device.
      buckets: one report a batch shape.
    """

    topology: str
    chip: str
    mesh: str
    devices: int
    hbm_bytes: float
    peak_flops: float
    buckets: tuple[BucketReport, ...]

    @property
    def fits(self) -> bool:
        """Whether every batch shape's step fits into the memory of a device."""
        return all(b.memory is not None and b.memory.total <= self.hbm_bytes for b in self.buckets)

    def to_json(self) -> str:
        """The whole report as JSON text, with the totals that the tables show."""
        document = dataclasses.asdict(self) | {"fits": self.fits}
        for entry, bucket in zip(document["buckets"], self.buckets, strict=True):
            entry["total_bytes"] = None if bucket.memory is None else bucket.memory.total
            entry["minimum_bytes"] = bucket.minimum.total
        return json.dumps(document, indent=1)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, highlight=False)
        console.print(f"{self.mesh}, topology {self.topology}, {self.hbm_bytes / GIB:.2f} GiB of HBM a device")
        for report in self.buckets:
            self._print_bucket(console, report)
        return console.file.getvalue().rstrip()

    def _print_bucket(self, console: Console, report: BucketReport) -> None:
        bucket = report.bucket
        console.print(f"\nstep of {bucket.name}, batch {bucket.batch_size}: compiled in {report.seconds:.0f} s")
        if report.memory is None:
            console.print(f"DOES NOT FIT: {report.problem}", markup=False)
        else:
            console.print(_memory_table(report.memory, report.minimum, self.hbm_bytes))
        total = sum(report.flops.values())
        if total:
            table = Table("part", "TFLOP a step", "share", title="floating-point operations", title_justify="left")
            for part, flops in report.flops.items():
                table.add_row(part, f"{flops / 1e12:.1f}", f"{flops / total:.1%}")
            table.add_row("total, forward and backward", f"{total / 1e12:.1f}", "")
            console.print(table)
            at_peak = total / self.devices / self.peak_flops
            console.print(
                f"{total / self.devices / 1e12:.1f} TFLOP a device and step: {at_peak:.3f} s at the peak of "
                f"{self.peak_flops / 1e12:.0f} TFLOP/s, {at_peak / 0.4:.3f} s at 40% MFU; what remat computes again is "
                "not counted"
            )
        columns = ("collective", "array", "times a step", "MiB each", "MiB a step")
        table = Table(*columns, title="largest transfers", title_justify="left")
        for one in report.collectives[:12]:
            table.add_row(one.kind, one.shape, str(one.count), f"{one.bytes / MIB:.2f}", f"{one.total / MIB:.1f}")
        sent = sum(one.total for one in report.collectives)
        table.add_row(f"all {len(report.collectives)} kinds", "", "", "", f"{sent / MIB:.1f}")
        console.print(table)


def _memory_table(memory: Memory, minimum: Estimate, hbm: float) -> Table:
    table = Table("memory of a device", "GiB", title="compiled, and the least by arithmetic", title_justify="left")
    rows = {
        "arguments (state and batch)": memory.arguments,
        "outputs": memory.outputs,
        "  of them in place of arguments": -memory.aliased,
        "temporaries (activations, gradients)": memory.temporaries,
        "program": memory.code,
        "total": memory.total,
        "in use at one time, at most": memory.peak,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("share of HBM", f"{memory.total / hbm:.1%}", end_section=True)
    least = {
        "least: parameters": minimum.parameters,
        "least: optimizer": minimum.optimizer,
        "least: averages": minimum.averages,
        "least: frozen networks": minimum.frozen,
        "least: batch": minimum.batch,
        "least: gradients": minimum.gradients,
        "least: parameters in the compute dtype": minimum.cast,
        "least, without activations": minimum.total,
    }
    for name, size in least.items():
        table.add_row(name, f"{size / GIB:.3f}")
    return table


def compile_ahead(
    experiment: Experiment, topology_name: str, *, each: Callable[[CompileReport], None] = lambda report: None
) -> CompileReport:
    """Compile the training step of every batch shape for a described TPU pod; nothing is allocated, no data is read.

    Args:
      experiment: the run; its mesh must fit the topology.
      topology_name: such as "v5p:4x4x8".
      each: called with the report so far after every batch shape: one can take half an hour.

    Raises:
      ConfigError: libtpu is missing, the topology is unknown, or the run does not divide over it.
    """
    pod = topology.describe(topology_name)
    mesh = make_mesh(experiment.mesh, pod.devices)
    program = Program.build(experiment, mesh)
    program.check()
    report = CompileReport(
        topology=pod.name,
        chip=pod.chip.name,
        mesh=describe_mesh(mesh),
        devices=len(pod.devices),
        hbm_bytes=pod.hbm_bytes,
        peak_flops=pod.peak_flops,
        buckets=(),
    )
    for bucket in experiment.data.buckets:
        report = dataclasses.replace(report, buckets=(*report.buckets, compile_bucket(program, bucket)))
        each(report)
    return report


def compile_bucket(program: Program, bucket: BucketConfig) -> BucketReport:
    """Compile one batch shape's step for the devices of the program's mesh."""
    start = time.perf_counter()
    memory, problem, transfers = None, "", ()
    lowered = program.lower(bucket)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ConfigError(f"the TPU compiler refused the step of {bucket.name}: {error}") from error
        problem = re.sub(r"\s+", " ", str(error))[:600]
    else:
        memory = Memory.of(compiled)
        transfers = tuple(collectives.merged(collectives.read(compiled.as_text())))
    return BucketReport(
        bucket=bucket,
        memory=memory,
        minimum=estimate(program, bucket),
        flops=step_flops(program.task, bucket),
        collectives=transfers,
        seconds=time.perf_counter() - start,
        problem=problem,
    )
