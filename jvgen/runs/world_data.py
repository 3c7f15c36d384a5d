"""Whether a run's world model was trained on recordings of the environment that it is to act in."""

from typing import Any

from jvgen.config import ConfigError
from jvgen.control.world_data import unlike
from jvgen.runs.inference import read_experiment
from jvgen.storage import Path
from jvgen.training.checkpoint.reader import split_checkpoint


def check_trained_on(folder: Path, environment: Any) -> None:
    """Raise `ConfigError` where a run was trained on recordings of another camera, look or action scale.

    What is compared is in the run's config, and in the data sets that it names, those that are still there: recorded
    frames per step, bounds of actions, the camera of recorded environments, the look of scenes. Exported networks do
    not keep any of it: nothing is compared.

    Args:
      folder: run directory or one of its checkpoints, or an export.
      environment: as `jvgen.control.environments.open_environment` gives it.
    """
    run, _ = split_checkpoint(folder)
    if not (run / "checkpoints").is_dir():
        return
    fault = unlike(read_experiment(run).data, environment)
    if fault is not None:
        raise ConfigError(f"{run}: {fault}")
