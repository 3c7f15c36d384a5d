"""Reading checkpoints: written by Orbax, verified by digests, restored to any mesh."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from jvgen import exit_codes
from jvgen.config import ConfigError
from jvgen.parallel import processes
from jvgen.storage import Path, absolute, is_empty
from jvgen.training.checkpoint import digest, messages
from jvgen.training.checkpoint.digest import CorruptCheckpoint

ARRAYS, DATA, RUN, DIGESTS = "state", "data", "run", "digests"
# Seconds for which processes wait for each other while a checkpoint is read.
RESTORE_SECONDS = 3600.0


class CheckpointError(Exception):
    """No existing checkpoint can be used, or a checkpoint could not be written."""

    exit_code = exit_codes.USER_ERROR


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


class CheckpointReader:
    """The checkpoints of a run directory, in `checkpoints/STEP`, for reading; nothing in it is changed.

    A run may write to it meanwhile: a checkpoint that it deletes while it is read is not corrupt, and the newer one
    is read instead.

    Args:
      workdir: run directory, or one checkpoint of it (`RUN/checkpoints/STEP`): then only this one is read.
      log: takes messages for the user.

    Raises:
      CheckpointError: it is neither, or there is no such checkpoint.
    """

    # The only step that is read; None for all.
    _named_step: int | None = None

    def __init__(self, workdir: Path, *, log: Callable[[str], None] = print):
        workdir, self._named_step = split_checkpoint(workdir)
        self.folder, self._log = absolute(workdir) / "checkpoints", log
        if not self.folder.is_dir():
            is_pipeline = (self.folder.parent / "model_index.json").is_file()
            hint = " Of a pipeline `jvgen sample --weights` makes clips." if is_pipeline else ""
            raise CheckpointError(
                f"{self.folder.parent} is not a run directory: it has no checkpoints folder. Give RUN, or one "
                f"checkpoint of it, RUN/checkpoints/STEP.{hint}"
            )
        self._open(cleanup_tmp_directories=False, read_only=True)
        self._require(self._named_step, self.steps())

    def _open(self, **options: Any) -> None:
        messages.drop_repeated()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(ARRAYS, DATA, RUN, DIGESTS),
            # Metadata of old checkpoints is read when they are restored, where corruption is handled.
            options=ocp.CheckpointManagerOptions(lightweight_initialize=True, **options),
        )

    def close(self) -> None:
        """Release the resources of Orbax."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

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
        step = self._step_of(step)
        self._require(step, self.steps())
        while candidates := [s for s in self.steps() if s not in tried and step in (None, s)]:
            candidate = candidates[-1]
            tried.add(candidate)
            try:
                manifest, _, run = self._documents(candidate)
                return candidate, manifest["arrays"], run
            except CorruptCheckpoint as error:
                if self._exists(candidate):
                    self._log(f"WARNING: checkpoint of step {candidate}: {error}.")
            self._manager.reload()
            self._require(step, self.steps())
        raise CheckpointError(f"{self.folder}: no readable checkpoint.")

    def loader_state(self, step: int) -> dict[str, Any]:
        """The state of the loader in the checkpoint of a step; raises `CorruptCheckpoint` if it cannot be read."""
        return self._documents(step)[1]

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

        A corrupt checkpoint is logged, and the one before it is tried.

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
        tried: set[int] = set()
        step = self._step_of(step)
        present = self._present(step, tried)
        while candidates := [s for s in present if s not in tried and step in (None, s)]:
            candidate = candidates[-1]
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
                    restored = self._arrays(candidate, readable) if readable else {}
                except CorruptCheckpoint as error:
                    problem = str(error)
                # Each process reads its shards only. Digests are sums over the devices of all.
                problem = _any_problem(problem)
                if problem is None and restored:
                    try:
                        digest.check_arrays(manifest, restored)
                    except CorruptCheckpoint as error:
                        problem = str(error)
                    problem = _any_problem(problem)
                if problem is None:
                    return Restored(candidate, restored, data, run)
            # Process 0 says it for all: discarding moves the folder.
            if processes.broadcast(self._exists(candidate), "corrupt checkpoint", RESTORE_SECONDS):
                tried.add(candidate)
                self._discard(candidate, problem)
            present = self._present(step, tried)
        if tried:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {sorted(tried)} is valid (see above). "
                "The run was not restarted from step 0: restore a checkpoint from a copy, or use another run directory."
            )
        return None

    def _present(self, step: int | None, tried: set[int]) -> list[int]:
        """Steps of all complete checkpoints as process 0 sees them; new incomplete ones are discarded and `tried`."""
        self._manager.reload()
        incomplete = [left for left in self._incomplete() if left not in tried] if processes.index() == 0 else []
        present, incomplete = processes.broadcast([self.steps(), incomplete], "checkpoints", RESTORE_SECONDS)
        for left in incomplete:
            tried.add(left)
            self._discard(left, "it is incomplete")
        if step is not None and step not in tried:
            self._require(step, present)
        return present

    def _require(self, step: int | None, present: list[int]) -> None:
        if step is not None and step not in present:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; its steps are {present or 'none'}.")

    def _step_of(self, step: int | None) -> int | None:
        """The step that is asked for, or the one of the checkpoint that this was opened with."""
        if self._named_step is None or step in (None, self._named_step):
            return step if self._named_step is None else self._named_step
        raise CheckpointError(
            f"step {step} is asked for, but {self.folder / str(self._named_step)} is the checkpoint of step "
            f"{self._named_step}: give the run directory {self.folder.parent}, or leave the step out."
        )

    def _exists(self, step: int) -> bool:
        """Whether a checkpoint is still there: a run deletes those that it does not keep."""
        return (self.folder / str(step)).exists()

    def _incomplete(self) -> list[int]:
        """Steps of checkpoint folders that Orbax does not list as complete."""
        listed = set(self.steps())
        if is_empty(self.folder):
            return []
        found = [int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]
        return sorted(step for step in found if step not in listed)

    def _documents(self, step: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        handler = ocp.JsonCheckpointHandler()
        try:
            folder = self.folder / str(step)
            documents = {name: handler.restore(folder / name, args=ocp.args.JsonRestore()) for name in (DATA, RUN)}
            manifest = handler.restore(folder / DIGESTS, args=ocp.args.JsonRestore())
        except Exception as error:
            _raise_unless_corrupt(error)
            raise CorruptCheckpoint(f"its documents cannot be read ({_first_line(error)})") from error
        digest.check_manifest(manifest, documents)
        return manifest, documents[DATA], documents[RUN]

    def _arrays(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=want.sharding, global_shape=want.shape, dtype=want.dtype)
            for name, want in wanted.items()
        }
        # Not by the manager, which ends with a barrier: a process that cannot read its shards would not get there.
        handler = ocp.PyTreeCheckpointHandler()
        try:
            read = handler.restore(
                self.folder / str(step) / ARRAYS,
                args=ocp.args.PyTreeRestore(item=dict(wanted), restore_args=arguments, partial_restore=True),
            )
            arrays = dict(read)
        except Exception as error:
            messages.drop_late_reads()
            _raise_unless_corrupt(error)
            raise CorruptCheckpoint(f"its arrays cannot be read ({_first_line(error)})") from error
        finally:
            handler.close()
        return arrays

    def _discard(self, step: int, problem: str) -> None:
        """Log a corrupt checkpoint."""
        self._log(f"WARNING: checkpoint {self.folder / str(step)} is corrupt: {problem}. Trying the one before.")


def split_checkpoint(folder: Path) -> tuple[Path, int | None]:
    """The run directory and the step of a folder `RUN/checkpoints/STEP`; any other folder and None."""
    whole = absolute(folder)
    if whole.name.isdecimal() and whole.parent.name == "checkpoints" and not (whole / "checkpoints").is_dir():
        return whole.parent.parent, int(whole.name)
    return folder, None


def _any_problem(problem: str | None) -> str | None:
    """The problem of the first process that has one."""
    return processes.combine(problem, _first_problem, "checkpoint read", RESTORE_SECONDS)


def _first_problem(problems: list[str | None]) -> str | None:
    found = [(number, problem) for number, problem in enumerate(problems) if problem is not None]
    if not found or len(problems) == 1:
        return problems[0] if found else None
    return f"process {found[0][0]}: {found[0][1]}"


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
