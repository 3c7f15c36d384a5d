"""Pretraining of video generators at pod scale, in JAX.

The names below are the stable interface: `import jvgen` is fast, imports neither JAX nor torch and touches no device;
each name is loaded when it is first used. So are the namespaces `jvgen.data` (data sets, clips, rendered scenes),
`jvgen.evaluation` (metrics, plots, contact sheets), `jvgen.geometry` (cameras, camera paths, epipolar lines) and
`jvgen.models` (networks); what each lists in `__all__` is stable too. Other modules may change between minor versions.
"""

import importlib
from typing import Any

__version__ = "0.2.0.dev0"

_PUBLIC = {
    "Experiment": "jvgen.training.experiment",
    "Hook": "jvgen.training.telemetry.hooks",
    "WorldModel": "jvgen.control.world_model",
    "load_experiment": "jvgen.training.experiment",
    "load_run": "jvgen.runs.run",
    "load_vae": "jvgen.autoencoding.vae",
    "load_world_model": "jvgen.runs.world_models",
    "train": "jvgen.training.loop",
}

_NAMESPACES = ("data", "evaluation", "geometry", "models")

__all__ = ["__version__", *_NAMESPACES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"jvgen.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'jvgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
