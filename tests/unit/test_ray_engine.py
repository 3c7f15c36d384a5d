"""Builds on a Ray cluster of several nodes on this machine: the bytes of a local build, also when workers are lost."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.builders.build_loop import BuildJob, Execution, build_dataset
from jvgen.data.store.records import Record
from jvgen.data.video_files import encode_image
from tests.unit.test_build_parts import contents
from tests.unit.test_interrupted_readers import READERS, UNITS, recordings  # noqa: F401
from tests.unit.test_interrupted_readers import built as read

ray = pytest.importorskip("ray", reason="needs jvgen[ray]")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
COUNT = 48


def slow_record(payload: tuple[int, str]) -> Record:
    """A record that takes a while; notes which process made it."""
    number, log = payload
    Path(log, f"{os.getpid()}").touch()
    time.sleep(0.1)
    return Record(
        id=f"r{number:03d}", kind="image", height=8, width=8,
        clips=(encode_image(np.full((8, 8, 3), number, np.uint8)),),
    )  # fmt: skip


def fatal_record(payload: tuple[int, str]) -> Record:
    if payload[0] == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return slow_record(payload)


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made, nodes
    ray.shutdown()
    made.shutdown()


def built(out: Path, log: Path, make=slow_record, **execution):
    log.mkdir(exist_ok=True)
    jobs = [BuildJob("train", f"job {number}", (number, str(log))) for number in range(COUNT)]
    return build_dataset(
        out, jobs, make, description="slow", metadata={"origin": "test"}, error_budget=0.1,
        execution=Execution(jobs_per_unit=4, **execution),
    )  # fmt: skip


def test_a_lost_worker_and_a_lost_node_change_nothing(cluster, tmp_path: Path) -> None:
    made, nodes = cluster
    built(tmp_path / "here" / "set", tmp_path / "log")
    workers = tmp_path / "workers"
    workers.mkdir()
    lost: list[str] = []

    def lose() -> None:
        building = tmp_path / "there" / ".set.building"
        while len(list(building.glob("unit-*.json"))) < 2:
            time.sleep(0.02)
        victim = next(path.name for path in workers.iterdir() if Path(f"/proc/{path.name}").exists())
        os.kill(int(victim), signal.SIGKILL)
        lost.append(victim)
        made.remove_node(nodes[0], allow_graceful=False)
        lost.append("node")

    thread = threading.Thread(target=lose)
    thread.start()
    summary = built(tmp_path / "there" / "set", workers, engine="ray", address=made.address)
    thread.join()
    assert len(lost) == 2 and summary.records == COUNT and not summary.rejected
    assert len(list(workers.iterdir())) >= 3
    assert contents(tmp_path / "there" / "set") == contents(tmp_path / "here" / "set")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["set"]


def test_a_file_that_ends_every_worker_is_refused_by_name(cluster, tmp_path: Path) -> None:
    made, _ = cluster
    summary = built(tmp_path / "set", tmp_path / "log", make=fatal_record, engine="ray", address=made.address)
    assert summary.records == COUNT - 1
    [refused] = summary.rejected
    assert refused.name == "job 13" and "ended the process that read it" in refused.reason


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_tables_and_shards_lose_nothing_with_a_machine(reader, recordings, tmp_path, cluster):  # noqa: F811
    made, nodes = cluster
    read(reader, recordings, tmp_path / "here" / "set")
    lost = []

    def lose() -> None:
        building = tmp_path / "there" / ".set.building"
        while not list(building.glob("unit-*.json")):
            time.sleep(0.01)
        made.remove_node(nodes[0], allow_graceful=False)
        lost.append("node")

    thread = threading.Thread(target=lose)
    thread.start()
    summary = read(reader, recordings, tmp_path / "there" / "set", engine="ray", address=made.address)
    thread.join()
    assert lost and summary.records == 2 * UNITS and not summary.rejected
    assert contents(tmp_path / "there" / "set") == contents(tmp_path / "here" / "set")
