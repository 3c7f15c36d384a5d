"""What a run prints: tables at the start, a progress bar on a terminal, plain lines in a log."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jvgen import nested
from jvgen.data.stream.config import BucketConfig
from jvgen.nn.network import Parameters
from jvgen.training.state import size_of


class Printer:
    """Lines of a run on standard output, from the first process only; with a progress bar on a terminal."""

    def __init__(self, name: str, steps: int, console: Console | None = None):
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.terminal = self.console.is_terminal
        if not self.terminal:
            # Tables in a log are not cut to an imagined terminal.
            self.console.width = 160
        self._first = jax.process_index() == 0
        self._progress = None
        if self.terminal and self._first:
            self._progress = Progress(
                TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"), console=self.console,
            )  # fmt: skip
            self._task = self._progress.add_task(name, total=steps, loss="")

    def say(self, text: Any) -> None:
        """Print one line or table."""
        if self._first:
            self.console.print(text, markup=False) if isinstance(text, str) else self.console.print(text)
            sys.stdout.flush()

    def start(self, step: int) -> None:
        """Show the progress bar, if there is one."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
            self._progress.start()

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, loss=f"loss {loss:.4g}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def parameter_table(title: str, shapes: Parameters, shardings: Parameters, trains: Any, depth: int = 3) -> Table:
    """Count, bytes and sharding of parameters, one line a branch of the tree."""
    table = Table(title=title, title_justify="left")
    for column in ("parameters", "arrays", "count", "MiB", "MiB / device", "trained", "sharding of the largest"):
        table.add_column(column, justify="left" if column in ("parameters", "sharding of the largest") else "right")
    places = nested.flatten(shardings)
    groups: dict[str, dict[str, Any]] = {}
    for path, leaf in nested.flatten(shapes).items():
        groups.setdefault("/".join(path.split("/")[:depth]), {})[path] = leaf
    for name, leaves in [*groups.items(), ("total", nested.flatten(shapes))]:
        count, size = size_of(leaves)
        local = sum(_local_bytes(leaf, places[path]) for path, leaf in leaves.items())
        moving = sum(size_of(leaf)[0] for path, leaf in leaves.items() if trains(path))
        largest = max(leaves, key=lambda path: size_of(leaves[path])[0])
        table.add_row(
            name, str(len(leaves)), f"{count:,}", f"{size / 2**20:.2f}", f"{local / 2**20:.2f}",
            "yes" if moving == count else "no" if not moving else f"{moving:,}",
            "" if name == "total" else f"{tuple(leaves[largest].shape)} {_spec(places[largest])}",
        )  # fmt: skip
    return table


def _local_bytes(leaf: Any, place: jax.sharding.Sharding) -> int:
    return size_of(jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype))[1]


def _spec(place: jax.sharding.NamedSharding) -> str:
    return f"over {place.spec}" if any(place.spec) else "replicated"


def memory_line(bucket: BucketConfig, compiled: jax.stages.Compiled, seconds: float) -> str:
    """Memory per device of one compiled step, and how long compiling took."""
    line = f"compiled step for {bucket.name} x {bucket.batch_size} in {seconds:.1f} s"
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
    """FLOPs of one step by part."""
    total = sum(flops.values())
    if not total:
        return f"FLOPs per step of {bucket.name}: not known for this task"
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in flops.items())
    return (
        f"FLOPs per step of {bucket.name} x {bucket.batch_size}: {total:.4g} = {total / devices:.4g} a device ({parts})"
    )


def step_line(row: Mapping[str, Any], steps: int) -> str:
    """One log line of a step's row."""
    loss = " ".join(
        f"{name} {row[name]:.6g}" if isinstance(row[name], float) else f"{name} {row[name]}"
        for name in row
        if name == "loss" or name.endswith("/loss")
    )
    norms = [row[name] for name in row if name == "gradient_norm" or name.endswith("/gradient_norm")]
    parts = [
        f"step {row['step'] + 1}/{steps}",
        loss,
        "grad " + " ".join(f"{norm:.3g}" if isinstance(norm, float) else str(norm) for norm in norms),
        f"{row['seconds']:.3g} s/step",
        f"{row['frames_per_second']:.4g} frames/s",
        f"MFU {row['mfu']:.1%}" if row.get("mfu") is not None else "MFU n/a",
        f"data wait {row['data_wait']:.0%}",
        f"RSS {row['host_rss_mib']:.0f} MiB",
    ]
    return "  ".join(parts) + ("  SKIPPED" if row.get("skipped") else "")
