"""A real run of seconds, through the real command: its config, its process, and what two runs of it have in common."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.training.telemetry.json_lines import read_rows

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo_image_vae.py"
STEPS, SAVE_EVERY = 120, 7
# Of a run of two processes, which spends its time on talking.
PAIR_STEPS = 36


def assignments(data: Path, steps: int = STEPS) -> list[str]:
    """The overrides that make the demo's image VAE a run of seconds, with many saves."""
    return [
        f"data.sources.0.path={data}", f"data.evaluation_sources.0.path={data}",
        "data.buckets.0.height=16", "data.buckets.0.width=16", "data.buckets.0.batch_size=4",
        "task.network.block_channels=[8, 8]", "task.network.groups=4",
        f"training.steps={steps}", "training.visualize_every=0", "training.tensorboard=false", "training.log_every=50",
        f"checkpoint.every={SAVE_EVERY}",
    ]  # fmt: skip


def build_data(folder: Path, environment: dict[str, str]) -> None:
    """Render 40 training scenes and 8 for validation."""
    sizes = ["--train", "40", "--validation", "8", "--set", "height=16", "--set", "width=16", "--set", "frames=5"]
    subprocess.run(command("data", "build", "scenes", "--out", folder, *sizes), env=environment, check=True)


def environment(compiled: Path, devices: int = 1) -> dict[str, str]:
    """Variables of a run's process: devices of the host, and programs that are compiled once for all trials."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "jvgen.cli", *map(str, arguments)]


class Run:
    """One or more processes that train in one run directory; their output goes to files beside it."""

    def __init__(self, folder: Path, data: Path, compiled: Path, processes: int = 1, devices: int = 1):
        self.folder = folder
        self.steps = STEPS if processes == 1 else PAIR_STEPS
        sets = [part for assignment in assignments(data, self.steps) for part in ("--set", assignment)]
        train = command("train", CONFIG, "--workdir", folder, *sets)
        port = free_port()
        self.outputs = [folder.with_name(f"{folder.name}_{number}.txt") for number in range(processes)]
        self.processes = []
        for number, output in enumerate(self.outputs):
            place = ["--coordinator", f"127.0.0.1:{port}", "--processes", processes, "--process-id", number]
            arguments = train + list(map(str, place if processes > 1 else []))
            self.processes.append(
                subprocess.Popen(
                    arguments, env=environment(compiled, devices), stdout=output.open("w"), stderr=subprocess.STDOUT
                )
            )
        self.started = time.monotonic()

    def alive(self) -> bool:
        """Whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, seconds: float = 400.0) -> list[int]:
        """Exit codes of all processes; kills what is left after the limit, which gives its code -9."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes]

    def wait_until(self, ready: Callable[[], bool], seconds: float = 200.0) -> bool:
        """Wait for a moment of the run; False if a process ended or time ran out before it came."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.alive() or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def send(self, number: int, process: int = 0) -> None:
        self.processes[process].send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)

    def text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.outputs if path.exists())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def last_step(folder: Path) -> int:
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else -1


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def saved_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, read by Orbax alone."""
    import orbax.checkpoint as ocp

    path = folder / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        names = reader.metadata(path).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return dict(reader.restore(path, restore_args=as_numpy))
