"""What a run logs at its start: times, parameters, memory and FLOPs of the compiled steps."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from jvgen import nested
from jvgen.data.stream.config import BucketConfig
from jvgen.nn.network import Parameters
from jvgen.training.state import size_of


class StartClock:
    """Seconds from a start to its first training step, by part.

    Args:
      age: seconds that have passed since the start when the clock is made.
    """

    def __init__(self, age: float = 0.0):
        self._began = self._last = time.perf_counter() - age
        self.seconds: dict[str, float] = {}

    @classmethod
    def of_process(cls) -> "StartClock":
        """A clock that started when the operating system started this process (or now, where that is unknown)."""
        try:
            # Field 22: clock ticks from boot to the start of the process; field 2, the name, may hold spaces.
            ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError, IndexError):
            age = 0.0
        return cls(max(0.0, age))

    def mark(self, part: str) -> None:
        """Count the time since the last mark as a part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def report(self) -> dict[str, float]:
        """Seconds by part, and their "total"."""
        return self.seconds | {"total": sum(self.seconds.values())}


def start_line(report: Mapping[str, float]) -> str:
    """`StartClock.report` as one line."""
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in report.items() if part != "total")
    return f"first step {report['total']:.1f} s after the start (seconds: {parts})"


def parameter_table(
    title: str, shapes: Parameters, shardings: Parameters, trainable: Callable[[str], bool], depth: int = 3
) -> Table:
    """Count, bytes and sharding of parameters, one row per branch of the tree down to `depth`."""
    table = Table(title=title, title_justify="left")
    for column in ("parameters", "arrays", "count", "MiB", "MiB / device", "trained", "sharding of the largest"):
        table.add_column(column, justify="left" if column in ("parameters", "sharding of the largest") else "right")
    shardings = nested.flatten(shardings)
    groups: dict[str, dict[str, Any]] = {}
    for path, leaf in nested.flatten(shapes).items():
        groups.setdefault("/".join(path.split("/")[:depth]), {})[path] = leaf
    for name, leaves in [*groups.items(), ("total", nested.flatten(shapes))]:
        count, size = size_of(leaves)
        local = sum(_local_bytes(leaf, shardings[path]) for path, leaf in leaves.items())
        trained = sum(size_of(leaf)[0] for path, leaf in leaves.items() if trainable(path))
        largest = max(leaves, key=lambda path: size_of(leaves[path])[0])
        table.add_row(
            name, str(len(leaves)), f"{count:,}", f"{size / 2**20:.2f}", f"{local / 2**20:.2f}",
            "yes" if trained == count else "no" if not trained else f"{trained:,}",
            "" if name == "total" else f"{tuple(leaves[largest].shape)} {_spec(shardings[largest])}",
        )  # fmt: skip
    return table


def _local_bytes(leaf: Any, sharding: jax.sharding.Sharding) -> int:
    return size_of(jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype))[1]


def _spec(sharding: jax.sharding.NamedSharding) -> str:
    return f"over {sharding.spec}" if any(sharding.spec) else "replicated"


def memory_line(bucket: BucketConfig, compiled: jax.stages.Compiled, seconds: float, cached: bool = False) -> str:
    """Memory per device of one compiled step, its compile time and whether it was read from the persistent cache."""
    source = " (from the cache)" if cached else ""
    line = f"compiled step for {bucket.name} x {bucket.batch_size} in {seconds:.1f} s{source}"
    analysis = compiled.memory_analysis()
    if analysis is None:
        return line
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "donated": -analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) / 2**20
    listed = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in parts.items())
    return f"{line}: {total:.1f} MiB per device{_against_limit(total)} ({listed})"


def _against_limit(total: float) -> str:
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f" of {limit / 2**20:.0f}" if limit else ""


def flops_line(bucket: BucketConfig, flops: Mapping[str, float], devices: int) -> str:
    """FLOPs per step by component."""
    total = sum(flops.values())
    if not total:
        return f"FLOPs per step of {bucket.name}: unknown for this task"
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in flops.items())
    name = f"{bucket.name} x {bucket.batch_size}"
    return f"FLOPs per step of {name}: {total:.4g}, {total / devices:.4g} per device ({parts})"
