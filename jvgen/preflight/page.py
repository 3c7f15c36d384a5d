"""One page about a run before it costs money: every check and every estimate, each fine or a problem."""

import dataclasses
import io
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jvgen.config import ConfigError
from jvgen.data.store.shards import MAX_OPEN_SHARDS
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.loader import Loader
from jvgen.nn import kernel_check, kernel_report
from jvgen.parallel.chips import chip_of
from jvgen.parallel.mesh import describe as describe_mesh
from jvgen.parallel.pods import CHIPS_PER_HOST
from jvgen.preflight import topology
from jvgen.preflight.ahead_of_time import compile_bucket
from jvgen.preflight.check import Inspection, inspect_run, kernels
from jvgen.preflight.estimate import ASSUMED_BASIS, amount, lower_bound, reading, replicated, step_seconds
from jvgen.storage import Path, absolute, is_remote
from jvgen.training.balance import described
from jvgen.training.checkpoint.initial import saved_steps
from jvgen.training.config import CheckpointConfig
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.state import size_of
from jvgen.training.telemetry.throughput import peak_flops

GIB = 2**30
# What one process writes of a checkpoint, in bytes per second: a plain network disk or bucket.
ASSUMED_WRITE = 200e6
# Files that a process has open besides shards: libraries, sockets, logs.
OTHER_FILES = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """One finding: what was looked at, whether it is fine, and what was found."""

    subject: str
    ok: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Page:
    """All findings about a run."""

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is a problem."""
        return all(row.ok for row in self.rows)

    def print(self, console: Console) -> None:
        """Print the page, green and red on a terminal."""
        table = Table(title=escape(self.title), title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in self.rows:
            status = "[green]ok[/]" if row.ok else "[bold red]PROBLEM[/]"
            table.add_row(status, row.subject, escape(row.text) if row.ok else f"[red]{escape(row.text)}[/]")
        console.print(table)
        count = sum(not row.ok for row in self.rows)
        console.print("[bold green]all green[/]" if self.ok else f"[bold red]{count} problem{'s' * (count > 1)}[/]")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, highlight=False)
        self.print(console)
        return console.file.getvalue().rstrip()


@dataclasses.dataclass(frozen=True)
class _Devices:
    """What is known of the devices of a run: memory in bytes and peak in FLOP/s of each, None if unknown."""

    mesh_problem: str
    devices: tuple[jax.Device, ...] | None
    hbm_bytes: float | None
    peak_flops: float | None
    note: str = ""
    memory_note: str = ""


def examine(
    experiment: Experiment,
    *,
    topology_name: str | None = None,
    slices: int = 1,
    workdir: Path | None = None,
    compiled: bool = False,
    run_kernels: bool = False,
) -> Page:
    """Check a run and estimate its memory, reading, checkpoints and time. Reads no record.

    Args:
      experiment: the run.
      topology_name: a TPU topology that need not be attached ("v5p:4x4x8"); the attached devices if None.
      slices: number of such slices.
      workdir: run directory; not looked at if None.
      compiled: also compile the step of every bucket for these devices, which takes minutes.
      run_kernels: also run its kernels on an attached accelerator, see `jvgen.nn.kernel_check`. Nothing else allocates
        an array.
    """
    target = _attached(experiment) if topology_name is None else _described(experiment, topology_name, slices)
    found = inspect_run(experiment, workdir, target.devices)
    problems = dict(found.problems)
    if target.mesh_problem:
        problems["mesh"] = [target.mesh_problem]
    rows = [*_areas(experiment, found, problems, target)]
    program = found.program
    if program is not None:
        rows += _processes(program, target, found.loader)
        rows += [_memory(program, target), _replicated(program)]
        if run_kernels or not any(problems.values()):
            rows += _kernels(program, run_kernels)
        if compiled and not any(problems.values()):
            rows += [_compiled(program, bucket, target) for bucket in experiment.data.buckets]
    if found.loader is not None:
        rows += [_open_files(found.loader)]
    if program is not None:
        rows += [_checkpoints(program, workdir), _time(program, target)]
        if len(set(experiment.data.buckets)) > 1:
            rows.append(_balance(program))
    where = "attached devices" if topology_name is None else f"{f'{slices} x ' * (slices > 1)}{topology_name}"
    return Page(f"{experiment.name} on {where}", tuple(rows))


def _described(experiment: Experiment, name: str, slices: int) -> _Devices:
    try:
        pod, _ = topology.describe_for(experiment.mesh, name, slices)
    except ConfigError as error:
        return _Devices(str(error), (), None, None)
    note = ""
    if pod.chip.name in ("v5e", "v6e"):
        note = f" (hosts of {CHIPS_PER_HOST} chips assumed; hosts of 8 have half as many processes)"
    peak = experiment.training.peak_flops or pod.peak_flops
    return _Devices("", pod.devices, pod.hbm_bytes, peak, note)


def _attached(experiment: Experiment) -> _Devices:
    device = jax.local_devices()[0]
    chip = chip_of(device)
    # What JAX may take, which on GPUs is less than there is.
    limit = (device.memory_stats() or {}).get("bytes_limit")
    hbm = limit or (None if chip is None else chip.device_hbm_bytes)
    note = ", what JAX may take of a GPU: XLA_CLIENT_MEM_FRACTION, 0.75 if it is not set"
    is_part = bool(limit) and device.platform == "gpu"
    peak = peak_flops(device, experiment.training.peak_flops)
    return _Devices("", None, hbm, peak, memory_note=note if is_part else "")


def _areas(
    experiment: Experiment, found: Inspection, problems: dict[str, list[str]], target: _Devices
) -> Iterator[Row]:
    """The checks that training makes too: what they say where they are fine, and every problem."""
    training = experiment.training
    fine: dict[str, Callable[[], list[str]]] = {
        "config": lambda: [f"{training.steps} steps, batch shapes: {len(experiment.data.buckets)}"],
        "mesh": lambda: [describe_mesh(found.program.sharding.mesh)],
        "precision": lambda: [found.program.precision.removeprefix("precision: ")],
        "division": lambda: ["the mesh divides batches, tokens and heads"],
        "data": lambda: [*_records(experiment, found.loader)],
        "weights": lambda: ["weight files of frozen networks are there"] if found.program.task.frozen_networks else [],
        "run directory": lambda: [],
    }
    for area, texts in fine.items():
        bad = problems.get(area, [])
        if bad:
            yield from (Row(area, False, text) for text in bad)
        elif area in ("config", "data") or found.program is not None:
            yield from (Row(area, True, text) for text in texts())


def _records(experiment: Experiment, loader: Loader | None) -> Iterator[str]:
    if loader is None:
        return
    for source in loader.sources:
        shards, size = source.stored
        yield f"{source.folder} [{source.split}]: {len(source)} records, {amount(size)} in {shards} shards"
    steps = _bucket_steps(experiment)
    for number, bucket in enumerate(loader.plan.buckets):
        count = sum(loader.plan.records(number).values())
        epochs = steps[bucket] * bucket.batch_size / count
        yield f"{bucket.name}: {count} records for batches of {bucket.batch_size}, {epochs:.3g} epochs"


def _bucket_steps(experiment: Experiment) -> dict[BucketConfig, float]:
    """Steps of each bucket: those between two borders of stages are shared by weight."""
    buckets, steps = experiment.data.buckets, experiment.training.steps
    ends = {bucket: steps if bucket.end_step is None else min(bucket.end_step, steps) for bucket in buckets}
    borders = sorted({0, steps, *(min(bucket.start_step, steps) for bucket in buckets), *ends.values()})
    shares = dict.fromkeys(buckets, 0.0)
    for start, stop in zip(borders, borders[1:], strict=False):
        active = [bucket for bucket in buckets if bucket.start_step <= start and stop <= ends[bucket]]
        for bucket in active:
            shares[bucket] += (stop - start) * bucket.weight / sum(one.weight for one in active)
    return shares


def _processes(program: Program, target: _Devices, loader: Loader | None) -> Iterator[Row]:
    devices = list(program.sharding.mesh.devices.flat)
    processes = len({device.process_index for device in devices})
    yield Row("processes", True, f"{processes}, each of {len(devices) // processes} devices{target.note}")
    for bucket in program.experiment.data.buckets:
        found, stored = reading(program, bucket, target.peak_flops), ""
        if loader is not None and found.seconds:
            # A record is read as a whole, whatever the bucket takes of it.
            record = sum(source.stored[1] for source in loader.sources) / sum(map(len, loader.sources))
            stored = f"; {amount(found.rows * record / found.seconds)}/s of records from storage"
        yield Row("reading", True, f"{bucket.name}: {found}{stored}")


def _memory(program: Program, target: _Devices) -> Row:
    bounds = [lower_bound(program, bucket) for bucket in program.experiment.data.buckets]
    most = max(bounds, key=lambda bound: bound.total)
    parts = dataclasses.asdict(most)
    listed = ", ".join(f"{name} {amount(size)}" for name, size in parts.items() if size)
    text = f"{amount(most.total)} per device without activations ({listed})"
    if target.hbm_bytes is None:
        return Row("memory", True, f"{text}; the memory of these devices is unknown")
    share = f"{most.total / target.hbm_bytes:.0%} of {target.hbm_bytes / GIB:.2f} GiB{target.memory_note}"
    if most.total <= target.hbm_bytes:
        return Row("memory", True, f"{text}: {share}")
    return Row("memory", False, f"{text}: {share}; use more devices along mesh.fsdp, or fewer examples per device")


def _replicated(program: Program) -> Row:
    found, mesh = replicated(program), program.sharding.mesh.shape
    text = f"{amount(found.small)} per device of small arrays (below sharding.replicate_below)"
    if not found.undivided:
        return Row("replicated", True, text)
    total = sum(found.undivided.values())
    largest = ", ".join(f"{path} {amount(size)}" for path, size in list(found.undivided.items())[:3])
    sizes = " x ".join(f"mesh.{axis} = {mesh[axis]}" for axis in program.sharding.state_axes)
    text = (
        f"{amount(total)} per device of {len(found.undivided)} arrays that {sizes} does not divide, such as "
        f"{largest}; {text}"
    )
    # Not a mistake by itself: it only takes memory, and `memory` says whether there is enough.
    return Row("replicated", True, text)


def _kernels(program: Program, run: bool) -> Iterator[Row]:
    report, problems = kernels(program)
    yield from (Row("kernels", True, line) for line in report.lines)
    yield from (Row("kernels", False, problem) for problem in problems)
    if run:
        yield from _runs(report.calls)


def _runs(calls: Sequence[kernel_report.Call]) -> Iterator[Row]:
    """What an attached accelerator computes with the kernels of these calls."""
    device = jax.local_devices()[0]
    checked = [call for call in calls if kernel_check.is_checked(call, device.platform)]
    if not checked:
        yield Row("kernels run", True, f"none of them is for accelerators alone ({device.device_kind} is attached)")
    for call in checked:
        try:
            yield Row("kernels run", True, kernel_check.measured(call, device))
        except kernel_check.KernelDiffers as error:
            yield Row("kernels run", False, str(error))
        except Exception as error:
            yield Row("kernels run", False, kernel_check.not_run(call, device, error))


def _compiled(program: Program, bucket: BucketConfig, target: _Devices) -> Row:
    try:
        report = compile_bucket(program, bucket, target.peak_flops)
    except ConfigError as error:
        return Row("compiled", False, f"{bucket.name}: {error}")
    if report.memory is None:
        return Row("compiled", False, f"{bucket.name}: does not fit: {report.problem}")
    total, hbm = report.memory.total, target.hbm_bytes
    text = f"{bucket.name}: {amount(total)} per device, compiled in {report.seconds:.0f} s"
    if report.time is not None and report.time.is_whole:
        text += f", estimated {report.time.seconds.likely:.3g} s/step"
    if hbm is None:
        return Row("compiled", True, text)
    return Row("compiled", total <= hbm, f"{text}: {total / hbm:.0%} of {hbm / GIB:.2f} GiB")


def _open_files(loader: Loader) -> Row:
    shards = sum(source.stored[0] for source in loader.sources)
    needed = min(shards, MAX_OPEN_SHARDS) + OTHER_FILES
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{shards} shards, of which a process keeps {min(shards, MAX_OPEN_SHARDS)} open"
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return Row("open files", True, f"{text}; training may open all that `ulimit -Hn` allows here")
    return Row("open files", False, f"{text}; raise `ulimit -Hn`, which is {limit}, to {needed} or more")


def _checkpoints(program: Program, workdir: Path | None) -> Row:
    experiment = program.experiment
    size = size_of(program.abstract.saved())[1]
    # Replicas along `data` hold the same arrays; Orbax lets each write its part of them.
    processes = len({device.process_index for device in program.sharding.mesh.devices.flat})
    kept = _kept(experiment.checkpoint, experiment.training.steps)
    text = (
        f"{amount(size)} each, {kept} kept and one more while it is written: {amount((kept + 1) * size)}; "
        f"about {size / processes / ASSUMED_WRITE:.3g} s per save, every {experiment.checkpoint.every} steps (assuming "
        f"{ASSUMED_WRITE / 1e6:.0f} MB/s for each of {processes} processes)"
    )
    if workdir is None or is_remote(workdir):
        return Row("checkpoints", True, text)
    workdir = absolute(workdir)
    existing = next((folder for folder in (workdir, *workdir.parents) if folder.is_dir()), None)
    if existing is None:
        return Row("checkpoints", True, text)
    needed, free = max(1, kept + 1 - len(saved_steps(workdir))) * size, shutil.disk_usage(existing).free
    if free >= needed:
        return Row("checkpoints", True, f"{text}; {amount(free)} are free")
    return Row(
        "checkpoints", False,
        f"{text}; {existing} has {amount(free)} free, but {amount(needed)} will be needed: free space, "
        "lower checkpoint.keep_last or raise checkpoint.keep_every",
    )  # fmt: skip


def _kept(config: CheckpointConfig, steps: int) -> int:
    """The most checkpoints that are kept at the end of a run."""
    saves = -(-steps // config.every)
    always = steps // config.keep_every if config.keep_every else 0
    return min(saves, config.keep_last + always + (config.best_metric is not None))


def _time(program: Program, target: _Devices) -> Row:
    total = 0.0
    counts = _bucket_steps(program.experiment)
    for bucket, steps in counts.items():
        seconds = step_seconds(program, bucket, target.peak_flops)
        if seconds is None:
            return Row("time", True, "unknown: the FLOPs of the step or the peak of these devices are not known")
        total += steps * seconds
    # Fewer than all where only some stages' batch shapes are looked at.
    steps = round(sum(counts.values()))
    text = f"{steps} steps take about {_duration(total)} {ASSUMED_BASIS} ({total / max(1, steps):.3g} s/step)"
    return Row("time", True, f"{text}, without evaluation, saves and restarts")


def _balance(program: Program) -> Row:
    data = program.experiment.data
    return Row("step times", True, described(program.task, data.buckets, data.attention_cost))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
