"""XLA's flags for tests: most of their time is compilation, of programs that run once or twice.

Without the fusion emitters, which build an MLIR pipeline for each fusion, compiling takes less than half as long.
"""

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def flags(devices: int = 1) -> str:
    """`XLA_FLAGS` of a process with this many host devices."""
    options = {"xla_force_host_platform_device_count": devices} | OPTIONS
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
