"""What compiling a step ahead of time finds, as data, as JSON and as tables: memory, FLOPs, collectives."""

import dataclasses
import io
import json

import jax
from rich.console import Console
from rich.table import Table

from jvgen.data.stream.config import BucketConfig
from jvgen.parallel.chips import chip_named
from jvgen.parallel.pods import slice_of
from jvgen.preflight.collectives import Collective
from jvgen.preflight.estimate import Estimate, Reading
from jvgen.preflight.time_estimate import TimeEstimate
from jvgen.preflight.time_report import print_estimate

GIB = 2**30
MIB = 2**20
MAX_COLLECTIVES = 12  # rows of the table


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device of one compiled step, as XLA's memory analysis reports them.

    Attributes:
      arguments, outputs: state and batch, new state and metrics.
      aliased: outputs that take the place of donated arguments, included in both of the above.
      temporaries, code: activations and gradients; the program.
      peak: the most in use at any time; 0 if the compiler does not report it.
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    code: float
    peak: float

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        """The memory analysis of a compiled program."""
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
        """Bytes that the device has to hold; aliased ones count once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class BucketReport:
    """The compiled step of one batch shape.

    Attributes:
      bucket: batch shape.
      memory: as compiled; None if it does not fit, `problem` is then the compiler's message.
      lower_bound: of memory, by arithmetic, without activations.
      reading: what a process reads for a step.
      flops: per step over all devices, by component; the backward pass counts, recomputation does not.
      collectives: of one step, the most bytes per step first; None if the compiled program cannot be read.
      seconds: time to trace and compile.
      problem: the compiler's message if it does not fit.
      kernels: which kernel each kind of attention call takes, and why.
      time: how long the step takes, by part; None for devices other than TPUs and for tpu7x, whose clock is not known,
        and if the program does not fit or cannot be read.
    """

    bucket: BucketConfig
    memory: Memory | None
    lower_bound: Estimate
    reading: Reading
    flops: dict[str, float]
    collectives: tuple[Collective, ...] | None
    seconds: float
    problem: str = ""
    kernels: tuple[str, ...] = ()
    time: TimeEstimate | None = None


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What `jvgen compile` prints.

    Attributes:
      topology, chip: target of the compilation.
      mesh, precision: in one line each.
      devices, processes: number of JAX devices and of processes (hosts) of the pod.
      hbm_bytes, peak_flops: per device, bytes and FLOP/s.
      buckets: one report per batch shape.
    """

    topology: str
    chip: str
    mesh: str
    precision: str
    devices: int
    processes: int
    hbm_bytes: float
    peak_flops: float
    buckets: tuple[BucketReport, ...]

    @property
    def slice(self) -> str:
        """Topology of one slice."""
        return self.topology.rpartition(" ")[2]

    def times(self) -> str:
        """The estimated times alone, as text."""
        console = Console(file=io.StringIO(), width=140, highlight=False)
        console.print(f"{self.mesh}, topology {self.topology}", markup=False)
        for report in self.buckets:
            console.print(f"\n{report.bucket.name}, batch size {report.bucket.batch_size}", markup=False)
            if report.time is None:
                why = "the compiled program cannot be read"
                if not chip_named(self.chip).clock:
                    why = f"the clock of {self.chip} is not known; `jvgen compile` has memory and collectives"
                console.print(f"no estimate: {report.problem or why}", markup=False)
            else:
                print_estimate(console, report.time, self.slice)
        return console.file.getvalue().rstrip()

    @property
    def fits(self) -> bool:
        """Whether the step of every batch shape fits into the memory of a device."""
        return all(b.memory is not None and b.memory.total <= self.hbm_bytes for b in self.buckets)

    def to_json(self) -> str:
        """The whole report as JSON text, including the totals that the tables show."""
        document = dataclasses.asdict(self) | {"fits": self.fits}
        for entry, bucket in zip(document["buckets"], self.buckets, strict=True):
            entry["total_bytes"] = None if bucket.memory is None else bucket.memory.total
            entry["lower_bound_bytes"] = bucket.lower_bound.total
            if bucket.time is not None:
                entry["time"] |= {
                    "seconds": dataclasses.asdict(bucket.time.seconds),
                    "utilization": bucket.time.utilization,
                }
        return json.dumps(document, indent=1)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140, highlight=False)
        console.print(
            f"{self.mesh}, topology {self.topology}, {self.hbm_bytes / GIB:.2f} GiB HBM/device; {slice_of(self.slice)}"
        )
        console.print(self.precision, markup=False)
        console.print(f"{self.processes} processes (hosts) of {self.devices // self.processes} devices")
        for report in self.buckets:
            self._print_bucket(console, report)
        return console.file.getvalue().rstrip()

    def _print_bucket(self, console: Console, report: BucketReport) -> None:
        bucket = report.bucket
        console.print(f"\n{bucket.name}, batch size {bucket.batch_size}: step compiled in {report.seconds:.0f} s")
        for line in report.kernels:
            console.print(f"kernels: {line}", markup=False)
        if report.memory is None:
            console.print(f"DOES NOT FIT: {report.problem}", markup=False)
        else:
            has_code = report.time is None or report.time.has_code
            console.print(_memory_table(report.memory, report.lower_bound, self.hbm_bytes, has_code))
        if total := sum(report.flops.values()):
            console.print(_flops_table(report.flops))
            per_device = total / self.devices
            at_peak = per_device / self.peak_flops
            console.print(
                f"{per_device / 1e12:.1f} TFLOP/device/step: {at_peak:.3f} s/step at the peak of "
                f"{self.peak_flops / 1e12:.0f} TFLOP/s; padding and recomputation by remat are not counted"
            )
        if report.time is not None:
            print_estimate(console, report.time, self.slice)
        console.print(str(report.reading))
        if report.collectives is None:
            console.print("collectives: not known, this compiler cannot write the compiled program as text")
        else:
            console.print(_collectives_table(report.collectives))


def _memory_table(memory: Memory, lower_bound: Estimate, hbm: float, has_code: bool) -> Table:
    what = "compiled" if has_code else "of the optimized program"
    table = Table("memory per device", "GiB", title=f"memory: {what}, and lower bound", title_justify="left")
    compiled = {
        "arguments (state and batch)": memory.arguments,
        "outputs": memory.outputs,
        "  aliased (donated)": -memory.aliased,
        "temporaries (activations, gradients)": memory.temporaries,
        "program": memory.code,
        "total": memory.total,
        "peak": memory.peak,
    }
    for name, size in compiled.items():
        if has_code or name not in ("program", "peak"):
            table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("total / HBM", f"{memory.total / hbm:.1%}", end_section=True)
    bounds = {
        "parameters": lower_bound.parameters,
        "optimizer state": lower_bound.optimizer,
        "EMA": lower_bound.ema,
        "frozen networks": lower_bound.frozen,
        "batch": lower_bound.batch,
        "gradients": lower_bound.gradients,
        "parameters in the compute dtype": lower_bound.cast,
        "total, without activations": lower_bound.total,
    }
    for name, size in bounds.items():
        table.add_row(f"lower bound: {name}", f"{size / GIB:.3f}")
    return table


def _flops_table(flops: dict[str, float]) -> Table:
    table = Table("component", "TFLOP/step", "share", title="FLOPs by component", title_justify="left")
    total = sum(flops.values())
    for component, count in flops.items():
        table.add_row(component, f"{count / 1e12:.1f}", f"{count / total:.1%}")
    table.add_row("total, forward and backward", f"{total / 1e12:.1f}", "")
    return table


def _collectives_table(collectives: tuple[Collective, ...]) -> Table:
    columns = ("collective", "array", "ops/step", "MiB/op", "MiB/step")
    table = Table(*columns, title="largest collectives, per device", title_justify="left")
    for one in collectives[:MAX_COLLECTIVES]:
        table.add_row(one.kind, one.shape, str(one.count), f"{one.bytes / MIB:.2f}", f"{one.total / MIB:.1f}")
    count, sent = sum(one.count for one in collectives), sum(one.total for one in collectives)
    table.add_row("all", f"{len(collectives)} shapes", str(count), "", f"{sent / MIB:.1f}")
    return table
