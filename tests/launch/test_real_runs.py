"""Launch files start real training: several processes on this machine, and a job under a real Slurm."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from commands import FOLDER, launch_file  # noqa: E402

from jvgen.training.telemetry.json_lines import read_rows  # noqa: E402
from tests.faults import tiny_run  # noqa: E402

pytestmark = pytest.mark.slow
STEPS = 24
# Sums of gradients are taken in another order on another mesh.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, a folder of compiled programs, `jvgen` on the path, and the run of one process, `alone`."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "bin").mkdir()
    command = folder / "bin" / "jvgen"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jvgen.cli "$@"\n')
    command.chmod(0o755)
    tiny_run.build_data(folder / "scenes", environment(folder))
    arguments = ["train", tiny_run.CONFIG, "--workdir", folder / "alone", *settings(folder)]
    subprocess.run(tiny_run.command(*arguments), env=environment(folder), check=True)
    assert len(losses(folder / "alone")) == STEPS
    return folder


def environment(folder: Path) -> dict[str, str]:
    plain = tiny_run.environment(folder / "compiled") | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return plain | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def settings(folder: Path) -> list[str]:
    # Eight examples: one per device on four processes of two.
    more = [f"training.steps={STEPS}", "data.buckets.0.batch_size=8", "checkpoint.every=4"]
    return [part for setting in [*tiny_run.assignments(folder / "scenes"), *more] for part in ("--set", setting)]


def losses(run: Path) -> list[float]:
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def write(place: Path, target: str, topology: str, run: Path, name: str) -> Path:
    arguments = [target, tiny_run.CONFIG, *settings(place), "--topology", topology, "--workdir", run]
    file = place / name
    file.write_text(launch_file(shlex.join(map(str, arguments))))
    return file


def start(script: Path) -> subprocess.Popen:
    with script.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            ["bash", script], cwd=script.parent, env=environment(script.parent), stdout=output, stderr=subprocess.STDOUT
        )


def output(script: Path) -> str:
    logs = [path.read_text()[-3000:] for path in script.parent.glob("*/processes/*.log")]
    return "\n".join([script.with_suffix(".txt").read_text(), *logs])


def wait_until(ready: Callable[[], bool], script: subprocess.Popen, file: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert script.poll() is None and time.monotonic() < deadline, output(file)
        time.sleep(0.02)


def test_local_processes_are_killed_stopped_and_continue_with_another_count(place):
    """Losses of one process: 2 processes, one killed (the script restarts both), stopped, then 4 processes."""
    run = place / "run"
    two = write(place, "local", "cpu:2x2", run, "two.sh")
    script = start(two)
    wait_until(lambda: tiny_run.last_step(run) >= 5, script, two)
    second = int(two.with_suffix(".txt").read_text().split("2 processes ")[1].split(",")[0].split()[1])
    os.kill(second, signal.SIGKILL)
    killed_at = tiny_run.last_step(run)
    wait_until(lambda: "attempt 1" in two.with_suffix(".txt").read_text(), script, two)
    wait_until(lambda: tiny_run.last_step(run) >= killed_at + 4, script, two)
    script.send_signal(signal.SIGTERM)
    assert script.wait(300) == 75, output(two)
    text = two.with_suffix(".txt").read_text()
    assert text.count("attempt ") == 2 and "exit codes 75 75" in text, text

    four = write(place, "local", "cpu:4x2", run, "four.sh")
    script = start(four)
    assert script.wait(400) == 0, output(four)
    assert "exit codes 0 0 0 0" in four.with_suffix(".txt").read_text()
    np.testing.assert_allclose(losses(run), losses(place / "alone"), rtol=TOLERANCE)


@pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm of its own needs root, for mounts")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_slurm_job_is_told_to_stop_requeues_itself_and_finishes(tmp_path, place):
    """Two tasks on one node of Debian's Slurm; `shellcheck` and `sbatch --test-only` read the files before."""
    folder = tmp_path / "node"
    folder.mkdir()
    run = folder / "run"
    (folder / "job").write_text(write(place, "slurm", "cpu:1x2", run, "job").read_text())
    for script in FOLDER.glob("*.s[hb]*"):
        shutil.copy(script, folder / f"{script.name}.shell")
    here = Path(__file__).parent
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "bash", here / "slurm_node.sh", folder,
         "bash", here / "slurm_job.sh"],
        env=environment(place), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(f"Slurm cannot be installed or started here: {done.stderr[-500:]}")
    logs = "\n".join(path.read_text()[-4000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "Restarts=1" in done.stdout and "JobState=COMPLETED" in done.stdout, done.stdout
    codes = {
        str(path.relative_to(next(folder.glob("*.exit_codes")))): path.read_text().strip()
        for path in folder.glob("*.exit_codes/*/*")
    }
    assert codes == {"0/0": "75", "0/1": "75", "1/0": "0", "1/1": "0"}, logs
    np.testing.assert_allclose(losses(run), losses(place / "alone"), rtol=TOLERANCE)
