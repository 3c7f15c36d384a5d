"""The training loop of every task: save, evaluate, next batch, step and log, in a fixed order."""

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jvgen import config, exit_codes, saved_config, storage
from jvgen.data.stream.loader import LoadedBatch, Loader
from jvgen.data.stream.quarantine import TooManyFailures
from jvgen.parallel import failing, processes
from jvgen.storage import Path, as_path
from jvgen.tasks.task import Metrics
from jvgen.training.balance import with_batch_sizes
from jvgen.training.checkpoint.manager import NonFiniteState
from jvgen.training.config import TrainingConfig
from jvgen.training.evaluation_failures import EvaluationFailures
from jvgen.training.experiment import Experiment
from jvgen.training.preemption import Preemption, StopRequested
from jvgen.training.session import Session, prepare
from jvgen.training.telemetry import goodput, throughput
from jvgen.training.telemetry.console import ConsoleLog
from jvgen.training.telemetry.hooks import Hook, HookList, RunInfo
from jvgen.training.telemetry.metrics import to_host
from jvgen.training.telemetry.process_log import ProcessLog
from jvgen.training.telemetry.run_files import RunFiles
from jvgen.training.telemetry.startup import StartClock
from jvgen.training.telemetry.tensorboard import TensorBoard
from jvgen.training.telemetry.weights_and_biases import WeightsAndBiases

# Seconds for which a process whose evaluation failed waits for the others to fail as well.
ALL_FAILED_SECONDS = 20.0
# Seconds for which a process that has ended its run waits for the uploads of the others.
END_SECONDS = 1800.0


class TrainingDiverged(Exception):
    """More steps were skipped than the config allows; the message names the records."""

    exit_code = exit_codes.DIVERGED


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    hooks: Sequence[Hook] = (),
    resume: bool = True,
    stop_after: int | None = None,
    allow_changes: bool = False,
    cache: Path | None = None,
    clock: StartClock | None = None,
    make_loader: Callable[..., Any] = Loader,
    preemption: Preemption | None = None,
) -> int:
    """Train to the end of the run, resuming from the latest valid checkpoint in the run directory.

    Args:
      experiment: the run.
      workdir: run directory; gets `checkpoints/`, `metrics.jsonl`, `evaluation.jsonl`, `reports.jsonl`, `samples/`,
        `tensorboard/`, `logs/`, `compiled/`, `goodput.json`, `config.json`.
      hooks: called at the events of the run, after jvgen's own (console, files, TensorBoard, Weights & Biases).
      resume: with False the run directory must not hold checkpoints.
      stop_after: save and stop after this many steps of the run.
      allow_changes: resume although model, data or seed differ from the checkpoint's.
      cache: folder of compiled programs; that of `JAX_COMPILATION_CACHE_DIR` if it is set, else `compiled/` in the run
        directory.
      clock: of this start; it starts now if None.
      make_loader: `Loader`, or something with its interface.
      preemption: has noticed requests to stop since the process started; by default it starts here.

    Returns:
      Exit code (see `jvgen.exit_codes`): 0 done (or `stop_after` reached), 65 too many skipped steps, 74 the last
      checkpoint could not be written, 75 (or the restart code that was set) stopped by SIGTERM or SIGINT and saved:
      start the same command again to resume. With several processes an error ends all of them with its exit code.

    Raises:
      ConfigError: a mistake in the experiment or in `stop_after`, or a checkpoint of another run.
      CheckpointError: there are checkpoints and none is valid, or a save failed and the config says to stop.
      HookError: a hook raised.
    """
    workdir, clock = as_path(workdir), clock or StartClock()
    with failing.fail_fast(workdir), _ending_together(), contextlib.ExitStack() as stack:
        config.validate_tree(experiment)
        experiment = with_batch_sizes(experiment)
        failing.note_fact("config", saved_config.digest(experiment))
        if stop_after is not None and stop_after < 1:
            raise config.ConfigError(f"stop_after = {stop_after}: the number of steps after which to stop, at least 1.")
        processes.attach()
        if preemption is None:
            preemption = stack.enter_context(Preemption())
        preemption.join_processes()
        training, first_process = experiment.training, processes.index() == 0
        own_hooks = configured_hooks(training) if first_process else []
        workdir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(ProcessLog(workdir))
        console = ConsoleLog(experiment.name, training.steps, training.log_every, file=file)
        all_hooks = HookList([*own_hooks, console, *hooks] if first_process else [])
        status = None
        try:
            with prepare(
                experiment, workdir, hooks=all_hooks, log=console.log, preemption=preemption,
                resume=resume, allow_changes=allow_changes, cache=cache, clock=clock, make_loader=make_loader,
            ) as session:  # fmt: skip
                all_hooks.on_start(RunInfo(experiment, workdir, session.start_step, session.document))
                preemption.begin_steps()
                status = _Loop(session, workdir).run(stop_after)
        except StopRequested as request:
            console.log(f"{request}: stopped before the first step, there is nothing to save")
            status = exit_codes.restart_code()
        finally:
            all_hooks.on_end(status)
    return status


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Context that ends on all processes at the same time: uploads of one must not be cut off by the end of another."""
    yield
    processes.barrier("end of the run", END_SECONDS)


def configured_hooks(training: TrainingConfig) -> list[Hook]:
    """The hooks that a config asks for, besides the console."""
    hooks: list[Hook] = [RunFiles()]
    if training.tensorboard:
        hooks.append(TensorBoard())
    if training.wandb.project is not None:
        hooks.append(WeightsAndBiases(training.wandb))
    return hooks


@dataclasses.dataclass
class _Pending:
    """A step that was dispatched to the devices and whose metrics have not been read."""

    step: int
    metrics: Metrics
    batch: LoadedBatch
    wait_seconds: float


class _Loop:
    """The loop over a session, with what changes from step to step."""

    def __init__(self, session: Session, workdir: Path):
        self.session, self.experiment, self.training = session, session.experiment, session.experiment.training
        self.failures = EvaluationFailures(workdir)
        self.state = session.state
        self.pending: _Pending | None = None
        # The step that was last saved, or tried to be.
        self.saved: int | None = None
        self.save_stall = 0.0
        self.last_read = time.perf_counter()

    def run(self, stop_after: int | None) -> int:
        """Train and return the exit code. The order is fixed: save if due, evaluate if due, next batch, step, log."""
        session, step = self.session, self.session.start_step
        end = self.training.steps if stop_after is None else min(self.training.steps, stop_after)
        try:
            while True:
                stopping, ended = session.preemption.requested(), step >= end
                if stopping or ended or self._save_due(step):
                    self._save(step)
                # A run that is stopped before or in an evaluation does it when it resumes.
                evaluating = self._evaluation_due(step)
                if evaluating and not stopping and not self._evaluate(step):
                    stopping = True
                    self._save(step)
                if stopping or ended:
                    return self._finish(step, done=ended and not (evaluating and stopping))
                session.profiler.before_step(step, self._log_pending)
                batch, wait_seconds = self._next_batch(step)
                program = self._program(batch)
                with session.watchdog.watching(f"step {step}"), session.profiler.step(step):
                    metrics = self._step(program, batch)
                    # The devices compute this step while the metrics of the previous one are read and logged.
                    previous, self.pending = self.pending, _Pending(step, metrics, batch, wait_seconds)
                    if previous is not None:
                        self._log(previous)
                session.checkpoints.poll()
                session.programs.poll()
                step += 1
                if session.goodput.update(step):
                    session.hooks.on_report("goodput", step, session.goodput.summary())
        except (TrainingDiverged, NonFiniteState) as error:
            session.log(f"ERROR: {error}")
            return exit_codes.DIVERGED

    def _program(self, batch: LoadedBatch) -> Callable[..., Any]:
        """The compiled step for a batch; waits for it where a later stage's is still being compiled."""
        watching = self.session.watchdog.watching(f"compiling the program of step {batch.step}", startup=True)
        with watching, self.session.goodput.spending(goodput.COMPILE):
            return self.session.programs.step(batch.bucket, batch.step)

    def _step(self, program: Callable[..., Any], batch: LoadedBatch) -> Metrics:
        """Dispatch one training step; does not wait for it."""
        sharded = self.session.program.shard_batch(batch.arrays, batch.bucket)
        self.state, metrics = program(self.state, sharded)
        return metrics

    def _next_batch(self, step: int) -> tuple[LoadedBatch, float]:
        """The batch of a step, and the seconds spent waiting for it."""
        start = time.perf_counter()
        try:
            with self.session.watchdog.watching(f"reading the batch of step {step}"):
                self.session.observe(self.state)
                batch = next(self.session.batches)
        except (TooManyFailures, OSError):
            # The training is intact: save it. With several processes the others would not take part in this save.
            if processes.count() == 1 and step > self.session.start_step:
                self._save(step)
                self.session.checkpoints.wait()
                self.session.log(f"reading the batch of step {step} failed; the {step} steps before it are saved")
            raise
        seconds = time.perf_counter() - start
        if step == self.session.start_step:
            self.session.clock.mark("first batch")
        # While the devices compute, waiting costs nothing.
        if self.pending is None or all(leaf.is_ready() for leaf in jax.tree.leaves(self.pending.metrics)):
            self.session.goodput.add(goodput.DATA_WAIT, seconds)
        return batch, seconds

    def _save_due(self, step: int) -> bool:
        return step > self.session.start_step and step % self.experiment.checkpoint.every == 0

    def _save(self, step: int) -> None:
        session = self.session
        if self.saved == step:
            return
        self.saved = step
        self._log_pending()
        watching = session.watchdog.watching(f"saving step {step}", times=3)
        with watching, session.goodput.spending(goodput.SAVE):
            self.save_stall = session.checkpoints.save(
                step, self.state.saved(), session.loader.state(step), session.document
            )

    def _evaluation_due(self, step: int) -> bool:
        return self._due(step, "evaluation") or self._due(step, "samples")

    def _due(self, step: int, what: str) -> bool:
        """Whether an evaluation or samples, made every n steps (0 for never) and at the last step, are due."""
        every = {"evaluation": self.training.evaluate_every, "samples": self.training.visualize_every}[what]
        reached = every > 0 and (step % every == 0 or step == self.training.steps)
        # Those of the start step were due before the run was stopped.
        return reached and (step > self.session.start_step or what in self.session.missing)

    def _evaluate(self, step: int) -> bool:
        """Evaluate and visualize what is due; False if a request to stop came in between.

        The step is saved before if both are due. If the evaluation fails on every process, it is saved now. After two
        failures in a row the evaluation of this step is left out, or a run that is restarted again and again would
        never get past it.
        """
        self._log_pending()
        if not self.failures.begin(step):
            self.session.log(
                f"ERROR: the evaluation of step {step} has failed {self.failures.allowed} times in a row: it is left "
                "out. See errors/ in the run directory."
            )
            return True
        try:
            with self.session.goodput.spending(goodput.EVALUATION):
                finished = self._evaluate_once(step)
        except Exception:
            self._save_if_all_failed(step)
            raise
        self.failures.end()
        # The time that this took does not count as step time.
        self.last_read = time.perf_counter()
        return finished

    def _save_if_all_failed(self, step: int) -> None:
        """Save a step whose evaluation failed, if it failed on every process: one alone cannot save."""
        if step == self.session.start_step:
            return
        with contextlib.suppress(processes.LostProcess):
            processes.barrier(f"failed evaluation of step {step}", ALL_FAILED_SECONDS)
            self._save(step)
            self.session.checkpoints.wait()

    def _evaluate_once(self, step: int) -> bool:
        session = self.session
        if self._due(step, "evaluation"):
            start = time.perf_counter()
            values = session.evaluator.evaluate(
                self.state, self.training.evaluation_batches,
                stop=session.preemption.requested, watching=session.watchdog.watching,
            )  # fmt: skip
            if values is None:
                return False
            values["seconds"] = time.perf_counter() - start
            session.hooks.on_evaluation(step, values)
            session.checkpoints.record_evaluation(step, values)
        if self._due(step, "samples"):
            with session.watchdog.watching(f"samples of step {step}", times=3):
                session.hooks.on_samples(step, session.evaluator.visualize(self.state))
        return True

    def _log_pending(self) -> None:
        """Log the last step before an evaluation or a save: no row is missing if the run is killed afterwards."""
        previous, self.pending = self.pending, None
        if previous is not None:
            with self.session.watchdog.watching(f"step {previous.step}"):
                self._log(previous)

    def _log(self, pending: _Pending) -> None:
        """Read a step's metrics, waiting for the devices if necessary, pass its row to the hooks, and count skips."""
        values = to_host(pending.metrics)
        now = time.perf_counter()
        seconds, self.last_read = now - self.last_read, now
        self.session.watchdog.record_step(seconds)
        if pending.step == self.session.start_step:
            self.session.clock.mark("first step")
            self.session.hooks.on_report("start", pending.step + 1, self.session.clock.report())
        self.session.hooks.on_step(self._row(pending, values, seconds))
        self.save_stall = 0.0
        if values["skipped"]:
            self._check_skips(pending, values)

    def _row(self, pending: _Pending, values: dict[str, float], seconds: float) -> dict[str, Any]:
        """A step's row of metrics.jsonl."""
        session, bucket = self.session, pending.batch.bucket
        records = "\n".join(self._record_ids(pending.batch))
        devices = session.program.sharding.mesh.size
        flops = throughput.trained_flops(session.program.task, session.flops[bucket])
        return {
            "step": pending.step,
            **values,
            **pending.batch.facts,
            "bucket": bucket.name,
            "records": f"{zlib.crc32(records.encode()):08x}",
            "seconds": seconds,
            "data_wait": min(1.0, pending.wait_seconds / seconds),
            "frames_per_second": bucket.batch_size * bucket.views * bucket.frames / seconds,
            "mfu": throughput.utilization(flops, seconds, devices, session.peak_flops),
            "save_stall": self.save_stall,
            "host_rss_mib": throughput.host_rss_mib(),
            "storage_retries": storage.count_of_retries(),
            **throughput.device_memory_peak_mib(),
        }

    def _record_ids(self, batch: LoadedBatch) -> Sequence[str]:
        """Ids of the records of the whole global batch; substitutes are known for the rows of this process."""
        if len(batch.record_ids) == batch.bucket.batch_size:
            return batch.record_ids
        ids = list(self.session.loader.record_ids(batch.step))
        for slot, record_id in zip(batch.slots.tolist(), batch.record_ids, strict=True):
            ids[slot] = record_id
        return ids

    def _check_skips(self, pending: _Pending, values: dict[str, float]) -> None:
        """Log a skipped step with its records; raise `TrainingDiverged` if there were too many."""
        numbers = ", ".join(
            f"{name} = {values[name]}" for name in values if name.split("/")[-1] in ("loss", "gradient_norm")
        )
        records = ", ".join(self._record_ids(pending.batch))
        self.session.log(f"WARNING: step {pending.step} was skipped: {numbers}. Its records: {records}")
        limits = {"consecutive_skips": "max_consecutive_skips", "skipped_total": "max_skips"}
        for name, field in limits.items():
            limit = getattr(self.training, field)
            # A run cannot get stuck on spikes: after `spike_patience` of them the next is accepted.
            count = values[name] - (values.get("spikes_total", 0) if name == "skipped_total" else 0)
            if count > limit:
                raise TrainingDiverged(
                    f"step {pending.step}: {name} = {count} exceeds training.{field} = {limit}. {numbers}. "
                    f"Records of the last batch: {records}. Checkpoints: {_listed(self.session.checkpoints.steps())}. "
                    "Look at these records, lower optimizer.learning_rate, or raise the limit."
                )

    def _finish(self, step: int, done: bool) -> int:
        """Wait for the last checkpoint and log the outcome; returns the exit code."""
        checkpoints, log = self.session.checkpoints, self.session.log
        watching = self.session.watchdog.watching(f"writing the checkpoint of step {step}", times=3)
        with watching, self.session.goodput.spending(goodput.SAVE):
            saved = checkpoints.wait()
        self.session.goodput.update(step, write=True)
        self.session.hooks.on_report("goodput", step, self.session.goodput.summary())
        steps = checkpoints.steps()
        if not saved or step not in steps:
            log(f"ERROR: step {step} is not saved; the latest checkpoint is {_listed(steps[-1:])}.")
            return exit_codes.UNSAVED
        if done:
            log(f"finished at step {step}; checkpoints in {checkpoints.folder}: {_listed(steps)}")
            return exit_codes.DONE
        reason = self.session.preemption.reason
        log(f"{reason}: saved step {step} and stopped; start the same command again to resume")
        return exit_codes.restart_code()


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(f"step {step}" for step in steps) or "none"
