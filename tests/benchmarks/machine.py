"""What the numbers were measured on: cores held, load, processor, versions."""

import dataclasses
import os
import platform
import time
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av", "opencv-python-headless", "torch",
    "diffusers",
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
        "cores_used": cores,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "niceness": os.nice(0),
        "python": platform.pythonversion(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
