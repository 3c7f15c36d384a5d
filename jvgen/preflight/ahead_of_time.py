"""Compile a run's training step for a TPU pod that this machine does not have."""

import contextlib
import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.nn.kernel_report import KernelReport, collecting
from jvgen.parallel import libtpu
from jvgen.parallel.chips import chip_of
from jvgen.parallel.mesh import describe as describe_mesh
from jvgen.preflight import collectives, hlo, kernel_cycles, program_cost, topology
from jvgen.preflight.check import undivided
from jvgen.preflight.estimate import lower_bound, reading
from jvgen.preflight.optimized_program import DoesNotFitError, optimize
from jvgen.preflight.report import BucketReport, CompileReport, Memory
from jvgen.preflight.time_estimate import TimeEstimate, estimate
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.health import one_per_step
from jvgen.training.program import Program
from jvgen.training.telemetry.throughput import step_flops, trained_flops


def _ignore(report: CompileReport) -> None:
    pass


def compile_ahead(
    experiment: Experiment,
    topology_name: str,
    *,
    slices: int = 1,
    code: bool = True,
    on_bucket: Callable[[CompileReport], None] = _ignore,
) -> CompileReport:
    """Compile the training step of every batch shape for a described TPU pod; no array is allocated, no data is read.

    Args:
      experiment: the run; its mesh must fit the topology.
      topology_name: of one slice, such as "v5p:4x4x8".
      slices: number of slices.
      code: whether to generate machine code, which takes half an hour for large convolutions; without it times are the
        least that a step can take.
      on_bucket: called after every batch shape with the report so far; one shape can take half an hour.

    Raises:
      ConfigError: libtpu is missing, the topology is unknown, or the run does not shard evenly over it.
    """
    pod, mesh = topology.describe_for(experiment.mesh, topology_name, slices)
    program = Program.build(experiment, mesh)
    program.check()
    # XLA compiles it all the same, and training refuses it.
    if problems := list(undivided(program)):
        raise ConfigError("\n".join(problems))
    report = CompileReport(
        topology=pod.name,
        chip=pod.chip.name,
        mesh=describe_mesh(mesh),
        precision=program.precision,
        devices=len(pod.devices),
        processes=len({device.process_index for device in pod.devices}),
        hbm_bytes=pod.hbm_bytes,
        peak_flops=pod.peak_flops,
        buckets=(),
    )
    for bucket in one_per_step(experiment.data.buckets):
        compiler = compile_whole if code else functools.partial(_optimize, topology_name=topology_name, slices=slices)
        found = compile_bucket(program, bucket, pod.peak_flops, compiler)
        report = dataclasses.replace(report, buckets=(*report.buckets, found))
        on_bucket(report)
    return report


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a step.

    Attributes:
      memory: as assigned.
      module: the program; None where neither jaxlib nor libtpu wrote it as text.
      has_code: whether machine code was generated, and XLA's estimates and libtpu's bundles with it.
    """

    memory: Memory
    module: hlo.Module | None
    has_code: bool = True


# Raises `DoesNotFitError`.
Compiler = Callable[[Program, BucketConfig, jax.stages.Lowered], Compiled]


def compile_whole(program: Program, bucket: BucketConfig, lowered: jax.stages.Lowered) -> Compiled:
    """A `Compiler` that generates machine code."""
    try:
        with without_cache(), tempfile.TemporaryDirectory(prefix="jvgen_program_") as folder:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            return Compiled(Memory.of(compiled), _module(compiled, Path(folder)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ConfigError(f"the TPU compiler rejected the step of {bucket.name}: {error}") from error
        raise DoesNotFitError(str(error)) from error


def _optimize(
    program: Program, bucket: BucketConfig, lowered: jax.stages.Lowered, topology_name: str, slices: int
) -> Compiled:
    experiment = program.experiment
    experiment = experiment.replace(data=experiment.data.replace(buckets=(bucket,)))
    with tempfile.TemporaryDirectory(prefix="jvgen_program_") as folder:
        made = optimize(experiment, topology_name, slices, Path(folder))
    return Compiled(made.memory, hlo.parse(made.text), has_code=False)


def compile_bucket(
    program: Program, bucket: BucketConfig, peak_flops: float | None = None, compiler: Compiler = compile_whole
) -> BucketReport:
    """Compile the step of one batch shape for the devices of the program's mesh, with this peak in FLOP/s each."""
    start = time.perf_counter()
    memory, problem, found, time_found = None, "", (), None
    flops, read = step_flops(program.task, bucket), reading(program, bucket, peak_flops)
    with collecting(KernelReport()) as kernels:
        lowered = program.lower(bucket)
    try:
        made = compiler(program, bucket, lowered)
    except DoesNotFitError as error:
        problem = re.sub(r"\s+", " ", str(error))[:600]
    else:
        memory, module = made.memory, made.module
        found = None if module is None else tuple(collectives.merged(collectives.read(module)))
        time_found = None if module is None else _time(program, module, flops, has_code=made.has_code)
        if time_found is not None and time_found.is_whole:
            read = dataclasses.replace(read, seconds=time_found.seconds.likely, basis="estimated")
    return BucketReport(
        bucket=bucket,
        memory=memory,
        lower_bound=lower_bound(program, bucket),
        reading=read,
        flops=flops,
        collectives=found,
        seconds=time.perf_counter() - start,
        problem=problem,
        kernels=tuple(kernels.lines),
        time=time_found,
    )


def _time(program: Program, module: hlo.Module, flops: dict[str, float], *, has_code: bool) -> TimeEstimate | None:
    """The time of a step from its compiled program; None for devices whose rates are not known."""
    mesh = program.sharding.mesh
    chip = chip_of(mesh.devices.flat[0])
    if chip is None or not chip.clock:
        return None
    folder = libtpu.bundles_folder() if has_code else None
    by_part, devices = trained_flops(program.task, flops), mesh.size
    trained = sum(by_part.values())
    return estimate(
        program_cost.operations(module),
        {} if folder is None else kernel_cycles.read(module, folder),
        chip,
        mesh,
        useful_flops=trained / devices,
        frozen_flops=(sum(flops.values()) - trained) / devices,
        attention_flops=by_part.get("attention", 0.0) / devices,
        has_code=has_code,
    )


def _module(compiled: jax.stages.Compiled, folder: Path) -> hlo.Module | None:
    """A compiled program; None where neither jaxlib nor libtpu wrote it as text.

    jaxlib cannot read every program of libtpu's (asynchronous operations of SparseCores on tpu7x, updates of several
    arrays on v5p); libtpu itself writes its text into the folder of dumps.
    """
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        written = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        if not written:
            return None
        text = written[-1].read_text(errors="replace")
    return hlo.parse(text)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compile without JAX's cache of compiled programs, which cannot be read for devices that are only described."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks at the setting once, and again after a reset.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
