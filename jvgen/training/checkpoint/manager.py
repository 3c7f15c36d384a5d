"""Checkpoints: written in the background by Orbax, sound only with matching digests, restored to any mesh."""

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
from jvgen.training.checkpoint.digest import Damage
from jvgen.training.config import CheckpointConfig

ARRAYS, DATA, RUN, DIGESTS = "state", "data", "run", "digests"
# What reading a damaged checkpoint was seen to raise, from Orbax, TensorStore, zstd and json.
UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, AssertionError, OverflowError,
    EOFError, MemoryError,
)  # fmt: skip
# What writing was seen to raise: TensorStore reports a full disk as ValueError (RESOURCE_EXHAUSTED).
UNWRITABLE = (OSError, ValueError, RuntimeError)


class CheckpointError(Exception):
    """A checkpoint that exists cannot be used, or one that was due could not be written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found.

    Attributes:
      step: steps done by the run when it was saved.
      arrays: by name, placed as asked for.
      data: the loader's state.
      run: the run document (see `jvgen.training.checkpoint.identity`).
    """

    step: int
    arrays: dict[str, jax.Array]
    data: dict[str, Any]
    run: dict[str, Any]


@dataclasses.dataclass
class _Keep(checkpoint_managers.PreservationPolicy):
    """Newest n, every k steps, and the best by an evaluation metric."""

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
    """The checkpoints of one work folder, in `checkpoints/STEP`; damaged ones are moved to `damaged/STEP`.

    Args:
      workdir: folder of the run.
      config: keep rules and policies.
      scores: value of `config.best_metric` by step; the caller adds to it as evaluations are made.
      say: prints one line for the user.
      read_only: never write, delete or move anything.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        *,
        scores: Mapping[int, float] | None = None,
        say: Callable[[str], None] = print,
        read_only: bool = False,
    ):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._damaged = self.folder.parent / "damaged"
        self._config, self._say, self._read_only = config, say, read_only
        self._pending: int | None = None
        self._failed: list[int] = []
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder.parent}: has no checkpoints folder; is this the work folder of a run?")
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(ARRAYS, DATA, RUN, DIGESTS),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(config, {} if scores is None else scores),
                # Left behind by a run that was killed while saving.
                cleanup_tmp_directories=not read_only,
                # Metadata of old checkpoints is read when they are restored, where damage can be handled.
                lightweight_initialize=True,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: Mapping[str, jax.Array], data: dict[str, Any], run: dict[str, Any]) -> float:
        """Begin a checkpoint: digests and a copy of the arrays to the host now, writing in the background.

        Arrays may be donated as soon as this returns. A checkpoint that cannot be written is handled by
        `on_failed_save`; the older ones stay as they are.

        Returns:
          Seconds that the caller was held up.

        Raises:
          CheckpointError: a save failed and the policy is "stop".
        """
        began = time.perf_counter()
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
        return time.perf_counter() - began

    def poll(self) -> None:
        """Notice a background save that has ended: once a step, costs nothing while one is running."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> bool:
        """Wait for the background save; True unless it failed."""
        if self._pending is None:
            return True
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except UNWRITABLE as error:
            self._report_failure(step, error)
            return False
        return True

    def close(self) -> None:
        """Wait for the background save and release what Orbax holds."""
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
        self._say(f"WARNING: {message} The run goes on; free some space before the next save.")

    def restore(
        self,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        check: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
        *,
        step: int | None = None,
        partial: bool = False,
    ) -> Restored | None:
        """The newest sound checkpoint, or the one of `step`; None if there is none at all.

        Damaged ones are named, set aside in `damaged/`, and the one before is tried.

        Args:
          wanted: shape, dtype and sharding of the arrays to read, by name.
          check: called with (data state, run document) before any array is read; raises if the run is another.
          partial: read the wanted arrays only, whatever else there is.

        Raises:
          CheckpointError: there are checkpoints, and none can be used.
          ConfigError: the checkpoint holds other arrays than those wanted.
        """
        incomplete = self._incomplete()
        for left in incomplete:
            self._set_aside(left, "it is incomplete")
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        if step is not None and not steps:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; there are {self.steps() or 'none'}.")
        for candidate in reversed(steps):
            problem = restored = None
            try:
                documents = self._documents(candidate)
            except Damage as error:
                problem = str(error)
            if _agree(problem is None):
                manifest, data, run = documents
                if check is not None:
                    check(data, run)
                _check_arrays_fit(manifest["arrays"], wanted, partial, self.folder / str(candidate))
                try:
                    restored = self._arrays(candidate, manifest, wanted)
                except Damage as error:
                    problem = str(error)
                if _agree(problem is None):
                    return Restored(candidate, restored, data, run)
            self._set_aside(candidate, problem or "another host could not read it")
        if steps or incomplete:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {sorted({*steps, *incomplete})} can be used "
                "(see above). Nothing was started anew: restore one from a copy, or take another work folder."
            )
        return None

    def _incomplete(self) -> list[int]:
        """Folders with a checkpoint's name that Orbax does not list: it renames a folder when it is complete."""
        listed = set(self.steps())
        found = [int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]
        return sorted(step for step in found if step not in listed)

    def run_document(self) -> dict[str, Any]:
        """The run document of the newest checkpoint that has a readable one."""
        for candidate in reversed(self.steps()):
            try:
                return self._documents(candidate)[2]
            except Damage as error:
                self._say(f"WARNING: checkpoint of step {candidate}: {error}.")
        raise CheckpointError(f"{self.folder}: no readable checkpoint.")

    def _documents(self, step: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        try:
            read = self._manager.restore(
                step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in (DATA, RUN, DIGESTS)})
            )
            documents = {DATA: read[DATA], RUN: read[RUN]}
            manifest = read[DIGESTS]
        except UNREADABLE as error:
            raise Damage(f"its documents cannot be read ({_first_line(error)})") from error
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
            raise Damage(f"its arrays cannot be read ({_first_line(error)})") from error
        digest.check_arrays(manifest, arrays)
        return arrays

    def _set_aside(self, step: int, problem: str) -> None:
        path = self.folder / str(step)
        if self._read_only:
            self._say(f"WARNING: checkpoint {path} is damaged: {problem}. Trying the one before.")
            return
        target = self._damaged / str(step)
        if jax.process_index() == 0:
            self._damaged.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.name}_again")
            path.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set_aside_{step}")
        self._manager.reload()
        self._say(f"WARNING: checkpoint {path} is damaged: {problem}. It was moved to {target}; trying the one before.")


def _agree(sound: bool) -> bool:
    """Whether all hosts found a checkpoint sound."""
    if jax.process_count() == 1:
        return sound
    return bool(np.all(multihost_utils.process_allgather(np.int32(sound))))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _check_arrays_fit(
    saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], partial: bool, path: Path
) -> None:
    """Raise `ConfigError` listing all arrays that are missing, extra or of another shape or type."""
    problems = [f"  missing in the checkpoint: {name}" for name in sorted(wanted.keys() - saved.keys())]
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
            + "\nThe optimizer, the averages (ema.decays) and the model have to be those that it was saved with."
        )
