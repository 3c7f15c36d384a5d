"""Run directories that start from given parameters: their first checkpoint, at step 0."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.nn.network import Parameters
from jvgen.parallel.mesh import host_device, single_device_mesh
from jvgen.storage import Path, as_path, read_json_object, remove_tree, write_text
from jvgen.training import state
from jvgen.training.checkpoint import identity
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.checkpoint.reader import CheckpointError, split_checkpoint
from jvgen.training.experiment import Experiment
from jvgen.training.optimization import parameter_paths
from jvgen.training.optimization.health import Health
from jvgen.training.program import Program

# Marks a run directory while its first checkpoint is being written: if that is interrupted, training must not start
# from random parameters instead.
UNFINISHED = "import_unfinished"
# The files of weights that a run directory began with, for model cards.
IMPORTED = "imported.json"


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
    """Raise `ConfigError` if a run directory already holds checkpoints; those of an interrupted import do not count."""
    steps = saved_steps(workdir)
    if steps and not (as_path(workdir) / UNFINISHED).exists():
        raise ConfigError(
            f"{workdir} already holds checkpoints of steps {', '.join(steps)}; use another run directory."
        )


def imported_weights(run: str | Path) -> list[dict[str, str]]:
    """The weights that a run directory, or one checkpoint of it, began with; none if it imported none.

    Returns:
      a dict for each network: `network`, `path` and `digest`, the content hash of the files.

    Raises:
      UnreadableFile: the record was changed by hand.
    """
    file = split_checkpoint(as_path(run))[0] / IMPORTED
    return read_json_object(file)["weights"] if file.is_file() else []


def write_first_checkpoint(
    experiment: Experiment, workdir: Path, parameters: Parameters, imported: Sequence[dict[str, str]] = ()
) -> None:
    """Create a run directory whose training starts from these parameters (of all or some networks) at step 0.

    The checkpoint holds the parameters and no optimizer state or EMA, which start anew when it is restored. It is
    written from host memory: 4 bytes per parameter, and nothing on an accelerator. What an interrupted import left in
    the directory is replaced; if this one fails, nothing of it is left.

    Args:
      parameters: `{network: ...}`, host or device arrays; networks that are left out are initialized randomly.
      imported: where they are from, see `imported_weights`.

    Raises:
      ConfigError: the run directory already holds checkpoints.
      CheckpointError: the checkpoint could not be written.
    """
    check_new_run(workdir)
    host = host_device()
    program = Program.build(experiment, single_device_mesh(host))
    document = identity.run_document(experiment, program.task)
    with jax.default_device(host), _whole_or_absent(as_path(workdir)):
        on_host = _complete(program, {path: to_host(value) for path, value in nested.flatten(parameters).items()})
        start = {
            "step": jnp.zeros((), jnp.int32),
            "parameters": nested.unflatten(on_host),
            "health": Health.start(),
        }
        checkpoints = Checkpoints(workdir, experiment.checkpoint.replace(on_failed_save="stop"))
        try:
            checkpoints.save(0, parameter_paths.name_leaves(start), {}, document)
            checkpoints.wait()
        finally:
            checkpoints.close()
        if imported:
            write_text(as_path(workdir) / IMPORTED, json.dumps({"weights": list(imported)}, indent=2) + "\n")


@contextlib.contextmanager
def _whole_or_absent(workdir: Path) -> Iterator[None]:
    """A run directory that is marked as unfinished in this context and has nothing of it if it fails."""
    existed, unfinished = workdir.is_dir(), workdir / UNFINISHED
    if unfinished.exists():
        remove_tree(workdir / "checkpoints")
        (workdir / IMPORTED).unlink(missing_ok=True)
    write_text(unfinished, "")
    try:
        yield
    except BaseException:
        remove_tree(workdir / "checkpoints" if existed else workdir)
        if existed:
            (workdir / IMPORTED).unlink(missing_ok=True)
            unfinished.unlink()
        raise
    unfinished.unlink()


def to_host(value: Any) -> jax.Array:
    """A float32 array in host memory."""
    return jax.device_put(np.asarray(value, np.float32), host_device())


def _complete(program: Program, parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters by path, with random ones where there are none."""
    paths = list(nested.flatten(program.abstract.parameters))
    unknown = sorted(parameters.keys() - set(paths))
    assert not unknown, f"{unknown[0]} is not a parameter of this task"
    missing = [path for path in paths if path not in parameters]
    if not missing:
        return parameters

    def init(key: jax.Array) -> dict[str, jax.Array]:
        fresh = nested.flatten(program.task.init(jax.random.fold_in(key, state.INIT)))
        return {path: fresh[path] for path in missing}

    key = jax.random.key(program.experiment.seed)
    # As in `Program.init`: it runs once, and compiles faster so.
    return parameters | jax.jit(init).lower(key).compile(compiler_options={"xla_backend_optimization_level": 0})(key)
