"""How fast a run is against what its devices can do: FLOPs of a step and model FLOPs utilisation."""

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from jvgen.data.stream.config import BucketConfig
from jvgen.parallel.chips import chip_of
from jvgen.tasks.task import Task

FORMULA = "MFU = FLOPs of the step / (seconds x devices x bfloat16 peak of a device); recomputation does not count"


def peak_flops(device: jax.Device, configured: float | None) -> float | None:
    """Peak of one device in FLOP/s; None where it is not known."""
    chip = chip_of(device)
    return configured if configured is not None else None if chip is None else chip.device_peak_flops


def step_flops(task: Task, bucket: BucketConfig) -> dict[str, float]:
    """Floating-point operations of one training step by part; of frozen networks there is no backward pass."""
    frozen = set(task.frozen_networks)
    return {
        part: flops * bucket.batch_size * (1 if part.split("/")[0] in frozen else 3)
        for part, flops in task.flops(bucket).items()
    }


def utilisation(flops: Mapping[str, float], seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, a fraction; None where peak or FLOPs are not known."""
    total = sum(flops.values())
    return total / (seconds * devices * peak) if peak and total and seconds > 0 else None


def host_rss_mib() -> float:
    """Resident memory of this process in MiB (the peak of it where there is no /proc)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_memory(device: jax.Device) -> str:
    """Most memory in use so far, on a device (where its backend counts it) and of the host, for people to read."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    host = f"{used / 2**30:.2f} GiB of the host"
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return host if peak is None else f"{peak / 2**30:.2f} GiB on {device.platform}:{device.id}, {host}"
