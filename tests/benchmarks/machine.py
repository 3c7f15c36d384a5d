"""What the numbers were measured on: cores held, load, processor, versions."""

import dataclasses
import os
import platform
import resource
import time
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av", "opencv-python-headless", "torch",
    "torchcodec", "diffusers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How every benchmark of one call runs.

    Attributes:
      cores: for each side; both use as many threads.
      quick: tiny sizes, to see that everything runs.
      repeats: rounds of what is timed.
      topology: of TPU compilations.
    """

    cores: int
    quick: bool
    repeats: int
    topology: str


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def hold_to_cores(count: int | None) -> int:
    """Keep this process, and what it starts from now on, to its first `count` cores (None: all); returns how many.

    XLA makes one thread for each core that the process may use when its backend starts.
    """
    cores = usable_cores()[:count]
    os.sched_setaffinity(0, cores)
    return len(cores)


def describe(cores: int) -> dict[str, object]:
    """For the head of a report."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": _processor(),
        "instructions": instructions(),
        "cores_used": cores,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "niceness": os.nice(0),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


# What keeps each side to AVX2 on a processor that has more: read when JAX, and PyTorch with its libraries, are loaded.
AVX2_ONLY = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def hold_to_avx2() -> None:
    """Keep what this process loads from now on to AVX2."""
    for name, value in AVX2_ONLY.items():
        before = os.environ.get(name)
        os.environ[name] = f"{before} {value}" if name == "XLA_FLAGS" and before else value


def instructions() -> str:
    """The widest vector instructions that are used: those of the processor, or AVX2 after `hold_to_avx2`."""
    has = _of_cpuinfo("flags").split()
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in has), "not known")
    held = AVX2_ONLY["XLA_FLAGS"] in os.environ.get("XLA_FLAGS", "").split()
    return f"AVX2 of {widest}" if held and widest == "AVX-512" else widest


def children() -> list[int]:
    """Processes that this one has started, worker processes for instance."""
    found = []
    for listed in Path("/proc/self/task").glob("*/children"):
        found += [int(child) for child in listed.read_text().split()]
    return found


def private_memory_mib(process: int | str = "self") -> float:
    """What a process has in memory and shares with no other one."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def peak_memory_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _processor() -> str:
    return _of_cpuinfo("model name") or platform.processor() or platform.machine()


def _of_cpuinfo(name: str) -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
