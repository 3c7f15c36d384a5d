"""Processes of one run agree, wait for each other by name, and fail together with the codes of the table."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from jvgen import exit_codes
from jvgen.config import ConfigError
from jvgen.parallel import clusters, failing, processes
from tests import quick_xla

WORKER = Path(__file__).parent / "worker.py"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(scenario: str, count: int, folder: Path, started: list[int] | None = None) -> list[tuple[int, str, float]]:
    """(exit code, output, time of the end) of every started process."""
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": quick_xla.flags(), "JVGEN_RESTART_CODE": "75"}
    running = []
    for number in range(count) if started is None else started:
        with (folder / f"{number}.log").open("w") as log:
            command = [sys.executable, WORKER, scenario, str(port), str(count), str(number), str(folder)]
            running.append((number, subprocess.Popen(command, env=environment, stdout=log, stderr=log)))
    ended: dict[int, float] = {}
    end = time.monotonic() + 120
    while len(ended) < len(running) and time.monotonic() < end:
        for number, process in running:
            if number not in ended and process.poll() is not None:
                ended[number] = time.time()
        time.sleep(0.02)
    for _, process in running:
        process.kill()
    return [(process.wait(), (folder / f"{number}.log").read_text(), ended.get(number)) for number, process in running]


def test_three_processes_agree(tmp_path):
    results = run("agreements", 3, tmp_path)
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert "process 1 of 3 (explicit, coordinator 127.0.0.1:" in results[1][1]
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert [(t["count"], t["index"]) for t in told] == [(3, 0), (3, 1), (3, 2)]
    for number, t in enumerate(told):
        assert t["broadcast"] == [{"from": 0, "turn": 0}, {"from": 0, "turn": 1}]
        assert t["combined"] == 6
        assert t["same"] == "none"
        assert "config: process 1: xyz; the others (0, 2): abc" in t["differ"], t["differ"]
        assert "step: process 2: 2; the others (0, 1): 0" in t["differ"] and "seed" not in t["differ"]
        if number != 1:
            assert t["late"] == (
                "LostProcess: save: process 1 of 3 did not arrive within 1 s. Look at the log of the first one."
            )
        assert t["late"].startswith("LostProcess: save")


def test_a_save_that_one_process_cannot_write_ends_on_all_at_once(tmp_path):
    results = run("saves", 3, tmp_path)
    assert [code for code, _, _ in results] == [0, 0, 0], results
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    for number, t in enumerate(told):
        assert t["save 0"][0] == t["save 2"][0] == "none", "the others have taken part"
        problem, seconds = t["save 1"]
        failed = "OSError: no space left on device"
        assert problem == (failed if number == 1 else "FailedElsewhere: process 1 could not write its part")
        assert seconds < 10
        assert t["kept"] == 0, "what the store holds does not grow with the saves"


@pytest.mark.parametrize(
    ("scenario", "code"), [("bug1", exit_codes.ERROR), ("bug0", exit_codes.ERROR), ("mistake1", exit_codes.USER_ERROR)]
)
def test_an_exception_in_one_process_ends_all(tmp_path, scenario, code):
    results = run(scenario, 2, tmp_path)
    assert [result[0] for result in results] == [code, code], results
    failed = int(scenario[-1])
    start = json.loads((tmp_path / f"{failed}.json").read_text())["start"]
    assert results[failed][2] - start < 5 and results[1 - failed][2] - start < 10
    text = "a bug" if scenario.startswith("bug") else "data.path = 3: a path."
    written = (tmp_path / "errors" / f"process_{failed}.txt").read_text()
    assert text in written and "Traceback" in written and f"exit code {code}" in written and "worker.py" in written
    assert not (tmp_path / "errors" / f"process_{1 - failed}.txt").exists()
    assert f"ends with exit code {code}, because process {failed} failed" in results[1 - failed][1]
    shown = results[failed][1]
    assert "Traceback" not in shown and (f"process_{failed}.txt" in shown) == scenario.startswith("bug")


@pytest.mark.parametrize("started", [0, 1])
def test_a_process_without_the_others_ends_with_the_restart_code(tmp_path, started):
    start = time.time()
    [(code, output, end)] = run("alone", 2, tmp_path, [started])
    assert code == 75 and end - start < 20, output
    expected = "not all 2 processes joined at 127.0.0.1:" if started == 0 else "cannot be reached for 4 s ([Errno 111]"
    assert expected in output and "Check failure" not in output


def find(**variables: str) -> clusters.Cluster | None:
    with mock.patch.dict(os.environ, {"JAX_PLATFORMS": "cpu", **variables}, clear=True):
        return clusters.find()


SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[3,7-8]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip


def test_clusters_are_found():
    assert find() is None and find(JVGEN_PROCESSES="1", **SLURM) is None
    assert find(**SLURM) == clusters.Cluster("Slurm", "node3:61441", 16, 9, (1,))
    assert find(**SLURM | {"CUDA_VISIBLE_DEVICES": "4"}).local_device_ids == (0,)
    assert find(**SLURM | {"CUDA_VISIBLE_DEVICES": ""}).local_device_ids is None
    assert find(**SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}).local_device_ids is None
    assert find(**SLURM | {"SLURM_NTASKS": "1"}) is None
    given = {"JVGEN_COORDINATOR": "a:1", "JVGEN_PROCESSES": "4", "JVGEN_PROCESS_ID": "3"}
    assert find(**given, **SLURM) == clusters.Cluster("explicit", "a:1", 4, 3)
    assert find(**given | {"JVGEN_COORDINATOR": "", "JAX_COORDINATOR_ADDRESS": "b:2"}).coordinator == "b:2"
    mpi = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
    found = find(**mpi, OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="0,1")
    assert (found.name, found.processes, found.process_id, found.local_device_ids) == ("Open MPI", 2, 1, (1,))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JVGEN_COORDINATOR": "a:1"}, r"--processes \(JVGEN_PROCESSES\) and --process-id .* missing"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, r"JAX_COORDINATOR_ADDRESS is set.*give --processes .* or unset it"),
        ({"JVGEN_PROCESSES": "two"}, "JVGEN_PROCESSES = 'two': expected a whole number"),
        (
            {"JVGEN_COORDINATOR": "a", "JVGEN_PROCESSES": "2", "JVGEN_PROCESS_ID": "0"},
            "--coordinator 'a': expected HOST:PORT",
        ),
        (
            {"JVGEN_COORDINATOR": "a:99999", "JVGEN_PROCESSES": "2", "JVGEN_PROCESS_ID": "0"},
            "--coordinator 'a:99999': .* ports end at 65535",
        ),
        (
            {"JVGEN_COORDINATOR": "a:1", "JVGEN_PROCESSES": "2", "JVGEN_PROCESS_ID": "2"},
            "--process-id 2: process ids go from 0 to 1",
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"},
            "1 task per node, but a node has 8 GPUs.*--ntasks-per-node=8, or set JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7",
        ),
    ],
)
def test_impossible_numbers_are_refused(variables, message):
    with pytest.raises(ConfigError, match=message):
        find(**variables)


def test_incomplete_multi_slice_variables_are_refused():
    good = {"MEGASCALE_COORDINATOR_ADDRESS": "a:1", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    clusters.check_megascale(good)
    for changed in ({"MEGASCALE_NUM_SLICES": "1"}, {"MEGASCALE_SLICE_ID": ""}):
        with pytest.raises(ConfigError, match="left over from another job"):
            clusters.check_megascale(good | changed)


def test_proxy_variables_are_noticed_unless_excepted():
    env = {"https_proxy": "x", "HTTP_PROXY": "y"}
    assert clusters.proxy_variables(env, "10.0.0.1") == ["HTTP_PROXY", "https_proxy"]
    assert clusters.proxy_variables(env | {"no_proxy": "a, cluster.local"}, "node.cluster.local") == []


def test_srun_is_missing(capsys):
    assert find(**{k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}) is None
    assert "outside srun" in capsys.readouterr().out


def test_a_process_ends_although_what_it_does_before_does_not(monkeypatch):
    left, forever = [], threading.Event()
    monkeypatch.setattr(failing, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(failing.os, "_exit", left.append)
    with failing.before_exit(forever.wait):
        failing.abort(75, "a hang")
    forever.set()
    assert left == [75]


def test_an_error_is_not_lost_where_it_cannot_be_recorded(capsys):
    class Away:
        """A bucket without credentials: the library of the bucket raises an exception of its own."""

        def __truediv__(self, name):
            return self

        def exists(self):
            raise Exception("no credentials")

    with pytest.raises(ConfigError, match="the mistake"), failing.fail_fast(Away()):
        raise ConfigError("the mistake")
    assert "could not be written: no credentials" in capsys.readouterr().err


def test_one_process_agrees_with_itself(tmp_path):
    processes.barrier("a")
    processes.agree({"seed": 1})
    assert processes.broadcast((1, 2), "b") == (1, 2) and processes.combine(3, sum, "c") == 3
    with pytest.raises(OSError, match="disk"), failing.fail_fast(tmp_path):
        raise OSError(28, "disk")
    assert "exit code 74" in (tmp_path / "errors" / "process_0.txt").read_text()
    with pytest.raises(ConfigError), failing.fail_fast(tmp_path / "new"):
        raise ConfigError("a mistake")
    assert not (tmp_path / "new").exists()
