"""Pretraining of video generators at pod scale, in JAX.

The names below are the stable interface: `import jvgen` is fast, imports neither JAX nor torch and touches no device;
each name is loaded when it is first used. So are the namespaces `jvgen.control` (environments, planning, imagination),
`jvgen.data` (data sets, clips, rendered scenes), `jvgen.evaluation` (metrics, plots, contact sheets), `jvgen.geometry`
(cameras, camera paths, epipolar lines) and `jvgen.models` (networks); what each lists in `__all__` is stable too. Other
modules may change between minor versions.
"""

from jvgen.lazy_names import lazy_names

__version__ = "0.2.0"

_MODULES = {
    "Experiment": "training.experiment",
    "Hook": "training.telemetry.hooks",
    "WorldModel": "control.world_model",
    "load_experiment": "training.experiment",
    "load_run": "runs.run",
    "load_vae": "autoencoding.vae",
    "load_world_model": "runs.world_models",
    "train": "training.loop",
    "control": "control",
    "data": "data",
    "evaluation": "evaluation",
    "geometry": "geometry",
    "models": "models",
}

__all__ = ["__version__", *_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
