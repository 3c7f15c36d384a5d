"""Prepares a run for the loop: program, data, restored state and compiled steps, in the order of the log."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from jvgen import __version__, exit_codes
from jvgen.config import ConfigError
from jvgen.data.store.shards import raise_open_files_limit
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.loader import LoadedBatch, Loader
from jvgen.data.stream.quarantine import process_log
from jvgen.parallel import failing, processes
from jvgen.parallel.mesh import describe, make_mesh
from jvgen.storage import Path, write_text
from jvgen.tasks.task import ExperienceContext
from jvgen.training import run_lock
from jvgen.training.balance import described
from jvgen.training.checkpoint import digest, identity
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.checkpoint.restore import restore_state
from jvgen.training.compilation import FOLDER as COMPILED
from jvgen.training.compilation import Programs, persistent_cache
from jvgen.training.config import TrainingConfig
from jvgen.training.evaluation import Evaluator, metric_names
from jvgen.training.experiment import Experiment
from jvgen.training.preemption import Preemption
from jvgen.training.program import Program, check_processes
from jvgen.training.state import TrainState
from jvgen.training.telemetry import goodput, startup, throughput
from jvgen.training.telemetry.goodput import Goodput
from jvgen.training.telemetry.hooks import Hook
from jvgen.training.telemetry.json_lines import read_rows
from jvgen.training.telemetry.profiler import Profiler
from jvgen.training.telemetry.run_files import EVALUATION, SAMPLES
from jvgen.training.telemetry.startup import StartClock
from jvgen.training.watchdog import STARTUP_SECONDS, Watchdog

Log = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """What the loop works with.

    Attributes:
      experiment: the run.
      program: task, optimizers, shardings.
      loader: the training data.
      evaluator: runs evaluations (`Evaluator`, or the task's experience); None if the run has none.
      checkpoints: of the run directory.
      document: the run document that is saved in checkpoints.
      state: state to start from, restored or fresh; the first step donates it.
      start_step: number of steps done before.
      missing: "evaluation" and "samples" of the start step, if they are due there and were not written.
      programs: compiled training step of each bucket, and evaluation programs.
      flops: FLOPs per step of each bucket, by component.
      peak_flops: peak of one device in FLOP/s; None if unknown.
      batches: batches of this process from `start_step` on.
      observe: is shown the state before each batch, for batches that depend on it.
      watchdog: reports what hangs.
      preemption: tells when the run was asked to stop.
      clock: times of this start, until its first step.
      goodput: what the time of the run is spent on.
      profiler: traces the steps that the config names.
      hooks: called at the events of the run.
      log: takes messages for the user.
    """

    experiment: Experiment
    program: Program
    loader: Loader
    evaluator: Any
    checkpoints: Checkpoints
    document: dict[str, Any]
    state: TrainState
    start_step: int
    missing: tuple[str, ...]
    programs: Programs
    flops: dict[BucketConfig, dict[str, float]]
    peak_flops: float | None
    batches: Iterator[LoadedBatch]
    observe: Callable[[TrainState], None]
    watchdog: Watchdog
    preemption: Preemption
    clock: StartClock
    goodput: Goodput
    profiler: Profiler
    hooks: Hook
    log: Log


@contextlib.contextmanager
def prepare(
    experiment: Experiment,
    workdir: Path,
    *,
    hooks: Hook,
    log: Log,
    preemption: Preemption,
    resume: bool = True,
    allow_changes: bool = False,
    cache: Path | None = None,
    clock: StartClock | None = None,
    make_loader: Callable[..., Any] = Loader,
) -> Iterator[Session]:
    """Open a session; leaving the context closes its checkpoints, data and threads. Arguments are those of `train`.

    Raises:
      ConfigError: a mistake in the experiment, a checkpoint of another run, or a run directory that is in use.
      ProcessesDiffer: the processes were started with different code, configs, data or run directories.
      CheckpointError: there are checkpoints, and none is valid.
      StopRequested: a request to stop came before the first step.
    """
    training = experiment.training
    clock = clock or StartClock()
    with contextlib.ExitStack() as stack:
        watchdog = _start_watchdog(experiment, workdir)
        stack.callback(watchdog.close)
        starting = stack.enter_context(contextlib.ExitStack())
        starting.enter_context(watchdog.watching("the start of the run", startup=True))
        program = _build_program(experiment, log)
        clock.mark("devices")
        lock = stack.enter_context(run_lock.held(workdir, log))
        # Before anything is read there: a process without the shared disk would take all checkpoints for corrupt.
        processes.agree({"token of the run directory": run_lock.read_token(workdir)}, "run directory")
        stack.enter_context(persistent_cache(cache, workdir / COMPILED, log))
        experience = _open_experience(program, workdir, log, preemption)
        if experience is not None:
            stack.callback(experience.close)
            loader, held_out = experience, None
        else:
            loader, held_out = _open_data(program, workdir, make_loader)
        clock.mark("data")
        _check_best_metric(program, held_out, experience)
        _log_parameters(program, log)
        checkpoints = Checkpoints(workdir, experiment.checkpoint, log=log, on_saved=hooks.on_checkpoint, lock=lock)
        stack.push(_unless_failing(checkpoints.close))
        if not resume and checkpoints.steps():
            raise ConfigError(
                f"{workdir} already holds checkpoints of steps {checkpoints.steps()}: use another run directory, "
                "or resume from them."
            )
        probable_start = max(checkpoints.steps(), default=0)
        if probable_start > training.steps:
            raise ConfigError(
                f"training.steps = {training.steps}: the run in {workdir} is at step {probable_start}; give at least "
                "as many steps, or another run directory."
            )
        document = identity.run_document(experiment, program.task)
        clock.mark("digests")
        flops = {bucket: throughput.step_flops(program.task, bucket) for bucket in loader.buckets}
        evaluations = [] if held_out is None else _evaluations(held_out, training)
        # Compiled while the checkpoint is read.
        programs = Programs(program, loader.buckets, evaluations, probable_start, flops, log, preemption.check)
        state = restore_state(program, checkpoints, loader, document, allow_changes, log)
        start_step = int(state.step)
        _agree(experiment, document, loader.state(start_step))
        if processes.index() == 0:
            # Of two starts at the same moment both find no lock: the one that wrote it last goes on.
            lock.check()
        preemption.check()
        clock.mark("restore" if start_step else "init")
        _read_scores(checkpoints, workdir, start_step)
        _compile_digests(state, log)
        if processes.index() == 0:
            write_text(workdir / "config.json", json.dumps(document, indent=1))
        programs.wait(start_step)
        # The slowest compiler has as long as the start of a run, not as a step; programs may be cached on some only.
        processes.barrier("programs compiled", STARTUP_SECONDS)
        clock.mark("compile")
        evaluator = experience if held_out is None else Evaluator(program, held_out.batches, programs, log)
        peak_flops = throughput.peak_flops(program.sharding.mesh.devices.flat[0], training.peak_flops)
        peak = f"{peak_flops:.4g} FLOP/s per device" if peak_flops else "of this device unknown"
        log(f"{throughput.FORMULA}; peak {peak}")
        starting.close()
        profiler = Profiler(training, workdir, start_step, log)
        stack.callback(profiler.close)
        times = _start_goodput(workdir, start_step, clock)
        stack.callback(times.close)
        batches = stack.enter_context(loader.batches(start_step, training.steps))
        yield Session(
            experiment=experiment,
            program=program,
            loader=loader,
            evaluator=evaluator,
            checkpoints=checkpoints,
            document=document,
            state=state,
            start_step=start_step,
            missing=_missing(workdir, start_step),
            programs=programs,
            flops=flops,
            peak_flops=peak_flops,
            batches=batches,
            observe=_ignore if experience is None else experience.observe,
            watchdog=watchdog,
            preemption=preemption,
            clock=clock,
            goodput=times,
            profiler=profiler,
            hooks=hooks,
            log=log,
        )


def _unless_failing(close: Callable[[], None]) -> Callable[..., None]:
    """An exit callback that closes something which waits for the other processes: not if this one fails."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or processes.count() == 1:
            close()

    return leave


def _build_program(experiment: Experiment, log: Log) -> Program:
    mesh = make_mesh(experiment.mesh)
    log(describe(mesh))
    program = Program.build(experiment, mesh)
    log(program.precision)
    program.check()
    experiment.task.check_weights()
    experiment.task.check_data(experiment.data)
    return program


def _ignore(state: TrainState) -> None:
    """Batches that are functions of the step need no state."""


def _open_experience(program: Program, workdir: Path, log: Log, preemption: Preemption) -> Any:
    """The source of batches of a task that acts while it trains; None for tasks that read data sets.

    Raises:
      ConfigError: several processes.
    """
    experiment = program.experiment
    check_processes(experiment, processes.count())
    context = ExperienceContext(
        experiment.data, experiment.seed, workdir, program.sharding, log=log, check=preemption.check
    )
    return program.task.experience(context)


def _open_data(program: Program, workdir: Path, make_loader: Callable[..., Any]) -> tuple[Loader, Loader | None]:
    """The training data, and the held-out data if the run evaluates."""
    raise_open_files_limit()
    experiment, training = program.experiment, program.experiment.training
    shared = {"seed": experiment.seed, "preprocess": program.task.preprocess, "rows": program.rows}
    quarantine_log = process_log(workdir / "quarantine.jsonl", processes.index(), processes.count())
    loader = make_loader(experiment.data, **shared, quarantine_log=quarantine_log)
    if not (training.evaluate_every or training.visualize_every):
        return loader, None
    return loader, make_loader(experiment.data, **shared, evaluation=True)


def _log_parameters(program: Program, log: Log) -> None:
    def trainable(path: str) -> bool:
        return any(optimizer.trainable(path) for optimizer in program.optimizers.values())

    abstract, shardings = program.abstract, program.shardings
    log(startup.parameter_table("parameters", abstract.parameters, shardings.parameters, trainable))
    warning = program.replication_warning()
    if warning is not None:
        log(warning)
    data = program.experiment.data
    if data.tokens_per_step is not None:
        steps = described(program.task, data.buckets, data.attention_cost)
        log(f"data.tokens_per_step = {data.tokens_per_step:,}: steps take {steps}")
    if abstract.frozen:
        log(program.sharding.describe_frozen(program.task.frozen_axes(), abstract.frozen))
        log(startup.parameter_table("frozen networks", abstract.frozen, shardings.frozen, lambda path: False))


def _read_scores(checkpoints: Checkpoints, workdir: Path, start_step: int) -> None:
    """Evaluations of earlier starts, for keeping the best checkpoint; later ones than the restored step are redone."""
    for row in read_rows(workdir / EVALUATION):
        if row["step"] <= start_step:
            checkpoints.record_evaluation(row["step"], row)


def _compile_digests(state: TrainState, log: Log) -> None:
    """Compile the digests now, so that the first save does not hold up training."""
    start = time.perf_counter()
    digest.of_arrays(state.saved())
    log(f"compiled digests of {len(state.saved())} arrays in {time.perf_counter() - start:.1f} s")


def _evaluations(held_out: Any, training: TrainingConfig) -> list[tuple[str, BucketConfig]]:
    """The evaluation programs that a run needs: (method of the task, bucket), each once."""
    wanted: dict[tuple[str, BucketConfig], None] = {}
    if training.evaluate_every:
        wanted |= {("evaluate", held_out.bucket(index)): None for index in range(training.evaluation_batches)}
    if training.visualize_every:
        wanted["visualize", held_out.bucket(0)] = None
    return list(wanted)


def _start_goodput(workdir: Path, start_step: int, clock: StartClock) -> Goodput:
    compiling = clock.seconds["compile"]
    spent = {goodput.START: clock.age - compiling, goodput.COMPILE: compiling}
    return Goodput(workdir if processes.index() == 0 else None, start_step, clock.age, spent)


def _check_best_metric(program: Program, held_out: Any, experience: Any) -> None:
    """Raise `ConfigError` unless evaluation gives the metric that `checkpoint.best_metric` names."""
    name = program.experiment.checkpoint.best_metric
    if name is None:
        return
    known = sorted(experience.metrics if held_out is None else metric_names(program, held_out.bucket(0)))
    if name not in known:
        raise ConfigError(f"checkpoint.best_metric = {name!r}: not a metric; evaluation gives {', '.join(known)}.")


def _agree(experiment: Experiment, document: dict[str, Any], data: dict[str, Any]) -> None:
    """Raise `ProcessesDiffer` unless all processes would run the same steps on the same data."""
    processes.agree(
        {
            "jvgen version": __version__,
            "git commit": str(document.get("git")),
            "config (digest)": digest.of_document(document["experiment"])[:16],
            "frozen weights": str(document.get("frozen"))[:16],
            "data (digest)": digest.of_document({name: data[name] for name in data if name != "step"})[:16],
            "seed": experiment.seed,
            "start step": data.get("step", 0),
        },
        "start",
    )


def _missing(workdir: Path, start_step: int) -> tuple[str, ...]:
    """What of the start step's evaluation was not written: a run can be stopped between the save and the evaluation."""
    if start_step == 0:
        return ()
    rows = [row["step"] for row in read_rows(workdir / EVALUATION)]
    found = {
        "evaluation": start_step in rows,
        "samples": (workdir / SAMPLES / f"step_{start_step:08d}").exists(),
    }
    return tuple(processes.broadcast([name for name in found if not found[name]], "missing evaluation"))


def _start_watchdog(experiment: Experiment, workdir: Path) -> Watchdog:
    training = experiment.training

    def leave(what: str) -> None:
        reason = f"{what}; see the stacks of all threads in its log"
        failing.abort(exit_codes.restart_code(), reason, stacks=True)

    exits = training.hang_action == "exit" or (training.hang_action == "auto" and processes.count() > 1)
    return Watchdog(training.hang_seconds, workdir / f"stacks_{processes.index()}.txt", leave if exits else None)
