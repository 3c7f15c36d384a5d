"""Checkpoints: written in the background by Orbax, verified by digests, restored to any mesh."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jvgen import exit_codes
from jvgen.config import ConfigError
from jvgen.parallel import processes
from jvgen.storage import Path, absolute, is_empty, move_tree, remove_tree
from jvgen.training.checkpoint import digest, messages
from jvgen.training.checkpoint.digest import CorruptCheckpoint
from jvgen.training.config import CheckpointConfig
from jvgen.training.run_lock import LockLost, RunLock

ARRAYS, DATA, RUN, DIGESTS = "state", "data", "run", "digests"
# What writing was seen to raise: TensorStore reports a full disk as ValueError (RESOURCE_EXHAUSTED).
UNWRITABLE = (OSError, ValueError, RuntimeError)


# Seconds for which processes wait for each other while a checkpoint is read.
RESTORE_SECONDS = 3600.0


class CheckpointError(Exception):
    """No existing checkpoint can be used, or a checkpoint could not be written."""

    exit_code = exit_codes.USER_ERROR


class SaveFailed(CheckpointError):
    """A checkpoint could not be written, and the config says to stop."""

    exit_code = exit_codes.UNSAVED


class NonFiniteState(CheckpointError):
    """The training state holds NaN or infinity: it is not saved, and the checkpoints before it stay."""

    exit_code = exit_codes.DIVERGED


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
      step: number of steps done when it was saved.
      arrays: by name, with the requested shardings.
      data: state of the loader.
      run: the run document (see `jvgen.training.checkpoint.identity`).
    """

    step: int
    arrays: dict[str, jax.Array]
    data: dict[str, Any]
    run: dict[str, Any]


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


class Checkpoints:
    """The checkpoints of one run directory, in `checkpoints/STEP`; corrupt ones are moved to `corrupt/STEP`.

    On a disk a checkpoint is renamed when it is complete; in a bucket, which cannot rename, it then gets the file
    `commit_success.txt`.

    Args:
      workdir: run directory.
      config: which checkpoints to keep, and what to do when one cannot be written.
      log: takes messages for the user.
      on_saved: called with the step when a checkpoint is completely written, by `poll`, `wait`, `save` or `close`.
      read_only: never write, delete or move anything.
      lock: of the run directory; asked before every save.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        *,
        log: Callable[[str], None] = print,
        on_saved: Callable[[int], None] | None = None,
        read_only: bool = False,
        lock: RunLock | None = None,
    ):
        self.folder = absolute(workdir) / "checkpoints"
        self._quarantine = self.folder.parent / "corrupt"
        self._config, self._log, self._on_saved, self._read_only = config, log, on_saved, read_only
        # Value of `config.best_metric` by step.
        self._scores: dict[int, float] = {}
        self._pending: int | None = None
        self._lock = lock
        # Failed saves in a row, and messages of those that the processes have not talked about yet.
        self._failed = 0
        self._problems: list[str] = []
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder.parent} is not a run directory: it has no checkpoints folder.")
        messages.drop_repeated()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(ARRAYS, DATA, RUN, DIGESTS),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(config, self._scores),
                # Left behind by a run that was killed while saving.
                cleanup_tmp_directories=not read_only,
                # Metadata of old checkpoints is read when they are restored, where corruption is handled.
                lightweight_initialize=True,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

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
        if self._is_saved(step):
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

    def _is_saved(self, step: int) -> bool:
        """Whether a step is saved already, as process 0 sees it."""
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
            self._manager.close()

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
        self._problems.append(
            f"checkpoint of step {step} could not be written to {self.folder}: {reason}. Intact checkpoints: "
            f"{self._listed()}."
        )

    def _decide(self) -> None:
        """Log failed saves, and end the run if the policy says so, on all processes."""
        noted, self._problems = self._problems, []
        found = processes.combine([noted, self._failed], _worst, "failed saves")
        if not found[0]:
            return
        problems, self._failed = found
        message, limit = problems[-1], self._config.max_failed_saves
        if self._config.on_failed_save == "stop":
            raise SaveFailed(f"{message} The run stops here (checkpoint.on_failed_save = 'stop').")
        if self._failed >= limit:
            raise SaveFailed(f"{message} It stops after {limit} failed saves in a row (checkpoint.max_failed_saves).")
        self._log(f"WARNING: {message} The run continues; fix the cause before the next save.")

    def _listed(self) -> str:
        return ", ".join(str(step) for step in self.steps()) or "none"

    def restore(
        self,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        check: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
        *,
        step: int | None = None,
        partial: bool = False,
        may_be_missing: Callable[[str, Collection[str]], bool] = lambda name, saved: False,
    ) -> Restored | None:
        """Restore the latest valid checkpoint, or the one of `step`; None if there are no checkpoints.

        A corrupt checkpoint is logged and moved to `corrupt/`, and the one before it is tried.

        Args:
          wanted: shape, dtype and sharding of the arrays to read, by name.
          check: called with (data state, run document) before any array is read; raises if they are of another run.
          partial: the checkpoint may hold other arrays than the wanted ones.
          may_be_missing: (name, names in the checkpoint) -> whether the checkpoint may lack the array of a name, which
            is then left out of the result, or hold one that is not wanted.

        Raises:
          CheckpointError: there are checkpoints, and none is valid.
          ConfigError: the checkpoint does not hold the wanted arrays.
        """
        present, incomplete = self._present()
        self._require(step, present)
        tried = set(incomplete)
        while candidates := [s for s in present if s not in tried and step in (None, s)]:
            candidate = candidates[-1]
            tried.add(candidate)
            problem = restored = None
            try:
                documents = self._documents(candidate)
            except CorruptCheckpoint as error:
                problem = str(error)
            problem = _any_problem(problem)
            if problem is None:
                manifest, data, run = documents
                if check is not None:
                    check(data, run)
                saved = manifest["arrays"]
                readable = {n: want for n, want in wanted.items() if n in saved or not may_be_missing(n, saved)}
                known = {n: about for n, about in saved.items() if n in wanted or not may_be_missing(n, saved)}
                _check_arrays_fit(known, readable, partial, self.folder / str(candidate))
                try:
                    # Orbax cannot read nothing.
                    restored = self._arrays(candidate, manifest, readable) if readable else {}
                except CorruptCheckpoint as error:
                    problem = str(error)
                problem = _any_problem(problem)
                if problem is None:
                    return Restored(candidate, restored, data, run)
            if self._was_deleted(candidate):
                tried.discard(candidate)
            else:
                self._discard(candidate, problem)
            if self._read_only:
                # The run that this reader looks at goes on: there may be newer ones.
                present, _ = self._present()
                self._require(step, present)
        if tried:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {sorted(tried)} is valid (see above). "
                "The run was not restarted from step 0: restore a checkpoint from a copy, or use another run directory."
            )
        return None

    def _present(self) -> tuple[list[int], list[int]]:
        """Steps of all checkpoints, and those that are incomplete, which are moved away; decided by process 0."""
        self._manager.reload()
        incomplete = self._incomplete() if processes.index() == 0 else []
        if processes.index() == 0:
            for left in incomplete:
                self._move_away(left, "it is incomplete")
        present, incomplete = processes.broadcast([self.steps(), incomplete], "checkpoints", RESTORE_SECONDS)
        self._manager.reload()
        return present, incomplete

    def _require(self, step: int | None, present: list[int]) -> None:
        if step is not None and step not in present:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; its steps are {present or 'none'}.")

    def _was_deleted(self, step: int) -> bool:
        """Whether the run that this reader looks at has deleted a checkpoint, because it has newer ones."""
        return self._read_only and not (self.folder / str(step)).exists()

    def _incomplete(self) -> list[int]:
        """Steps of checkpoint folders that Orbax does not list as complete."""
        listed = set(self.steps())
        if is_empty(self.folder):
            return []
        found = [int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]
        return sorted(step for step in found if step not in listed)

    def run_document(self) -> dict[str, Any]:
        """The run document of the latest checkpoint with readable documents; raises as `contents`."""
        return self.contents()[2]

    def contents(self, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """What the checkpoint of a step holds, by default of the latest one with readable documents; reads no array.

        Returns:
          step, arrays by name (`{"shape": ..., "dtype": ...}`), run document.

        Raises:
          CheckpointError: no such step, or no readable checkpoint.
        """
        tried: set[int] = set()
        self._require(step, self.steps())
        while candidates := [s for s in self.steps() if s not in tried and step in (None, s)]:
            candidate = candidates[-1]
            tried.add(candidate)
            try:
                manifest, _, run = self._documents(candidate)
                return candidate, manifest["arrays"], run
            except CorruptCheckpoint as error:
                if not self._was_deleted(candidate):
                    self._log(f"WARNING: checkpoint of step {candidate}: {error}.")
            self._manager.reload()
            self._require(step, self.steps())
        raise CheckpointError(f"{self.folder}: no readable checkpoint.")

    def _documents(self, step: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        try:
            read = self._manager.restore(
                step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in (DATA, RUN, DIGESTS)})
            )
            documents = {DATA: read[DATA], RUN: read[RUN]}
            manifest = read[DIGESTS]
        except Exception as error:
            _raise_unless_corrupt(error)
            raise CorruptCheckpoint(f"its documents cannot be read ({_first_line(error)})") from error
        digest.check_manifest(manifest, documents)
        return manifest, documents[DATA], documents[RUN]

    def _arrays(
        self, step: int, manifest: dict[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=want.sharding, global_shape=want.shape, dtype=want.dtype)
            for name, want in wanted.items()
        }
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{ARRAYS: ocp.args.PyTreeRestore(item=dict(wanted), restore_args=arguments, partial_restore=True)}
                ),
            )
            arrays = dict(read[ARRAYS])
        except Exception as error:
            messages.drop_late_reads()
            _raise_unless_corrupt(error)
            raise CorruptCheckpoint(f"its arrays cannot be read ({_first_line(error)})") from error
        digest.check_arrays(manifest, arrays)
        return arrays

    def _discard(self, step: int, problem: str) -> None:
        """Log a corrupt checkpoint and move it out of the way, before any process goes on."""
        if processes.index() == 0:
            self._move_away(step, problem)
        processes.barrier(f"checkpoint {step} moved away")
        self._manager.reload()

    def _move_away(self, step: int, problem: str) -> None:
        path = self.folder / str(step)
        if self._read_only:
            self._log(f"WARNING: checkpoint {path} is corrupt: {problem}. Trying the one before.")
            return
        target = self._quarantine / str(step)
        while target.exists():
            target = target.with_name(f"{target.name}_again")
        move_tree(path, target)
        self._manager.reload()
        self._log(f"WARNING: checkpoint {path} is corrupt: {problem}. Moved to {target}; trying the one before.")


def _any_problem(problem: str | None) -> str | None:
    """The problem of the first process that has one."""
    return processes.combine(problem, _first_problem, "checkpoint read", RESTORE_SECONDS)


def _first_problem(problems: list[str | None]) -> str | None:
    found = [(number, problem) for number, problem in enumerate(problems) if problem is not None]
    if not found or len(problems) == 1:
        return problems[0] if found else None
    return f"process {found[0][0]}: {found[0][1]}"


def _worst(reports: list[tuple[list[str], int]]) -> tuple[list[str], int]:
    """Of (messages about failed saves, failures in a row) of all processes, the worst."""
    return max(reports, key=lambda report: (len(report[0]), report[1]))


def _raise_unless_corrupt(error: Exception) -> None:
    """Raise errors that say nothing about a checkpoint: no memory on a device, storage that is away, no permission.

    Reading a corrupt one was seen to raise almost anything, from Orbax, TensorStore, zstd and json, a bare `Exception`
    among them.
    """
    passing = any(word in str(error) for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED"))
    told = isinstance(error, (ConfigError, processes.LostProcess, jax.errors.JaxRuntimeError, PermissionError))
    if passing or told or exit_codes.of_error(error) == exit_codes.restart_code():
        raise error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _check_arrays_fit(
    saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], partial: bool, path: Path
) -> None:
    """Raise `ConfigError` listing all arrays that are missing, extra or of another shape or type."""
    problems = [f"  missing from the checkpoint: {name}" for name in sorted(wanted.keys() - saved.keys())]
    if not partial:
        problems += [f"  not in this run: {name}" for name in sorted(saved.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & saved.keys()):
        have = (tuple(saved[name]["shape"]), saved[name]["dtype"])
        want = (tuple(wanted[name].shape), str(wanted[name].dtype))
        if have != want:
            problems.append(f"  {name}: checkpoint {have[0]} {have[1]}, this run {want[0]} {want[1]}")
    if problems:
        raise ConfigError(
            f"checkpoint {path} does not hold the arrays of this run ({len(problems)} differences):\n"
            + "\n".join(problems[:40])
            + "\nThe model, the optimizer and ema.decays must be those of the run that saved it."
        )
