"""Two processes with one mesh: SIGTERM to either makes both save the same step, from which one process can resume."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from tests import quick_xla

SCRIPT = Path(__file__).parents[1] / "toys.py"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(
    folder: Path, environment: dict[str, str], processes: int, devices: int, steps: int
) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, SCRIPT, folder, "--delay", "0.05", "--set", f"training.steps={steps}", 
        "--set", "checkpoint.every=8", "--processes", str(processes), "--port", str(port),
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [*command, "--process", str(number)],
            env=environment | {"XLA_FLAGS": quick_xla.flags(devices)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(tmp_path, environment):
    folder = tmp_path / "run"
    pair = start(folder, environment, 2, 2, 400)
    deadline = time.monotonic() + 150
    while len(read_rows(folder / "metrics.jsonl")) < 12:
        assert all(process.poll() is None for process in pair) and time.monotonic() < deadline, finish(pair)
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    results = finish(pair)
    assert [status for status, _ in results] == [75, 75], results
    rows = read_rows(folder / "metrics.jsonl")
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert steps[-1] == rows[-1]["step"] + 1 and [row["step"] for row in rows] == list(range(len(rows)))

    total = steps[-1] + 6
    assert [status for status, _ in finish(start(folder, environment, 1, 1, total))] == [0]
    assert [status for status, _ in finish(start(tmp_path / "alone", environment, 1, 1, total))] == [0]
    resumed, alone = (read_rows(where / "metrics.jsonl") for where in (folder, tmp_path / "alone"))
    assert len(resumed) == len(alone) == total
    np.testing.assert_allclose([row["loss"] for row in resumed], [row["loss"] for row in alone], rtol=1e-3)
    np.testing.assert_allclose([row["input"] for row in resumed], [row["input"] for row in alone], atol=1e-6)
