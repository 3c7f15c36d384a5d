"""Runs the stages of the demo as `jvgen` commands in processes of their own, and skips those that are complete."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jvgen import __version__, exit_codes
from jvgen.evaluation.report import Report

# One compilation cache for all stages, so that a resumed run does not compile again.
CACHE = "compilation_cache"
# Stages that do not need each other: each has about a gigabyte in memory.
AT_ONCE = 2


class DemoFailed(RuntimeError):
    """A stage exited with an unexpected status."""

    exit_code = exit_codes.USER_ERROR


class Stages:
    """Runs stages and records each one: name, command, seconds, exit status, and the signal that interrupted it.

    Args:
      workdir: keeps the records and the stages' output.
      about: by name of a stage, what it shows and about how many seconds it takes; printed before it runs.
    """

    def __init__(self, workdir: Path, about: Mapping[str, tuple[str, int]] | None = None):
        self._workdir = workdir
        self._logs = workdir / "logs"
        self._logs.mkdir(exist_ok=True)
        self._path = workdir / "stages.json"
        self._about = about or {}
        self._lock = threading.Lock()
        self.records: list[dict] = json.loads(self._path.read_text()) if self._path.exists() else []

    def run(self, name: str, arguments: Sequence[object]) -> None:
        """Run one command to its end, unless a previous demo in this folder completed it.

        Args:
          name: of the stage.
          arguments: of `jvgen`. The folder after `--to` is removed first if a previous attempt was interrupted.

        Raises:
          DemoFailed: the command exits with a status other than 0, or a previous demo completed another one.
        """
        if self._is_complete(name, arguments):
            print(f"[{name}] skipped: complete")
            return
        if "--to" in arguments and (self._logs / f"{name}.log").exists():
            # `export` and `import` refuse to write to a folder that is not empty.
            shutil.rmtree(arguments[arguments.index("--to") + 1], ignore_errors=True)
        start = time.perf_counter()
        self._announce(name, arguments)
        process = self._start(name, arguments)
        # `wait4` tells what this process used, whatever runs beside it.
        _, how, used = os.wait4(process.pid, 0)
        process.returncode = status = os.waitstatus_to_exitcode(how)
        self._record(name, arguments, start, used.ru_utime + used.ru_stime, status)
        if status != 0:
            raise DemoFailed(f"stage {name} exited with status {status}:\n{self._tail(name)}")

    def side_by_side(self, stages: Mapping[str, Sequence[object]]) -> None:
        """`run` of commands that do not need each other, two at a time: each compiles on one core.

        Args:
          stages: arguments of `jvgen` by name of a stage.

        Raises:
          DemoFailed: as `run`, of the first in order that failed, when those that run beside it have ended.
        """
        failed = threading.Event()

        def start(name: str, arguments: Sequence[object]) -> None:
            if failed.is_set():
                return
            try:
                self.run(name, arguments)
            except BaseException:
                failed.set()
                raise

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for one in [pool.submit(start, name, arguments) for name, arguments in stages.items()]:
                one.result()
        finally:
            # After Ctrl-C those that wait do not start.
            pool.shutdown(cancel_futures=True)

    def interrupt(self, name: str, arguments: Sequence[object], run: Path, by: signal.Signals) -> None:
        """Run a training command, send it a signal after its next checkpoint, and run the same command again.

        A run that ends before that is not recorded as interrupted.

        Args:
          name, arguments: see `run`.
          run: run directory that the command trains in.
          by: SIGKILL, or SIGTERM after which the run saves and exits with status 75.

        Raises:
          DemoFailed: one of the two exits with an unexpected status.
        """
        first = f"{name}_interrupted"
        if not self._is_complete(first, arguments) and not self._is_complete(name, arguments):
            # Of an attempt that was killed with this process: a signal sent before training starts shows nothing.
            before = _checkpoints(run)
            start, processor = time.perf_counter(), _processor_seconds()
            self._announce(first, arguments)
            process = self._start(first, arguments)
            while process.poll() is None and _checkpoints(run) <= before:
                time.sleep(0.2)
            if process.poll() is None:
                print(f"[{first}] sending {by.name}")
                process.send_signal(by)
            status = process.wait()
            expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}[by]
            stopped = {"interrupted_by": by.name} if status == expected else {}
            self._record(first, arguments, start, _processor_seconds() - processor, status, **stopped)
            if status not in (expected, 0):
                raise DemoFailed(f"stage {first} exited with status {status}, not {expected}:\n{self._tail(first)}")
        self.run(name, arguments)

    def _is_complete(self, name: str, arguments: Sequence[object]) -> bool:
        wanted = command_line(arguments)
        for record in self.records:
            if record["name"] != name or (record["status"] != 0 and "interrupted_by" not in record):
                continue
            if record["command"] != wanted:
                raise DemoFailed(
                    f"stage {name}: {self._workdir} has what another command made:\n  {record['command']}\n"
                    f"where this demo runs\n  {wanted}\nRemove the folder, or use another --workdir."
                )
            return True
        return False

    def _announce(self, name: str, arguments: Sequence[object]) -> None:
        shows, seconds = self._about.get(name.removesuffix("_interrupted"), ("", 0))
        if shows:
            print(f"[{name}] {shows} (all of it about {seconds} s on two idle cores)", flush=True)
        print(f"[{name}] {command_line(arguments)}", flush=True)

    def _start(self, name: str, arguments: Sequence[object]) -> subprocess.Popen:
        environment = {
            **os.environ,
            **quick_to_compile(os.environ),
            "JAX_COMPILATION_CACHE_DIR": str((self._workdir / CACHE).absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "PYTHONUNBUFFERED": "1",
            # Keeps glibc from returning every step's memory to the system: saves a tenth of the step time.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
        }
        command = [sys.executable, "-m", "jvgen.cli", *(str(argument) for argument in arguments)]
        with (self._logs / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _record(
        self, name: str, arguments: Sequence[object], start: float, processor: float, status: int, **more: object
    ) -> None:
        seconds = time.perf_counter() - start
        record = {
            "name": name, "command": command_line(arguments), "began": time.time() - seconds, "seconds": seconds,
            "processor_seconds": processor, "status": status,
        }  # fmt: skip
        with self._lock:
            self.records.append(record | more)
            self._path.write_text(json.dumps(self.records, indent=1))
        print(f"[{name}] {seconds:.1f} s", flush=True)

    def _tail(self, name: str) -> str:
        return "\n".join((self._logs / f"{name}.log").read_text(errors="replace").splitlines()[-25:])


def quick_to_compile(environment: Mapping[str, str]) -> dict[str, str]:
    """`XLA_FLAGS` for CPUs: LLVM's first level compiles a sixth to a third sooner, and small networks run as fast.

    Args:
      environment: of this process; flags that already name a level are kept.
    """
    flags = environment.get("XLA_FLAGS", "")
    if environment.get("JAX_PLATFORMS") != "cpu" or "xla_backend_optimization_level" in flags:
        return {}
    return {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=1".strip()}


def check_configs(*files: Path) -> None:
    """Raise ValueError for a config file that is not there."""
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; run the demo in a checkout, or name its folder of configs with --configs."
            )


def subtitle(made: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """The line below a report's title: what was made, on what and in how long."""
    minutes = seconds_by_the_clock(parts) / 60
    return f"{made} on {os.cpu_count()} CPU cores in {minutes:.1f} minutes. jvgen {__version__}, jax {jax.__version__}."


def seconds_by_the_clock(parts: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in which at least one stage ran: those side by side count once."""
    seconds = until = 0.0
    # Records of version 0.2.0 and earlier do not say when a stage began; its stages ran one by one.
    for part in sorted(parts, key=lambda part: part.get("began", 0.0)):
        began = part.get("began", until)
        end = began + part["seconds"]
        seconds += max(0.0, end - max(began, until))
        until = max(until, end)
    return seconds


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What a run logged, one row per step that did."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def add_stages(report: Report, parts: Sequence[Mapping[str, Any]]) -> None:
    """The report's last section: seconds of all stages, and their commands."""
    report.section("Commands")
    report.table(
        [[part["name"], round(part["seconds"], 1), round(part.get("processor_seconds", 0.0), 1)] for part in parts],
        ["part", "seconds", "of processor time"],
    )
    report.code(*[part["command"] for part in parts if "interrupted_by" not in part])


def command_line(arguments: Sequence[object]) -> str:
    """The command as a user types it."""
    return "jvgen " + shlex.join(str(argument) for argument in arguments)


def _processor_seconds() -> float:
    """Processor time of all stages so far that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _checkpoints(run: Path) -> set[Path]:
    folder = run / "checkpoints"
    return {path for path in folder.iterdir() if path.name.isdigit()} if folder.is_dir() else set()
