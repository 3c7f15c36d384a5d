"""A run in its own process, killed at random moments and restarted, against an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import rows_of  # noqa: E402

from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from tests import quick_xla

SCRIPT = Path(__file__).parents[1] / "toys.py"
STEPS = 60


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One host device, as users have it, and compiled programs shared by all processes."""
    return os.environ | {
        "XLA_FLAGS": quick_xla.flags(),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    settings = [f"training.steps={STEPS}", "checkpoint.every=4"]
    command = [sys.executable, "-W", "error", SCRIPT, folder, "--delay", "0.02"]
    return subprocess.Popen(
        [*command, *(part for s in settings for part in ("--set", s))],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def send_when(process: subprocess.Popen, ready: Callable[[], bool], number: int) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.001)
    process.send_signal(number)


def last_step(folder: Path) -> int:
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else -1


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, output = finish(start(folder, environment))
    assert status == 0, output
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(STEPS))
    return rows


def test_a_run_killed_anywhere_resumes_bit_equal(uninterrupted, tmp_path, environment):
    """SIGKILL at random steps and in the middle of saves: losses, gradient norms and batches are unchanged."""
    random.seed(0)
    folder = tmp_path / "run"
    reached = random.randint(6, 14)
    process = start(folder, environment)
    send_when(process, lambda: last_step(folder) >= reached, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL

    beyond = last_step(folder) + random.randint(3, 10)
    process = start(folder, environment)
    send_when(process, lambda: last_step(folder) >= beyond and is_saving(folder), signal.SIGKILL)
    status, output = finish(process)
    assert status == -signal.SIGKILL and "restored step" in output, output
    torn = sorted(path.name for path in (folder / "checkpoints").glob("*tmp*"))

    status, output = finish(start(folder, environment))
    assert status == 0 and "restored step" in output, output
    assert rows_of(folder) == uninterrupted
    assert not list((folder / "checkpoints").glob("*tmp*")), torn


def test_sigterm_saves_the_step_and_exits_75(uninterrupted, tmp_path, environment):
    folder = tmp_path / "run"
    process = start(folder, environment)
    send_when(process, lambda: last_step(folder) >= 9, signal.SIGTERM)
    status, output = finish(process)
    assert status == 75, output
    stopped = last_step(folder) + 1
    assert f"saved step {stopped} and stopped" in output
    assert (folder / "checkpoints" / str(stopped)).is_dir()
    status, output = finish(start(folder, environment))
    assert status == 0 and f"restored step {stopped} " in output, output
    assert rows_of(folder) == uninterrupted
