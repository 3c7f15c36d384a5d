"""The world model that a run starts with: read from a run or an export, and checked against the environment."""

from typing import Any

import jax
import numpy as np

from jvgen import nested
from jvgen.config import Config, ConfigError
from jvgen.control.world_data import unlike
from jvgen.interop.from_torch import import_folder
from jvgen.models.ivideogpt.torch_map import TRANSFORMER_FIELDS, adapt_transformer
from jvgen.nn.network import Parameters
from jvgen.reinforcement.config import ImaginationConfig
from jvgen.storage import Path, as_path
from jvgen.tasks.world_model import WorldModelConfig, check_trained_with, has_goal
from jvgen.training.checkpoint import identity
from jvgen.training.checkpoint.reader import CheckpointReader, split_checkpoint
from jvgen.training.checkpoint.restore import load_for_inference
from jvgen.training.experiment import Experiment

# What may differ between the pretrained networks and those of the run: not the shapes of what is taken.
FREE = {
    "tokenizer": frozenset({"dropout", "commitment", "remat"}),
    "transformer": frozenset(TRANSFORMER_FIELDS) - {"tokens_per_frame"},
}


def read_pretrained(config: ImaginationConfig, *, check_only: bool = False) -> Parameters:
    """Parameters of `{"tokenizer": ..., "transformer": ...}` from the folder that `config.pretrained` names, numpy.

    Args:
      check_only: compare the configurations and read no weights of a run.

    Raises:
      ConfigError: neither a run of a world model nor an export of one, networks of other sizes, a world model with a
        goal in its context, or an export with another tokenizer than that of its transformer.
    """
    folder = as_path(config.pretrained)
    exported = (folder / "tokenizer").is_dir() and (folder / "transformer").is_dir()
    if exported:
        check_trained_with(folder)
        found, goal = {name: import_folder(folder / name) for name in ("tokenizer", "transformer")}, has_goal(folder)
    else:
        experiment = trained_experiment(folder)
        task = experiment.task
        found = {"tokenizer": (task.tokenizer, None), "transformer": (task.transformer, None)}
        goal = task.goal
    if goal and not config.accept_other_data:
        raise ConfigError(
            f"imagination.pretrained = {folder}: it was trained with a goal image as first frame of its context "
            "(task.goal), and imagination gives it consecutive frames. Start from a world model without one, or set "
            "imagination.accept_other_data=true, so that its updates in this run teach it that."
        )
    for name, (network, _) in found.items():
        _check_same(name, network, getattr(config, name), folder)
    if check_only:
        return {}
    if exported:
        parameters = {name: tree for name, (_, tree) in found.items()}
    else:
        _, task, trained, _ = load_for_inference(folder)
        frozen = task.load_frozen()
        parameters = {
            "tokenizer": frozen["tokenizer"],
            "transformer": jax.device_get(task.transformer(trained, frozen)),
        }
    # Without heads that the run lacks or has in another shape: those are initialized randomly.
    transformer = adapt_transformer(parameters["transformer"], found["transformer"][0], config.transformer)
    return {
        "tokenizer": parameters["tokenizer"],
        "transformer": nested.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), transformer),
    }


def trained_experiment(folder: Path) -> Experiment:
    """The experiment of a run of a world model.

    Raises:
      ConfigError: no such run, or one of another task.
    """
    if not (split_checkpoint(folder)[0] / "checkpoints").is_dir():
        raise ConfigError(
            f"{folder}: neither a run directory nor a folder with exported tokenizer/ and transformer/ of a world "
            "model."
        )
    reader = CheckpointReader(folder)
    try:
        experiment = identity.experiment_of(reader.run_document())
    finally:
        reader.close()
    if not isinstance(experiment.task, WorldModelConfig):
        raise ConfigError(f"{folder}: a run of {type(experiment.task).__name__}; expected one of WorldModelConfig.")
    return experiment


def check_trained_on(model: str | Path, environment: Any) -> None:
    """Raise `ConfigError` where a run was trained on recordings that are not of this environment.

    Exports do not say what they were trained on: nothing is compared.
    """
    folder = as_path(model)
    if not (split_checkpoint(folder)[0] / "checkpoints").is_dir():
        return
    fault = unlike(trained_experiment(folder).data, environment)
    if fault is not None:
        raise ConfigError(
            f"imagination.pretrained = {folder}: {fault} (imagination.accept_other_data=true accepts it.)"
        )


def _check_same(name: str, found: Config, wanted: Config, folder: Path) -> None:
    if type(found) is not type(wanted):
        raise ConfigError(f"{folder}: its {name} is a {type(found).__name__}, not that of iVideoGPT.")
    free = FREE[name]
    if name == "transformer" and found.action_width == wanted.action_width:
        # Its action embedding is taken, which says how it is used.
        free = free - {"action_everywhere"}
    differences = [
        f"{field} = {getattr(found, field)}, the run's is {getattr(wanted, field)}"
        for field in type(wanted).__dataclass_fields__
        if field not in free and getattr(found, field) != getattr(wanted, field)
    ]
    if differences:
        raise ConfigError(
            f"imagination.pretrained = {folder}: its {name} has {'; '.join(differences)}. Set imagination.{name} so."
        )
