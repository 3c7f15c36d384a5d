"""The checkpoints of a run: written in the background by Orbax, and restored when the run starts again."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jvgen import exit_codes
from jvgen.config import ConfigError
from jvgen.parallel import processes
from jvgen.storage import Path, absolute, move_tree, remove_tree
from jvgen.training.checkpoint import digest
from jvgen.training.checkpoint.reader import (
    ARRAYS,
    DATA,
    DIGESTS,
    RESTORE_SECONDS,
    RUN,
    CheckpointError,
    CheckpointReader,
)
from jvgen.training.checkpoint.save_barrier import SAVE_SECONDS, FailedElsewhere, SaveBarrier
from jvgen.training.config import CheckpointConfig
from jvgen.training.run_lock import LockLost, RunLock

# What writing was seen to raise: TensorStore reports a full disk as ValueError (RESOURCE_EXHAUSTED).
UNWRITABLE = (OSError, ValueError, RuntimeError)


class SaveFailed(CheckpointError):
    """A checkpoint could not be written, and the config says to stop."""

    exit_code = exit_codes.UNSAVED


class NonFiniteState(CheckpointError):
    """The training state holds NaN or infinity: it is not saved, and the checkpoints before it stay."""

    exit_code = exit_codes.DIVERGED


@dataclasses.dataclass
class _Keep(checkpoint_managers.PreservationPolicy):
    """Keeps the latest n, every k-th step, and the best by an evaluation metric."""

    config: CheckpointConfig
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self.config.keep_last :])
        if self.config.keep_every:
            kept |= {step for step in steps if step % self.config.keep_every == 0}
        scored = [step for step in steps if math.isfinite(self.scores.get(step, math.nan))]
        if self.config.best_metric is not None and scored:
            pick = min if self.config.best_mode == "min" else max
            kept.add(pick(scored, key=lambda step: self.scores[step]))
        return [step in kept for step in steps]


class Checkpoints(CheckpointReader):
    """The checkpoints of the run that writes them; corrupt ones are moved to `corrupt/STEP`.

    On a disk a checkpoint is renamed when it is complete; in a bucket, which cannot rename, it then gets the file
    `commit_success.txt`.

    Args:
      workdir: run directory.
      config: which checkpoints to keep, and what to do when one cannot be written.
      log: takes messages for the user.
      on_saved: called with the step when a checkpoint is completely written, by `poll`, `wait`, `save` or `close`.
      lock: of the run directory; asked before every save.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        *,
        log: Callable[[str], None] = print,
        on_saved: Callable[[int], None] | None = None,
        lock: RunLock | None = None,
    ):
        self.folder = absolute(workdir) / "checkpoints"
        self._quarantine = self.folder.parent / "corrupt"
        self._config, self._log, self._on_saved, self._lock = config, log, on_saved, lock
        # Value of `config.best_metric` by step.
        self._scores: dict[int, float] = {}
        self._pending: int | None = None
        # Failed saves in a row; of those that the processes have not talked about yet, whether they failed here, and
        # messages.
        self._failed = 0
        self._problems: list[tuple[bool, str]] = []
        # Temporary folders were left behind by a run that was killed while saving.
        self._open(
            cleanup_tmp_directories=True,
            preservation_policy=_Keep(config, self._scores),
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS, barrier_sync_fn=SaveBarrier()),
        )

    def record_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Note the metrics of an evaluation, for keeping the best checkpoint.

        Raises:
          ConfigError: `config.best_metric` is not among the metrics.
        """
        name = self._config.best_metric
        if name is None:
            return
        if name not in values:
            known = sorted(key for key in values if key not in ("step", "seconds"))
            raise ConfigError(f"checkpoint.best_metric = {name!r}: not a metric; evaluation gives {', '.join(known)}.")
        self._scores[step] = float(values[name])

    def save(self, step: int, arrays: Mapping[str, jax.Array], data: dict[str, Any], run: dict[str, Any]) -> float:
        """Start a checkpoint: digests and a copy of the arrays to the host now, writing in the background.

        The arrays may be donated as soon as this returns. If the checkpoint cannot be written, `config.on_failed_save`
        decides; older ones stay as they are.

        Returns:
          Seconds for which the caller was blocked.

        Raises:
          SaveFailed: saves failed, by the policy "stop" or `config.max_failed_saves` times in a row.
          NonFiniteState: an array holds NaN or infinity.
          LockLost: another start of the run has taken the run directory.
        """
        start = time.perf_counter()
        if self._already_saved(step):
            return 0.0
        self.wait()
        words = digest.start(arrays)
        invalid = digest.not_finite(words)
        if invalid:
            listed = ", ".join(invalid[:20]) + (f" and {len(invalid) - 20} more" if len(invalid) > 20 else "")
            raise NonFiniteState(
                f"step {step} is not saved: NaN or infinity in {listed}. Checkpoints: {self._listed()}. Lower "
                "optimizer.learning_rate, or look at the records of the steps since the last checkpoint."
            )
        try:
            documents = {DATA: data, RUN: run}
            manifest = digest.manifest(arrays, digest.finish(words), documents)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        ARRAYS: ocp.args.PyTreeSave(dict(arrays)),
                        DATA: ocp.args.JsonSave(data),
                        RUN: ocp.args.JsonSave(run),
                        DIGESTS: ocp.args.JsonSave(manifest),
                    }
                ),
                force=True,
            )
            self._pending = step
        except UNWRITABLE as error:
            self._note_failure(step, error)
        self._decide()
        return time.perf_counter() - start

    def _already_saved(self, step: int) -> bool:
        """Whether a step is saved already, as process 0 sees it; raises `LockLost` if the run directory was taken."""
        saved, lost = False, None
        if processes.index() == 0:
            saved = step in self.steps()
            try:
                if self._lock is not None and not saved:
                    self._lock.check()
            except LockLost as error:
                lost = str(error)
        saved, lost = processes.broadcast([saved, lost], f"save of step {step}")
        if lost is not None:
            raise LockLost(lost)
        return saved

    def poll(self) -> None:
        """Handle a background save that has ended. Call it once per step; it does not wait."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self._end_save()
            if processes.count() == 1:
                self._decide()

    def wait(self) -> bool:
        """Wait for the background save; returns False if it failed. All processes call it at the same point.

        Raises:
          SaveFailed: see `save`.
        """
        saved = self._end_save()
        self._decide()
        return saved and not self._failed

    def _end_save(self) -> bool:
        """Wait for this process's part of the background save."""
        if self._pending is None:
            return True
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except UNWRITABLE as error:
            self._note_failure(step, error)
            return False
        self._failed = 0
        if self._on_saved is not None:
            self._on_saved(step)
        return True

    def close(self) -> None:
        """Wait for the background save and release the resources of Orbax."""
        try:
            self.wait()
        finally:
            super().close()

    def _note_failure(self, step: int, error: Exception) -> None:
        self._failed += 1
        if processes.index() == 0:
            for left in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                remove_tree(left)
        self._manager.reload()
        text = str(error)
        reason = (
            "no space left on device" if "space left" in text else text.splitlines()[0][:300] if text else repr(error)
        )
        message = (
            f"checkpoint of step {step} could not be written to {self.folder}: {reason}. Intact checkpoints: "
            f"{self._listed()}."
        )
        self._problems.append((not isinstance(error, FailedElsewhere), message))

    def _decide(self) -> None:
        """Log failed saves, and end the run if the policy says so, on all processes."""
        noted, self._problems = self._problems, []
        found = processes.combine([noted, self._failed], _worst, "failed saves")
        if not found[0]:
            return
        problems, self._failed = found
        message, limit = problems[-1][1], self._config.max_failed_saves
        if self._config.on_failed_save == "stop":
            raise SaveFailed(f"{message} The run stops here (checkpoint.on_failed_save = 'stop').")
        if self._failed >= limit:
            raise SaveFailed(f"{message} It stops after {limit} failed saves in a row (checkpoint.max_failed_saves).")
        self._log(f"WARNING: {message} The run continues; fix the cause before the next save.")

    def _listed(self) -> str:
        return ", ".join(str(step) for step in self.steps()) or "none"

    def _discard(self, step: int, problem: str) -> None:
        """Log a corrupt checkpoint and move it to `corrupt/`, before any process goes on."""
        if processes.index() == 0:
            path, target = self.folder / str(step), self._quarantine / str(step)
            while target.exists():
                target = target.with_name(f"{target.name}_again")
            move_tree(path, target)
            self._log(f"WARNING: checkpoint {path} is corrupt: {problem}. Moved to {target}; trying the one before.")
        # In a bucket, moving copies file by file.
        processes.barrier(f"checkpoint {step} moved away", RESTORE_SECONDS)


def _worst(reports: list[tuple[list[tuple[bool, str]], int]]) -> tuple[list[tuple[bool, str]], int]:
    """Of (failed saves, failures in a row) of all processes, the worst; of equal ones one that failed itself."""
    return max(reports, key=lambda report: (len(report[0]), sum(here for here, _ in report[0]), report[1]))
