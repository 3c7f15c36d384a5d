"""The training loop, one for every task: restore, then evaluate, save, read, step and log in a fixed order."""

import contextlib
import dataclasses
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jvgen import config as configuration
from jvgen.config import ConfigError
from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.loader import LoadedBatch, Loader
from jvgen.data.stream.quarantine import TooManyFailures
from jvgen.parallel.mesh import DATA, FSDP, describe, make_mesh
from jvgen.tasks.task import Metrics
from jvgen.training.checkpoint import digest, identity
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.checkpoint.restore import restore_state
from jvgen.training.evaluation import Evaluator, write_samples
from jvgen.training.experiment import Experiment
from jvgen.training.preemption import EXIT_RESTART, Preemption
from jvgen.training.program import Program
from jvgen.training.state import TrainState
from jvgen.training.telemetry import console, throughput
from jvgen.training.telemetry.metrics import RowLog, Summaries, read_rows, to_host
from jvgen.training.watchdog import Watchdog

EXIT_DONE = 0
# EX_DATAERR: too many steps were skipped; starting again would not help.
EXIT_DIVERGED = 65
# EX_IOERR: the last checkpoint could not be written; the run is at an older one.
EXIT_UNSAVED = 74


@dataclasses.dataclass
class _Pending:
    """A step that was sent to the devices and whose metrics have not been read."""

    step: int
    metrics: Metrics
    batch: LoadedBatch
    waited: float


class TrainingDiverged(Exception):
    """More steps were skipped than the budget allows; the message names the records."""


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    resume: bool = True,
    stop_after: int | None = None,
    allow_changes: bool = False,
    make_loader: Callable[..., Any] = Loader,
) -> int:
    """Train to the end of the run, going on from the newest sound checkpoint of the work folder.

    Args:
      experiment: the run.
      workdir: gets `checkpoints/`, `metrics.jsonl`, `evaluation.jsonl`, `samples/`, `tensorboard/`, `config.json`.
      resume: with False the work folder must not hold checkpoints yet.
      stop_after: save and leave after this many steps of the run.
      allow_changes: go on although model, data or seed are not those of the checkpoint.
      make_loader: `Loader`, or something with its interface.

    Returns:
      Exit status: 0 done (or `stop_after` reached), 75 asked to stop by SIGTERM or SIGINT and saved (start the same
      command again), 65 too many skipped steps, 74 the last checkpoint could not be written.

    Raises:
      ConfigError: a mistake in the experiment, or a checkpoint of another run.
      CheckpointError: checkpoints exist and none can be used, or a save failed and the policy is to stop.
    """
    configuration.validate_tree(experiment)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        return _Run(experiment, workdir, resume, allow_changes, make_loader, stack).loop(stop_after)


class _Run:
    """What the loop needs at hand; built in the order in which it is printed."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        resume: bool,
        allow_changes: bool,
        make_loader: Callable[..., Any],
        stack: contextlib.ExitStack,
    ):
        self.experiment, self.training, self.workdir = experiment, experiment.training, workdir
        self.host, self.hosts = jax.process_index(), jax.process_count()
        self.printer = console.Printer(experiment.name, self.training.steps)
        stack.callback(self.printer.close)
        self.say = self.printer.say
        mesh = make_mesh(experiment.mesh)
        self.say(describe(mesh))
        self.program = program = Program.of(experiment, mesh)
        program.check()
        experiment.task.check_weights()
        experiment.task.check_data(experiment.data)
        task = program.task
        replicas = mesh.shape[DATA] * mesh.shape[FSDP]
        if replicas % self.hosts:
            raise ConfigError(
                f"mesh: {self.hosts} hosts read different examples, but data x fsdp = {replicas}; make it a multiple "
                "of the number of hosts."
            )
        shared = {
            "seed": experiment.seed,
            "preprocess": task.prepare,
            "process_index": self.host,
            "process_count": self.hosts,
        }
        self.loader = make_loader(experiment.data, **shared, quarantine_log=workdir / "quarantine.jsonl")
        self.evaluator = None
        if self.training.evaluate_every or self.training.visualize_every:
            held_out = make_loader(experiment.data, **shared, evaluation=True)
            self.evaluator = Evaluator(program, held_out.batches)

        moved = [optimizer.trains for optimizer in program.optimizers.values()]
        self.say(
            console.parameter_table(
                "parameters", program.abstract.parameters, program.shardings.parameters,
                lambda path: any(trains(path) for trains in moved),
            )
        )  # fmt: skip
        if program.abstract.frozen:
            self.say(
                console.parameter_table(
                    "frozen networks", program.abstract.frozen, program.shardings.frozen, lambda path: False
                )
            )
        self.scores: dict[int, float] = {}
        self.checkpoints = Checkpoints(workdir, experiment.checkpoint, scores=self.scores, say=self.say)
        stack.callback(self.checkpoints.close)
        if not resume and self.checkpoints.steps():
            raise ConfigError(
                f"{workdir} already holds checkpoints of steps {self.checkpoints.steps()}: take another work folder, "
                "or leave resume on to continue them."
            )
        # restore: the newest sound checkpoint, else a fresh state.
        self.document = identity.run_document(experiment, task)
        self.state: TrainState = restore_state(
            program, self.checkpoints, self.loader, self.document, allow_changes, self.say
        )
        self.start = int(self.state.step)
        began = time.perf_counter()
        digest.of_arrays(self.state.saved())
        self.say(f"compiled digests of {len(self.state.saved())} arrays in {time.perf_counter() - began:.1f} s")
        if self.host == 0:
            (workdir / "config.json").write_text(json.dumps(self.document, indent=1))

        self.flops: dict[BucketConfig, dict[str, float]] = {}
        self.steps = self._compile()
        self.peak = throughput.peak_flops(mesh.devices.flat[0], self.training.peak_flops)
        self.devices = mesh.size
        self.say(f"{throughput.FORMULA}; peak {f'{self.peak:.4g} FLOP/s' if self.peak else 'of this device not known'}")
        first = self.host == 0
        self.rows = RowLog(workdir / "metrics.jsonl", self.start) if first else None
        self.evaluations = RowLog(workdir / "evaluation.jsonl", self.start + 1) if first else None
        for log in (self.rows, self.evaluations):
            if log is not None:
                stack.callback(log.close)
        for row in read_rows(workdir / "evaluation.jsonl"):
            self._note_score(row["step"], row)
        self.summaries = Summaries(workdir / "tensorboard" if first and self.training.tensorboard else None, self.start)
        stack.callback(self.summaries.close)
        self.summaries.text(self.start, "config", configuration.dump(experiment))
        leave = (lambda: os._exit(EXIT_RESTART)) if self.training.hang_action == "exit" else None
        self.watchdog = Watchdog(self.training.hang_seconds, workdir / f"stacks_{self.host}.txt", leave)
        stack.callback(self.watchdog.close)
        self.preemption = stack.enter_context(Preemption())
        self.batches = stack.enter_context(self.loader.batches(self.start, self.training.steps))
        self.pending: _Pending | None = None
        self.last_read = time.perf_counter()
        self.window: list[dict[str, Any]] = []
        self.stall = 0.0

    def loop(self, stop_after: int | None) -> int:
        """The loop. Its order never changes: evaluate if due, save if due, next batch, step, log."""
        step, steps = self.start, self.training.steps
        end = steps if stop_after is None else min(steps, stop_after)
        self.printer.start(step)
        self.last_read = time.perf_counter()
        while True:
            stopping = self.preemption.requested(step)
            try:
                self._read_pending_before(step, end, stopping)
                if step > self.start:
                    self._evaluate(step)
                if step >= end or stopping or (step > self.start and step % self.experiment.checkpoint.every == 0):
                    self._save(step)
                if step >= end or stopping:
                    return self._leave(step, step >= end)
                began = time.perf_counter()
                batch = self._next_batch(step, end)
                waited = time.perf_counter() - began
                with self.watchdog.watching(f"step {step}"):
                    placed = self.program.place(batch.arrays, batch.bucket, self.host, self.hosts)
                    self.state, metrics = self.steps[batch.bucket](self.state, placed)
                    # The devices work on this step while the numbers of the one before are read and written.
                    previous, self.pending = self.pending, _Pending(step, metrics, batch, waited)
                    if previous is not None:
                        self._log(previous)
                self.checkpoints.poll()
                step += 1
            except TrainingDiverged as error:
                self.say(f"ERROR: {error}")
                return EXIT_DIVERGED

    def _next_batch(self, step: int, end: int) -> LoadedBatch:
        try:
            with self.watchdog.watching(f"reading the batch of step {step}"):
                return next(self.batches)
        except (TooManyFailures, OSError):
            # The data is at fault and not the training: keep what was reached. Other hosts would not join this save.
            if self.hosts == 1 and step > self.start:
                self._read_pending_before(step, end, True)
                self._save(step)
                self.checkpoints.wait()
                self.say(f"reading the batch of step {step} failed; everything before it is saved")
            raise

    def _read_pending_before(self, step: int, end: int, stopping: bool) -> None:
        """Rows of all steps before a save or an evaluation are written first: nothing is missing after a kill."""
        training, every = self.training, self.experiment.checkpoint.every
        due = [every, *(n for n in (training.evaluate_every, training.visualize_every) if n)]
        if self.pending is not None and (stopping or step >= end or any(step % n == 0 for n in due)):
            with self.watchdog.watching(f"step {step - 1}"):
                previous, self.pending = self.pending, None
                self._log(previous)

    def _leave(self, step: int, done: bool) -> int:
        saved = self.checkpoints.wait()
        if not saved or step not in self.checkpoints.steps():
            self.say(
                f"ERROR: step {step} is not saved; "
                f"the newest checkpoint is of {self.checkpoints.steps()[-1:] or 'none'}."
            )
            return EXIT_UNSAVED
        if done:
            self.say(
                f"finished at step {step}; checkpoints of steps {self.checkpoints.steps()} in {self.checkpoints.folder}"
            )
            return EXIT_DONE
        self.say(f"{self.preemption.reason}: saved step {step} and stopped; start the same command again to go on")
        return EXIT_RESTART

    def _compile(self) -> dict[BucketConfig, jax.stages.Compiled]:
        compiled: dict[BucketConfig, jax.stages.Compiled] = {}
        by_shape: dict[str, jax.stages.Compiled] = {}
        for bucket in self.loader.buckets:
            shapes = repr(sorted((n, s.shape, str(s.dtype)) for n, s in self.program.abstract_batch(bucket).items()))
            self.flops[bucket] = throughput.step_flops(self.program.task, bucket)
            if shapes not in by_shape:
                began = time.perf_counter()
                by_shape[shapes] = self.program.lower(bucket).compile()
                self.say(console.memory_line(bucket, by_shape[shapes], time.perf_counter() - began))
                self.say(console.flops_line(bucket, self.flops[bucket], self.program.sharding.mesh.size))
            compiled[bucket] = by_shape[shapes]
        return compiled

    def _save(self, step: int) -> None:
        self.stall = self.checkpoints.save(step, self.state.saved(), self.loader.state(step), self.document)

    def _evaluate(self, step: int) -> None:
        training, last = self.training, step == self.training.steps
        every, look_every = training.evaluate_every, training.visualize_every
        if not any(n and (step % n == 0 or last) for n in (every, look_every)):
            return
        if every and (step % every == 0 or last):
            began = time.perf_counter()
            values = self.evaluator.evaluate(self.state, training.evaluation_batches)
            row = {"step": step, **values, "seconds": time.perf_counter() - began}
            if self.evaluations is not None:
                self.evaluations.write(row)
            self._note_score(step, row)
            self.summaries.scalars(step, values, "evaluation/")
            listed = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
            self.say(f"evaluation at step {step} ({row['seconds']:.1f} s)  {listed}")
        if look_every and (step % look_every == 0 or last):
            clips = self.evaluator.visualize(self.state)
            if self.host == 0:
                write_samples(self.workdir / "samples", step, clips)
            for name, batch in clips.items():
                self.summaries.clips(step, name, batch)
        # Evaluation is no part of a step's time.
        self.last_read = time.perf_counter()

    def _note_score(self, step: int, values: dict[str, Any]) -> None:
        name = self.experiment.checkpoint.best_metric
        if name is None:
            return
        if name not in values:
            known = sorted(key for key in values if key not in ("step", "seconds"))
            raise ConfigError(f"checkpoint.best_metric = {name!r}: evaluation gives {', '.join(known)}.")
        self.scores[step] = float(values[name])

    def _log(self, pending: _Pending) -> None:
        """Read one step's metrics (waiting for the devices if need be), write its row, and act on skipped steps."""
        values = to_host(pending.metrics)
        now = time.perf_counter()
        seconds, self.last_read = now - self.last_read, now
        bucket, ids = pending.batch.bucket, pending.batch.record_ids
        frames = bucket.batch_size * bucket.views * bucket.frames
        row = {
            "step": pending.step,
            **values,
            "bucket": bucket.name,
            "records": f"{zlib.crc32(chr(10).join(ids).encode()):08x}",
            "seconds": seconds,
            "data_wait": min(1.0, pending.waited / seconds),
            "frames_per_second": frames / seconds,
            "mfu": throughput.utilisation(self.flops[bucket], seconds, self.devices, self.peak),
            "save_stall": self.stall,
            "host_rss_mib": throughput.host_rss_mib(),
        }
        self.stall = 0.0
        if self.rows is not None:
            self.rows.write(row)
        self.summaries.scalars(pending.step, row)
        self.window.append(row)
        if pending.step == self.start or (pending.step + 1) % self.training.log_every == 0:
            self.say(console.step_line(_averaged(self.window), self.training.steps))
            self.window = []
        self.printer.advance(pending.step + 1, values.get("loss", math.nan))
        if values["skipped"]:
            self._skipped(pending, values)

    def _skipped(self, pending: _Pending, values: dict[str, Any]) -> None:
        numbers = ", ".join(
            f"{name} = {values[name]}" for name in values if name.split("/")[-1] in ("loss", "gradient_norm")
        )
        records = ", ".join(pending.batch.record_ids)
        self.say(f"WARNING: step {pending.step} was skipped: {numbers}. Its records: {records}")
        limits = {"skipped_in_a_row": "max_consecutive_skips", "skipped_total": "max_skips"}
        for count, field in limits.items():
            if values[count] > getattr(self.training, field):
                raise TrainingDiverged(
                    f"step {pending.step}: {values[count]} steps skipped ({count.replace('_', ' ')}), more than "
                    f"training.{field} = {getattr(self.training, field)}. {numbers}. "
                    f"Records of the last batch: {records}. "
                    f"Checkpoints of steps {self.checkpoints.steps()} are as they were; look at these records, lower "
                    "optimizer.learning_rate, or raise the budget."
                )


def _averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row, with times as means over all rows."""
    count = len(rows)
    seconds = sum(row["seconds"] for row in rows)
    row = dict(rows[-1])
    row["seconds"] = seconds / count
    row["data_wait"] = sum(r["data_wait"] * r["seconds"] for r in rows) / seconds
    row["frames_per_second"] = sum(r["frames_per_second"] * r["seconds"] for r in rows) / seconds
    if row["mfu"] is not None:
        row["mfu"] = sum(r["mfu"] * r["seconds"] for r in rows) / seconds
    row["skipped"] = any(r["skipped"] for r in rows)
    return row
