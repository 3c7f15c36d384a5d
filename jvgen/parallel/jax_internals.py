"""What JAX has no public name for: the one module that reads `jax._src`, and says so if a release moved something.

* How launchers are detected. `jax.distributed.initialize` does it too, but tells nobody what it found, and a run has to
  know the number of processes before it connects.
* The client of the coordinator: its key-value store and barriers work before and without a backend.
  `jax.experimental.multihost_utils` needs devices.
* The text of a Pallas kernel in a compiled program, which has its grid.

`tests/processes/test_processes.py` uses all of it in both sets of versions.
"""

import importlib
import sys
from importlib import metadata
from typing import Any

# Class by module of jax._src.clusters.
_CLUSTERS = {
    "SlurmCluster": "slurm_cluster",
    "OmpiCluster": "ompi_cluster",
    "GceTpuCluster": "cloud_tpu_cluster",
    "GkeTpuCluster": "cloud_tpu_cluster",
    "K8sCluster": "k8s_cluster",
}


def cluster(name: str) -> Any:
    """The class with which JAX detects a launcher: `is_env_present`, `get_coordinator_address`, `get_process_count` ...

    Raises:
      RuntimeError: this release of JAX has it elsewhere.
    """
    return _internal(f"jax._src.clusters.{_CLUSTERS[name]}", name)


def distributed_state() -> Any | None:
    """`client`, `num_processes` and `process_id` of this process; None before JAX was imported. Imports nothing."""
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def check_distributed_state() -> None:
    """Raise `RuntimeError` if JAX has `distributed_state` elsewhere: a process would think itself the only one."""
    state = _internal("jax._src.distributed", "global_state")
    for name in ("client", "num_processes", "process_id"):
        if not hasattr(state, name):
            raise RuntimeError(_missing(f"jax._src.distributed.global_state.{name}"))


def mosaic_text(body: bytes) -> str:
    """A serialized Mosaic module (the body of a `tpu_custom_call`) as MLIR text.

    Raises:
      RuntimeError: this release of JAX has what reads it elsewhere.
    """
    what = "estimates of kernels"
    ir, tpu = _internal("jax._src.lib.mlir", "ir", what), _internal("jax._src.lib", "tpu", what)
    with _internal("jax._src.interpreters.mlir", "make_ir_context", what)() as context:
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(body))


def _internal(module: str, name: str, what: str = "runs of several processes") -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(_missing(f"{module}.{name}", what)) from error


def _missing(name: str, what: str = "runs of several processes") -> str:
    return (
        f"JAX {metadata.version('jax')} has no {name}, which {what} need: install a release of JAX that "
        "docs/versions.md lists."
    )
