"""Checkpoints: written in the background by Orbax, verified by digests, restored to any mesh."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jvgen.config import ConfigError
from jvgen.training.checkpoint import digest
from jvgen.training.checkpoint.digest import CorruptCheckpoint
from jvgen.training.config import CheckpointConfig

ARRAYS, DATA, RUN, DIGESTS = "state", "data", "run", "digests"
# What reading a corrupt checkpoint was seen to raise, from Orbax, TensorStore, zstd and json.
UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, AssertionError, OverflowError,
    EOFError, MemoryError,
)  # fmt: skip
# What writing was seen to raise: TensorStore reports a full disk as ValueError (RESOURCE_EXHAUSTED).
UNWRITABLE = (OSError, ValueError, RuntimeError)


class CheckpointError(Exception):
    """No existing checkpoint can be used, or a checkpoint could not be written."""


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

    Args:
      workdir: run directory.
      config: which checkpoints to keep, and what to do when one cannot be written.
      log: takes messages for the user.
      on_saved: called with the step when a checkpoint is completely written, by `poll`, `wait`, `save` or `close`.
      read_only: never write, delete or move anything.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        *,
        log: Callable[[str], None] = print,
        on_saved: Callable[[int], None] | None = None,
        read_only: bool = False,
    ):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._quarantine = self.folder.parent / "corrupt"
        self._config, self._log, self._on_saved, self._read_only = config, log, on_saved, read_only
        # Value of `config.best_metric` by step.
        self._scores: dict[int, float] = {}
        self._pending: int | None = None
        self._failed: list[int] = []
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder.parent} is not a run directory: it has no checkpoints folder.")
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
          CheckpointError: a save failed and the policy is "stop".
        """
        start = time.perf_counter()
        if step in self.steps():
            return 0.0
        self.wait()
        words = digest.start(arrays)
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
            self._report_failure(step, error)
        return time.perf_counter() - start

    def poll(self) -> None:
        """Handle a background save that has ended. Call it once per step; it does not wait."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> bool:
        """Wait for the background save; returns False if it failed."""
        if self._pending is None:
            return True
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except UNWRITABLE as error:
            self._report_failure(step, error)
            return False
        if self._on_saved is not None:
            self._on_saved(step)
        return True

    def close(self) -> None:
        """Wait for the background save and release the resources of Orbax."""
        self.wait()
        self._manager.close()

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failed.append(step)
        if jax.process_index() == 0:
            for left in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        self._manager.reload()
        kept = ", ".join(str(s) for s in self.steps()) or "none"
        text = str(error)
        reason = (
            "no space left on device" if "space left" in text else text.splitlines()[0][:300] if text else repr(error)
        )
        message = (
            f"checkpoint of step {step} could not be written to {self.folder}: {reason}. Intact checkpoints: {kept}."
        )
        if self._config.on_failed_save == "stop":
            raise CheckpointError(f"{message} The run stops here (checkpoint.on_failed_save = 'stop').") from error
        self._log(f"WARNING: {message} The run continues; fix the cause before the next save.")

    def restore(
        self,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        check: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
        *,
        step: int | None = None,
        partial: bool = False,
        may_be_missing: Callable[[str], bool] = lambda name: False,
    ) -> Restored | None:
        """Restore the latest valid checkpoint, or the one of `step`; None if there are no checkpoints.

        A corrupt checkpoint is logged and moved to `corrupt/`, and the one before it is tried.

        Args:
          wanted: shape, dtype and sharding of the arrays to read, by name.
          check: called with (data state, run document) before any array is read; raises if they are of another run.
          partial: the checkpoint may hold other arrays than the wanted ones.
          may_be_missing: whether the checkpoint may lack the array of a name, which is then left out of the result, or
            hold one that is not wanted.

        Raises:
          CheckpointError: there are checkpoints, and none is valid.
          ConfigError: the checkpoint does not hold the wanted arrays.
        """
        incomplete = self._incomplete()
        for left in incomplete:
            self._discard(left, "it is incomplete")
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        if step is not None and not steps:
            raise CheckpointError(
                f"{self.folder}: no checkpoint of step {step}; its steps are {self.steps() or 'none'}."
            )
        for candidate in reversed(steps):
            problem = restored = None
            try:
                documents = self._documents(candidate)
            except CorruptCheckpoint as error:
                problem = str(error)
            if _agree(problem is None):
                manifest, data, run = documents
                if check is not None:
                    check(data, run)
                saved = manifest["arrays"]
                present = {name: want for name, want in wanted.items() if name in saved or not may_be_missing(name)}
                known = {name: about for name, about in saved.items() if name in wanted or not may_be_missing(name)}
                _check_arrays_fit(known, present, partial, self.folder / str(candidate))
                try:
                    restored = self._arrays(candidate, manifest, present)
                except CorruptCheckpoint as error:
                    problem = str(error)
                if _agree(problem is None):
                    return Restored(candidate, restored, data, run)
            self._discard(candidate, problem or "another process could not read it")
        if steps or incomplete:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {sorted({*steps, *incomplete})} is valid (see above). "
                "The run was not restarted from step 0: restore a checkpoint from a copy, or use another run directory."
            )
        return None

    def _incomplete(self) -> list[int]:
        """Steps of checkpoint folders that Orbax does not list: it renames a folder when it is complete."""
        listed = set(self.steps())
        found = [int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]
        return sorted(step for step in found if step not in listed)

    def run_document(self) -> dict[str, Any]:
        """The run document of the latest checkpoint with a readable one."""
        for candidate in reversed(self.steps()):
            try:
                return self._documents(candidate)[2]
            except CorruptCheckpoint as error:
                self._log(f"WARNING: checkpoint of step {candidate}: {error}.")
        raise CheckpointError(f"{self.folder}: no readable checkpoint.")

    def contents(self, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """What the checkpoint of a step holds, by default of the latest one with readable documents; reads no array.

        Returns:
          step, arrays by name (`{"shape": ..., "dtype": ...}`), run document.

        Raises:
          CheckpointError: no such step, or no readable checkpoint.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; its steps are {steps or 'none'}.")
        for candidate in [step] if step is not None else reversed(steps):
            try:
                manifest, _, run = self._documents(candidate)
                return candidate, manifest["arrays"], run
            except CorruptCheckpoint as error:
                self._log(f"WARNING: checkpoint of step {candidate}: {error}.")
        raise CheckpointError(f"{self.folder}: no readable checkpoint.")

    def _documents(self, step: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        try:
            read = self._manager.restore(
                step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in (DATA, RUN, DIGESTS)})
            )
            documents = {DATA: read[DATA], RUN: read[RUN]}
            manifest = read[DIGESTS]
        except UNREADABLE as error:
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
        except UNREADABLE as error:
            raise CorruptCheckpoint(f"its arrays cannot be read ({_first_line(error)})") from error
        digest.check_arrays(manifest, arrays)
        return arrays

    def _discard(self, step: int, problem: str) -> None:
        """Log a corrupt checkpoint and move it out of the way."""
        path = self.folder / str(step)
        if self._read_only:
            self._log(f"WARNING: checkpoint {path} is corrupt: {problem}. Trying the one before.")
            return
        target = self._quarantine / str(step)
        if jax.process_index() == 0:
            self._quarantine.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.name}_again")
            path.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"quarantined_{step}")
        self._manager.reload()
        self._log(f"WARNING: checkpoint {path} is corrupt: {problem}. Moved to {target}; trying the one before.")


def _agree(valid: bool) -> bool:
    """Whether a checkpoint is valid on all processes."""
    if jax.process_count() == 1:
        return valid
    return bool(np.all(multihost_utils.process_allgather(np.int32(valid))))


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
