"""Throughput and memory of a run: FLOPs per step, model FLOPs utilization, memory of host and devices."""

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from jvgen.data.stream.config import BucketConfig
from jvgen.parallel.chips import chip_of
from jvgen.tasks.task import Task

FORMULA = (
    "MFU = FLOPs of the step / (seconds x devices x bfloat16 peak per device), counting forward and backward passes of "
    "trained networks, without padding, recomputation and frozen networks"
)


def peak_flops(device: jax.Device, configured: float | None) -> float | None:
    """Peak of one device in FLOP/s: the configured one, else that of the chip table; None if unknown."""
    chip = chip_of(device)
    return configured if configured is not None else None if chip is None else chip.device_peak_flops


def step_flops(task: Task, bucket: BucketConfig) -> dict[str, float]:
    """FLOPs of one training step by component: forward and backward pass, for frozen networks forward only."""
    frozen = without_backward_pass(task)

    def passes(part: str) -> int:
        if part.split("/")[0] in frozen:
            return 1
        # Both operands of attention's products are activations: they have gradients beside kernels that have none.
        return 3 if part == "attention" else 1 + task.backward_passes

    return {part: flops * bucket.batch_size * passes(part) for part, flops in task.flops(bucket).items()}


def without_backward_pass(task: Task) -> set[str]:
    """Names of the frozen networks that no LoRA is trained for."""
    return set(task.frozen_networks) - task.adapted_networks


def trained_flops(task: Task, flops: Mapping[str, float]) -> dict[str, float]:
    """Of `step_flops`, the components of networks that are trained: what utilization counts."""
    frozen = without_backward_pass(task)
    return {part: count for part, count in flops.items() if part.split("/")[0] not in frozen}


def utilization(flops: Mapping[str, float], seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilization, a fraction, of FLOPs by component; None if peak or FLOPs are unknown."""
    total = sum(flops.values())
    return total / (seconds * devices * peak) if peak and total and seconds > 0 else None


def host_rss_mib() -> float:
    """Resident memory of this process in MiB (its peak on systems without /proc)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_memory_peak_mib() -> dict[str, float]:
    """Peak memory so far of the fullest device of this process, `{"device_memory_peak_mib": ...}`; {} on CPUs."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {"device_memory_peak_mib": max(known) / 2**20} if known else {}


def peak_memory(device: jax.Device) -> str:
    """Peak memory so far as text: of a device (if its backend counts it) and of this process on the host."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    host = f"{used / 2**30:.2f} GiB of host memory"
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return host if peak is None else f"{peak / 2**30:.2f} GiB on {device.platform}:{device.id}, {host}"
