"""From checkpoints to a training state, or to parameters for inference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jvgen import nested
from jvgen.nn.network import Parameters
from jvgen.parallel.mesh import single_device_mesh
from jvgen.parallel.rules import Sharding
from jvgen.storage import Path, as_path
from jvgen.tasks.task import Task
from jvgen.training.checkpoint import identity, initial
from jvgen.training.checkpoint.init_from import init_from
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.checkpoint.reader import CheckpointReader
from jvgen.training.experiment import Experiment
from jvgen.training.optimization import parameter_paths
from jvgen.training.optimization.ema import select
from jvgen.training.program import Program
from jvgen.training.state import TrainState


def restore_state(
    program: Program,
    checkpoints: Checkpoints,
    loader: Any,
    document: dict[str, Any],
    allow_changes: bool,
    log: Callable[[str], None],
) -> TrainState:
    """The state of the latest valid checkpoint on the program's mesh; if there are none, that of another run which
    `init_from` names, or a fresh one.

    Raises:
      ConfigError: the checkpoint is of another model, data set or seed; all differences are listed.
      CheckpointError: there are checkpoints and none is valid, or writing the first one was interrupted.
    """
    accepted = (".*",) if allow_changes else program.experiment.checkpoint.accept_changes

    def check(data: dict[str, Any], run: dict[str, Any]) -> None:
        identity.check_same_run(run, document, accepted, log)
        if data and ".*" not in accepted:
            loader.check_state(data)

    wanted = program.abstract_state().saved()
    restored = checkpoints.restore(wanted, check, may_be_missing=TrainState.may_be_missing)
    if restored is None:
        initial.check_import_finished(checkpoints.folder.parent)
        if program.experiment.init_from.run is not None:
            return init_from(program, checkpoints.folder.parent, log)
        log(f"starting from step 0 with seed {program.experiment.seed}: no checkpoint in {checkpoints.folder}")
        return program.init()
    if loader is not None:
        loader.resume(restored.data)
    log(f"restored step {restored.step} from {checkpoints.folder}, checksums verified")
    arrays = restored.arrays
    missing = sorted(wanted.keys() - arrays.keys())
    if missing:
        log(f"{len(missing)} arrays start anew, which the checkpoint does not hold: {missing[0]}, ...")
        parameters = program.abstract.with_saved(wanted | arrays).parameters
        arrays = arrays | program.start_from(parameters, missing)
    key, frozen = program.external_inputs()
    return dataclasses.replace(program.abstract, key=key, frozen=frozen).with_saved(arrays)


def load_for_inference(
    run: Path, ema: float | str | None = None, *, step: int | None = None, sharding: Sharding | None = None
) -> tuple[Experiment, Task, Parameters, int]:
    """Read a trained run's parameters, without its optimizer.

    Args:
      run: run directory.
      ema: decay of the EMA to use (0.9999 or "0.9999"); "raw" for the parameters themselves; None or "best" for the
        largest decay that the run keeps, or the raw parameters if it keeps no EMA.
      step: of the checkpoint; by default the latest valid one.
      sharding: of the parameters; one device by default.

    A checkpoint of an import has no EMA, which starts from the parameters: then these are read.

    Returns:
      experiment, task, float32 parameters (`{network: ...}`), steps trained.

    Raises:
      CheckpointError: no such run, or no valid checkpoint.
      ConfigError: an EMA that the run does not keep.
    """
    checkpoints = CheckpointReader(as_path(run))
    try:
        experiment = identity.experiment_of(checkpoints.run_document())
        task = experiment.task.build()
        sharding = sharding or Sharding(single_device_mesh())
        shapes = {name: network.shapes for name, network in sorted(task.networks.items())}
        shardings = nested.flatten(sharding.storage(task.axes(), shapes))
        paths = nested.flatten(shapes)
        sources = _sources(experiment, task, ema)
        wanted = {
            path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
            for path, shape in paths.items()
        }
        restored = checkpoints.restore(
            {sources[path]: want for path, want in wanted.items()},
            step=step,
            partial=True,
            may_be_missing=TrainState.may_be_missing,
        )
        assert restored is not None, "run_document() found a checkpoint"
        found = {path: restored.arrays[source] for path, source in sources.items() if source in restored.arrays}
        averaged = {f"parameters/{path}": want for path, want in wanted.items() if path not in found}
        if averaged:
            raw = checkpoints.restore(averaged, step=restored.step, partial=True)
            assert raw is not None
            found |= {name.removeprefix("parameters/"): array for name, array in raw.arrays.items()}
    finally:
        checkpoints.close()
    return experiment, task, nested.unflatten({path: found[path] for path in paths}), restored.step


def _sources(experiment: Experiment, task: Task, ema: float | str | None) -> dict[str, str]:
    """Parameter path -> name of the array in the checkpoint that it is read from."""
    decay = select(experiment.ema, ema)
    program_paths = list(nested.flatten(task.axes()))
    if decay == "raw":
        return {path: f"parameters/{path}" for path in program_paths}
    config = experiment.ema
    frozen = [experiment.optimizers.get(o.name, experiment.optimizer).frozen for o in task.objectives()]
    patterns = [o.parameters for o in task.objectives()]

    def averaged(path: str) -> bool:
        trained = any(
            parameter_paths.matches(pattern, path) and not parameter_paths.matches(excluded, path)
            for pattern, excluded in zip(patterns, frozen, strict=True)
        )
        return trained and parameter_paths.matches(config.parameters, path)

    return {path: f"ema/{decay}/{path}" if averaged(path) else f"parameters/{path}" for path in program_paths}
