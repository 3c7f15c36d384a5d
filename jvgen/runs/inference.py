"""A trained run loaded onto the devices of this machine, to sample from and to evaluate."""

import dataclasses

import jax

from jvgen.config import ConfigError
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.nn.network import Parameters
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding
from jvgen.storage import Path, as_path
from jvgen.tasks.task import Task
from jvgen.training.checkpoint import identity
from jvgen.training.checkpoint.initial import imported_weights
from jvgen.training.checkpoint.reader import CheckpointReader
from jvgen.training.checkpoint.restore import load_for_inference
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's experiment, program and parameters.

    Attributes:
      program: the run on the devices of this machine.
      parameters: float32, as training stores them.
      frozen: parameters of frozen networks.
      step: steps trained; 0 for random weights.
      ema: which weights these are: an EMA decay, "raw", or "best" for the largest decay that the run keeps.
      imported: weights that it began with, see `jvgen.training.checkpoint.initial.imported_weights`.
    """

    program: Program
    parameters: Parameters
    frozen: Parameters
    step: int
    ema: str = "best"
    imported: tuple[dict[str, str], ...] = ()

    @property
    def experiment(self) -> Experiment:
        """The description of the run."""
        return self.program.experiment

    @property
    def task(self) -> Task:
        """What was trained."""
        return self.program.task

    @property
    def devices(self) -> int:
        """Devices that a batch is split over."""
        return self.program.sharding.mesh.size

    def compute_parameters(self) -> Parameters:
        """Parameters in the dtypes that training computes with."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.parameters)
        return jax.jit(self.program.cast, out_shardings=shardings)(self.parameters)


def read_experiment(folder: Path) -> Experiment:
    """The description of a run, from its latest readable checkpoint; no array is read.

    Its task takes prompts, as that of `open_run` (`TaskConfig.for_prompts`): both make the same batches.

    Raises:
      CheckpointError: no such run, or no readable checkpoint.
    """
    checkpoints = CheckpointReader(as_path(folder))
    try:
        return _for_prompts(identity.experiment_of(checkpoints.run_document()))
    finally:
        checkpoints.close()


def with_lpips(experiment: Experiment, weights: str | Path | None) -> Experiment:
    """The experiment with LPIPS as its task's perceptual distance; unchanged without weights.

    Raises:
      ConfigError: a task that measures no perceptual distance.
    """
    if weights is None:
        return experiment
    task = experiment.task
    if not hasattr(task, "perceptual"):
        raise ConfigError(f"--lpips-weights {weights}: {type(task).__name__} measures no perceptual distance.")
    perceptual = PerceptualConfig(kind="lpips", weights=str(weights))
    return experiment.replace(task=task.replace(perceptual=perceptual))


def with_vae(experiment: Experiment, folder: str | Path | None) -> Experiment:
    """The experiment with a VAE for the latents that it was trained on; unchanged without a folder.

    Raises:
      ValueError: see `TaskConfig.with_vae`.
    """
    return experiment if folder is None else experiment.replace(task=experiment.task.with_vae(str(folder)))


def open_run(
    folder: Path,
    ema: str | float | None = None,
    step: int | None = None,
    untrained: bool = False,
    lpips: str | Path | None = None,
    vae: str | Path | None = None,
) -> LoadedRun:
    """Load a run onto all devices of this machine, parameters sharded over them.

    Args:
      folder: run directory.
      ema, step: see `load_for_inference`.
      untrained: random weights from the run's seed instead of the checkpoint's, as a baseline.
      lpips: weights of the perceptual distance, instead of the run's own distance.
      vae: folder of the VAE of a run that names none, see `TaskConfig.with_vae`.

    Raises:
      CheckpointError, ConfigError: see `load_for_inference`.
      ValueError: weights of frozen networks are missing or belong to other networks.
    """
    experiment = with_vae(with_lpips(read_experiment(folder), lpips), vae)
    experiment.task.check_weights()
    sharding = Sharding(make_mesh(MeshConfig(fsdp=-1), jax.local_devices()))
    if untrained:
        program = Program.build(experiment, sharding.mesh)
        fresh = program.init()
        return LoadedRun(program, fresh.parameters, fresh.frozen, 0, "raw")
    saved, _, parameters, trained = load_for_inference(folder, ema, step=step, sharding=sharding)
    program = Program.build(with_vae(_for_prompts(with_lpips(saved, lpips)), vae), sharding.mesh)
    _, frozen = program.external_inputs()
    return LoadedRun(program, parameters, frozen, trained, str(ema or "best"), tuple(imported_weights(folder)))


def _for_prompts(experiment: Experiment) -> Experiment:
    return experiment.replace(task=experiment.task.for_prompts())
