"""Run directories that start from given parameters: their first checkpoint, at step 0."""

from pathlib import Path

from jvgen.config import ConfigError
from jvgen.nn.network import Parameters
from jvgen.parallel.mesh import single_device_mesh
from jvgen.training.checkpoint import identity
from jvgen.training.checkpoint.manager import CheckpointError, Checkpoints
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program

# Marks a run directory while its first checkpoint is being written: if that is interrupted, training must not start
# from random parameters instead.
UNFINISHED = "import_unfinished"


def check_import_finished(workdir: Path) -> None:
    """Raise `CheckpointError` if writing the first checkpoint of a run directory was interrupted."""
    unfinished = workdir / UNFINISHED
    if unfinished.exists():
        raise CheckpointError(
            f"{workdir}: importing weights into it was interrupted. Import them again, or remove {UNFINISHED} to start "
            "from random parameters."
        )


def saved_steps(workdir: Path) -> list[str]:
    """Names of the checkpoint folders of a run directory; none if it does not exist."""
    folder = workdir / "checkpoints"
    return sorted(path.name for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def check_new_run(workdir: Path) -> None:
    """Raise `ConfigError` if a run directory already holds checkpoints."""
    steps = saved_steps(workdir)
    if steps:
        raise ConfigError(
            f"{workdir} already holds checkpoints of steps {', '.join(steps)}; use another run directory."
        )


def write_first_checkpoint(experiment: Experiment, workdir: Path, parameters: Parameters) -> None:
    """Create a run directory whose training starts from these parameters (of all or some networks) at step 0.

    Args:
      parameters: `{network: ...}`, host or device arrays; networks that are left out are initialized randomly.

    Raises:
      ConfigError: the run directory already holds checkpoints.
      CheckpointError: the checkpoint could not be written.
    """
    check_new_run(workdir)
    unfinished = Path(workdir) / UNFINISHED
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    checkpoints = Checkpoints(workdir, experiment.checkpoint.replace(on_failed_save="stop"))
    try:
        # On one device: the mesh of this machine need not be that of the run.
        program = Program.build(experiment, single_device_mesh())
        state = program.init_from(parameters)
        checkpoints.save(0, state.saved(), {}, identity.run_document(experiment, program.task))
        checkpoints.wait()
        unfinished.unlink()
    finally:
        checkpoints.close()
