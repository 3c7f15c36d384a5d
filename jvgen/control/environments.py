"""Opens an environment by name for commands: a data set of scenes, a task of Meta-World, or a user's own."""

import importlib
import inspect
from typing import Any

from jvgen.config import ConfigError
from jvgen.control.scene_environment import SceneEnvironment
from jvgen.storage import as_path

METAWORLD = "metaworld"


def open_environment(name: str, *, split: str = "validation", steps: int | None = None, size: int | None = None) -> Any:
    """An environment whose observations are frames, uint8 `H W C`.

    Args:
      name: folder of a data set of scenes; `metaworld:TASK` or `metaworld:TASK:CAMERA`; or `MODULE:FUNCTION`, which
        takes no arguments and returns a `gymnasium.Env`.
      split: of the data set, whose clips episodes start as.
      steps: actions per episode of scenes and Meta-World; their default if None. A user's own is opened without: who
        steps it ends its episodes.
      size: side of Meta-World's frames; its default if None.

    Raises:
      ConfigError: neither of these; or the function does not return an environment with such observations.
    """
    module, separator, function = name.partition(":")
    if module == METAWORLD and separator:
        return _metaworld(name, function, steps, size)
    if separator and not as_path(name).exists():
        return _own(name, module, function)
    try:
        return SceneEnvironment.of_dataset(name, split, **({} if steps is None else {"steps": steps}))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--env {name}: {error}") from error


def _metaworld(name: str, task: str, steps: int | None, size: int | None) -> Any:
    from jvgen.control.metaworld import MetaWorldEnvironment

    task, _, camera = task.partition(":")
    options = {"camera": camera or None, "steps": steps, "size": size}
    try:
        return MetaWorldEnvironment(task, **{key: value for key, value in options.items() if value is not None})
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--env {name}: {error}") from error


def _own(name: str, module: str, function: str) -> Any:
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--env {name}: cannot be imported ({error}); give MODULE:FUNCTION of an importable module "
            "(PYTHONPATH names its folder), metaworld:TASK, or the folder of a data set of scenes."
        ) from error
    _check_callable(name, make)
    environment = make()
    space = getattr(environment, "observation_space", None)
    if str(getattr(space, "dtype", "")) != "uint8" or len(getattr(space, "shape", ())) != 3:
        raise ConfigError(
            f"--env {name}: its observations are {space}; expected uint8 images (height, width, channels). Wrap it so "
            "that it gives rendered frames."
        )
    return environment


def _check_callable(name: str, make: Any) -> None:
    try:
        inspect.signature(make).bind()
    except ValueError:  # a class of Python itself has no signature
        return
    except TypeError as error:  # neither a function, nor one without arguments
        raise ConfigError(
            f"--env {name}: {error}; give a function that takes no arguments and returns a gymnasium.Env."
        ) from error
