"""The console of a run: log lines from process 0, with a progress bar if standard output is a terminal."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jvgen.parallel import processes
from jvgen.training.telemetry.goodput import goodput_line
from jvgen.training.telemetry.hooks import Hook, RunInfo
from jvgen.training.telemetry.process_log import ProcessLog
from jvgen.training.telemetry.startup import start_line

# Seconds between two lines about goodput; the last one is printed at the end.
GOODPUT_SECONDS = 600.0


class ConsoleLog(Hook):
    """Logs to standard output on process 0, and does nothing on the others.

    Args:
      name: of the run, shown at the progress bar.
      steps: length of the run.
      log_every: steps between lines; times in a line are means over its steps.
      file: gets every message too, on all processes.
      console: for tests; standard output by default.
    """

    def __init__(self, name: str, steps: int, log_every: int, console: Console | None = None, *,
        file: ProcessLog | None = None,
    ):  # fmt: skip
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._steps, self._log_every, self._file = steps, log_every, file
        self._next_report = time.monotonic() + GOODPUT_SECONDS
        self._goodput: Mapping[str, float] | None = None
        self._start_step = 0
        self._rows: list[Mapping[str, Any]] = []
        self._enabled = processes.index() == 0
        self._progress: Progress | None = None
        if not self._console.is_terminal:
            # Tables in a log file are not cut to the width of a terminal.
            self._console.width = 160
        elif self._enabled:
            self._progress = Progress(
                TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"), console=self._console,
            )  # fmt: skip
            self._bar = self._progress.add_task(name, total=steps, loss="")

    def log(self, message: str | Table) -> None:
        """Print one line or table."""
        if self._file is not None:
            self._file.write(message)
        if self._enabled:
            self._console.print(message, markup=False) if isinstance(message, str) else self._console.print(message)
            sys.stdout.flush()

    def on_start(self, run: RunInfo) -> None:
        self._start_step = run.start_step
        if self._progress is not None:
            self._progress.update(self._bar, completed=run.start_step)
            self._progress.start()

    def on_step(self, row: Mapping[str, Any]) -> None:
        done = row["step"] + 1
        self._rows.append(row)
        if row["step"] == self._start_step or done % self._log_every == 0:
            self.log(step_line(average_times(self._rows), self._steps))
            self._rows = []
        if self._progress is not None:
            self._progress.update(self._bar, completed=done, loss=f"loss {row.get('loss', math.nan):.4g}")

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        listed = "  ".join(f"{name} {value:.5g}" for name, value in values.items() if name != "seconds")
        self.log(f"evaluation at step {step} ({values['seconds']:.1f} s)  {listed}")

    def on_report(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if name == "start":
            self.log(start_line(values))
        elif name == "goodput":
            self._goodput = values
            if time.monotonic() >= self._next_report:
                self._next_report = time.monotonic() + GOODPUT_SECONDS
                self.log(goodput_line(values))

    def on_end(self, status: int | None) -> None:
        if self._goodput is not None:
            self.log(goodput_line(self._goodput))
        if self._progress is not None:
            self._progress.stop()


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


def average_times(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last row, with times averaged over all rows and "skipped" set if any step was skipped."""
    seconds = sum(row["seconds"] for row in rows)
    averaged = dict(rows[-1])
    averaged["seconds"] = seconds / len(rows)
    for name in ("data_wait", "frames_per_second", "mfu"):
        if averaged[name] is not None:
            averaged[name] = sum(row[name] * row["seconds"] for row in rows) / seconds
    averaged["skipped"] = any(row["skipped"] for row in rows)
    return averaged
