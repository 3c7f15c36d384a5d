"""What ends one process ends all of them in seconds, with a code of the table, and the run resumes bit-equal."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import rows_of  # noqa: E402

from jvgen import exit_codes  # noqa: E402
from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from tests import quick_xla

SCRIPT = Path(__file__).parents[1] / "toys.py"
STEPS, EVERY = 60, 8
SETTINGS = (f"training.steps={STEPS}", f"checkpoint.every={EVERY}")

pytestmark = pytest.mark.slow


class Run:
    """Processes of one run, their logs, and when they ended.

    Attributes:
      began: when they were started, on the clock of `time.monotonic`.
    """

    def __init__(self, folder: Path, environment: dict[str, str], count: int, arguments: list[tuple[str, ...]]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.began = folder, time.monotonic()
        self._logs = [folder.with_name(f"{folder.name}.{time.time_ns()}.{number}.log") for number in range(count)]
        self.processes = []
        for number, log in enumerate(self._logs):
            command = [sys.executable, SCRIPT, folder, "--processes", str(count), "--port", str(port)]
            command += ["--process", str(number), *arguments[number]]
            with log.open("w") as file:
                started = subprocess.Popen(
                    command, env=environment | {"XLA_FLAGS": quick_xla.flags(2)}, stdout=file, stderr=file
                )
            self.processes.append(started)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.outputs()
            assert time.monotonic() - self.began < 200, self.outputs()
            time.sleep(0.01)

    def wait_for_row(self, count: int) -> None:
        self.wait_for(lambda: len(read_rows(self.folder / "metrics.jsonl")) >= count)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self._logs[0].read_text())

    def ends(self, within: float) -> tuple[list[int], list[float]]:
        """Exit codes, and seconds from now until each process had ended."""
        now, ended = time.monotonic(), {}
        while len(ended) < len(self.processes):
            for number, process in enumerate(self.processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.monotonic() - now
            assert time.monotonic() - now < within, self.outputs()
            time.sleep(0.01)
        return [p.returncode for p in self.processes], [round(ended[n], 1) for n in range(len(ended))]

    def outputs(self) -> list[str]:
        return [log.read_text() for log in self._logs]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("compiled"))
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JVGEN_RESTART_CODE": "42",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


@pytest.fixture(scope="module")
def start(environment) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(folder: Path, count: int, *settings: str, delay: float = 0.03, **only: tuple[str, ...]) -> Run:
        """`only`: more arguments of one process, by "process_N"."""
        shared = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
        arguments = [("--delay", str(delay), *shared, *only.get(f"process_{n}", ())) for n in range(count)]
        runs.append(Run(folder, environment, count, arguments))
        return runs[-1]

    yield begin
    for run in runs:
        for process in run.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> dict[int, list]:
    """Rows of a run that nothing happened to, by number of processes."""
    rows = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp("whole") / str(count)
        assert start(folder, count, delay=0.0).ends(200)[0] == [0] * count
        rows[count] = rows_of(folder)
    return rows


def resumes(start, folder: Path, count: int, uninterrupted) -> None:
    """Run the same command again to the end: its rows are those of the run that nothing happened to, bit by bit."""
    run = start(folder, count, delay=0.0)
    assert run.ends(200)[0] == [0] * count, run.outputs()
    assert rows_of(folder) == uninterrupted[count]
    assert not (folder / "lock.json").exists()


def report(what: str, codes: list[int], seconds: list[float]) -> None:
    print(f"\nMEASURED {what}: codes {codes}, seconds {seconds}")


@pytest.mark.parametrize(("error", "code"), [("bug", exit_codes.ERROR), ("passing", 42), ("full", exit_codes.UNSAVED)])
def test_an_exception_in_one_process(start, tmp_path, uninterrupted, error, code):
    run = start(tmp_path / "run", 2, process_1=("--fail", error, "20"))
    run.wait_for_row(19)
    codes, seconds = run.ends(60)
    report(f"exception ({error}) in process 1", codes, seconds)
    assert codes == [code, code], run.outputs()
    assert max(seconds) < 15
    assert "Traceback" in (tmp_path / "run" / "errors" / "process_1.txt").read_text()
    assert "because process 1 failed" in run.outputs()[0]
    if error == "passing":
        resumes(start, tmp_path / "run", 2, uninterrupted)


def test_a_process_that_hangs(start, tmp_path, uninterrupted):
    """Its heartbeats may go on: the watchdogs of the others end the run, and it ends when it runs again."""
    run = start(tmp_path / "run", 2, "training.hang_seconds=20")
    run.wait_for_row(12)
    stopped, other = run.processes[1], run.processes[0]
    stopped.send_signal(signal.SIGSTOP)
    sent = time.monotonic()
    assert other.wait(60) == 42, run.outputs()
    waited = time.monotonic() - sent
    stopped.send_signal(signal.SIGCONT)
    codes, seconds = run.ends(30)
    report(
        f"process 1 hangs: process 0 ended after {waited:.1f} s of a limit of 20; process 1 when it went on",
        codes,
        seconds,
    )
    assert waited > 19 and codes[1] in (42, -signal.SIGABRT)
    assert (tmp_path / "run" / "stacks_0.txt").read_text()
    resumes(start, tmp_path / "run", 2, uninterrupted)


def test_an_evaluation_that_fails_on_every_process_loses_no_step(start, tmp_path):
    both = {f"process_{number}": ("--fail", "evaluation", "0") for number in (0, 1)}
    run = start(tmp_path / "run", 2, "training.evaluate_every=12", **both)
    codes, seconds = run.ends(200)
    report("an evaluation fails on both processes, times from the start", codes, seconds)
    assert codes == [exit_codes.ERROR] * 2, run.outputs()
    # Between two checkpoints, which are eight steps apart.
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process(start, tmp_path, uninterrupted, killed):
    run = start(tmp_path / "run", 2)
    run.wait_for_row(20)
    run.processes[killed].kill()
    codes, seconds = run.ends(150)
    report(f"SIGKILL of process {killed}", codes, seconds)
    assert codes[killed] == -9
    # With gloo a lost process is an error of the next collective; on TPUs JAX aborts after its heartbeat timeout.
    assert codes[1 - killed] in (42, -6), run.outputs()
    resumes(start, tmp_path / "run", 2, uninterrupted)


@pytest.mark.parametrize("later", [0.0, 1.0])
def test_sigterm_while_the_command_imports(environment, tmp_path, later):
    config = Path(__file__).parents[2] / "configs" / "demo_image_vae.py"
    command = [sys.executable, "-m", "jvgen.cli.main", "train", config, "--workdir", tmp_path / "run"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        began = time.monotonic()
        while not catches_sigterm(process.pid):
            assert time.monotonic() - began < 20
            time.sleep(0.005)
        installed = time.monotonic() - began
        time.sleep(later)
        now = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[1]
        seconds = time.monotonic() - now
    report(f"SIGTERM {installed + later:.2f} s after the start of the command", [process.returncode], [seconds])
    assert process.returncode == 42 and "SIGTERM before the first step: nothing to save" in output and seconds < 5
    assert not (tmp_path / "run").exists()


def catches_sigterm(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("phase", ["start", "step", "evaluation"])
def test_sigterm(start, tmp_path, uninterrupted, phase, count):
    folder = tmp_path / "run"
    settings = ("training.evaluate_every=8", "training.evaluation_batches=400") if phase == "evaluation" else ()
    run = start(folder, count, *settings)
    if phase == "start":
        run.wait_for_text("starting from step 0")
    elif phase == "step":
        run.wait_for_row(20)
    else:
        run.wait_for(lambda: (folder / "evaluation_failures.json").exists())
        time.sleep(0.5)
    run.processes[-1].send_signal(signal.SIGTERM)
    codes, seconds = run.ends(60)
    report(f"SIGTERM in {phase}, {count} process(es)", codes, seconds)
    assert codes == [42] * count, run.outputs()
    assert max(seconds) < 15
    saved = [int(p.name) for p in (folder / "checkpoints").glob("*")] if (folder / "checkpoints").exists() else []
    rows = read_rows(folder / "metrics.jsonl")
    if phase == "start":
        assert "nothing to save" in run.outputs()[-1] and not rows
    else:
        assert max(saved) == rows[-1]["step"] + 1 >= 8
    if phase == "evaluation":
        assert max(saved) == 8 and not (folder / "evaluation.jsonl").read_text()
    if phase in ("step", "start"):
        resumes(start, folder, count, uninterrupted)


def test_processes_with_different_configs(start, tmp_path):
    run = start(tmp_path / "run", 2, process_1=("--set", "optimizer.learning_rate=0.5"))
    codes, seconds = run.ends(150)
    report("different configs", codes, seconds)
    assert codes == [2, 2], run.outputs()
    for output in run.outputs():
        assert "config (digest): process 1: " in output and "seed" not in output.split("started alike")[1]
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")


def test_two_starts_in_one_run_directory(start, tmp_path, uninterrupted):
    first = start(tmp_path / "run", 1, delay=0.3)
    first.wait_for_row(3)
    second = start(tmp_path / "run", 1)
    codes, seconds = second.ends(60)
    report("second start in a run directory", codes, seconds)
    assert codes == [2] and f"is in use by process {first.processes[0].pid} on " in second.outputs()[0]
    # The lock of a start that was killed is taken over.
    first.processes[0].kill()
    first.ends(10)
    third = start(tmp_path / "run", 1, delay=0.0)
    assert third.ends(100)[0] == [0] and "taking over the run directory" in third.outputs()[0]
    assert rows_of(tmp_path / "run") == uninterrupted[1]


def test_a_start_that_lost_its_lock_stops_without_writing(start, tmp_path):
    run = start(tmp_path / "run", 1)
    run.wait_for_row(3)
    lock = tmp_path / "run" / "lock.json"
    lock.write_text(json.dumps({"token": "other", "host": "elsewhere", "pid": 7, "started": "now"}))
    codes, seconds = run.ends(60)
    report("lost lock", codes, seconds)
    assert codes == [2] and "held by this run but by process 7 on elsewhere" in run.outputs()[0]
    assert json.loads(lock.read_text())["token"] == "other"
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert saved in ([], [8]), "no save after the token had changed"


def test_a_checkpoint_that_one_process_cannot_read_is_moved_away(start, tmp_path, uninterrupted):
    """Each process reads its own shards: the other one must not wait for it in a barrier of Orbax."""
    folder = tmp_path / "run"
    assert start(folder, 2, delay=0.0).ends(200)[0] == [0, 0]
    run = start(folder, 2, delay=0.0, process_1=("--fail", "read", "0"))
    codes, seconds = run.ends(100)
    report("a checkpoint that process 1 cannot read, times from the start", codes, seconds)
    assert codes == [0, 0], run.outputs()
    assert (folder / "corrupt" / str(STEPS)).is_dir() and (folder / "checkpoints" / str(STEPS)).is_dir()
    assert "is corrupt: process 1: its arrays cannot be read (ValueError: damaged)" in run.outputs()[0]
    assert rows_of(folder) == uninterrupted[2]


def test_a_save_that_one_process_cannot_write(start, tmp_path):
    """The run goes on, says why, and saves the next time."""
    folder = tmp_path / "run"
    run = start(folder, 2)
    run.wait_for_row(17)
    # Its logs are within the limit, its part of a checkpoint is not.
    pid = run.processes[1].pid
    limit = resource.prlimit(pid, resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    run.wait_for(lambda: "could not be written" in run.outputs()[0])
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    codes, seconds = run.ends(100)
    report("a save that process 1 cannot write", codes, seconds)
    assert codes == [0, 0], run.outputs()
    [told] = [line for line in run.outputs()[0].splitlines() if "could not be written" in line]
    assert "The run continues" in told and "process 1 could not" not in told, told
    assert (folder / "checkpoints" / str(STEPS)).is_dir()


def test_sigterm_between_joining_and_training_ends_both(start, tmp_path):
    """JAX installs a handler of SIGTERM of its own when it joins the processes."""
    run = start(tmp_path / "run", 2)
    run.wait_for_text("process 0 of 2")
    run.processes[0].send_signal(signal.SIGTERM)
    codes, seconds = run.ends(60)
    report("SIGTERM right after joining", codes, seconds)
    assert codes == [42, 42], run.outputs()
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")
