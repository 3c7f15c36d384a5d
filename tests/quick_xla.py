"""XLA's flags for tests: most of their time is compilation, of programs that run once or twice."""

import os
from importlib import metadata

LEVEL = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Without the fusion emitters, which build an MLIR pipeline for each fusion, compiling takes less than half as long.
# Later versions have no other way to compile fusions.
HAS_OTHER_EMITTERS = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2]) <= (0, 10)
# XLA cuts a program into 32 parts to compile them side by side, and copies it for each. Test processes share the cores.
OPTIONS = (
    LEVEL
    | {"xla_cpu_parallel_codegen_split_count": 1}
    | ({"xla_cpu_use_fusion_emitters": False} if HAS_OTHER_EMITTERS else {})
)
# Of one program, where results are compared bit for bit: as users compile.
FUSION_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if HAS_OTHER_EMITTERS else {}


def flags(devices: int = 1, options: dict[str, int | bool] = OPTIONS) -> str:
    """`XLA_FLAGS` of a process with this many host devices."""
    named = {"xla_force_host_platform_device_count": devices} | options
    return " ".join(f"--{name}={str(value).lower()}" for name, value in named.items())


def begin(devices: int) -> None:
    """Have XLA use them in this process, unless the user chose others.

    The variable keeps those that libtpu knows: on others it ends the process that loads it.
    """
    known = flags(devices, LEVEL)
    if os.environ.setdefault("XLA_FLAGS", known) != known:
        return
    os.environ["XLA_FLAGS"] = flags(devices)
    import jax

    # XLA reads the variable once, with its first backend.
    jax.devices("cpu")
    os.environ["XLA_FLAGS"] = known
