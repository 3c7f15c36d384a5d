"""Which rows each process reads: for every shipped config on its pods, and in two processes that share examples."""

import functools
import os
import re
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jvgen import config
from jvgen.config import ConfigError
from jvgen.parallel import axes
from jvgen.parallel.mesh import MESH_AXES, make_mesh
from jvgen.parallel.rows import global_array, rows_by_process, shard_of
from jvgen.parallel.rules import Sharding
from jvgen.preflight import topology
from jvgen.training.loop import train
from jvgen.training.telemetry.json_lines import read_rows

sys.path.insert(0, str(Path(__file__).parent))
import clips  # noqa: E402

from tests import quick_xla

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = {choice: path for path in sorted(CONFIGS.glob("*.py")) for choice in config.variants(path)}
BIG_PODS = ("v5p:8x8x8", "tpu7x:4x4x4")
needs_compiler = pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")

pod_devices = functools.cache(lambda name: topology.describe(name).devices)


@needs_compiler
@pytest.mark.parametrize("choice", VARIANTS, ids=[Path(choice).name for choice in VARIANTS])
def test_every_process_reads_the_rows_that_its_chips_hold(choice):
    experiment = config.load(choice)
    named = re.findall(r"\b(?:v\d\w?|tpu7x):\d+(?:x\d+)+", VARIANTS[choice].read_text())
    resolved = 0
    for name in dict.fromkeys((*named, *BIG_PODS)):
        try:
            mesh = make_mesh(experiment.mesh, pod_devices(name))
        except (ConfigError, ValueError):
            continue
        resolved += 1
        sharding = Sharding(mesh, experiment.sharding)
        groups = mesh.shape["data"] * mesh.shape["fsdp"]
        for bucket in experiment.data.buckets:
            # The batch of the config where it divides; else, as `--set` would have it, two examples for each group.
            size = bucket.batch_size if bucket.batch_size % groups == 0 else 2 * groups
            needed = defaultdict(set)
            for group, devices in enumerate(mesh.devices.reshape(groups, -1)):
                for device in devices:
                    needed[device.process_index].update(range(group * size // groups, (group + 1) * size // groups))
            found = rows_by_process(sharding.activation((axes.BATCH,), (size,)), size)
            assert {process: set(rows.tolist()) for process, rows in found.items()} == needed, (name, bucket.name)
            assert set().union(*needed.values()) == set(range(size))
            assert all(np.all(np.diff(rows) > 0) for rows in found.values())
    assert resolved or "demo" in choice, f"{choice} fits no pod"


@needs_compiler
def test_the_flagship_config_shares_examples_between_processes_only_on_a_cube():
    """`seq 4` is a ring around an axis of v5p's torus, which crosses two hosts of 2 x 2 chips, and one host of v5e."""
    experiment = config.load(CONFIGS / "cogvideox_2b.py")
    for name, processes, rows_per_process in (("v5e:16x16", 64, 1), ("v5p:4x4x8", 32, 2)):
        sharding = Sharding(make_mesh(experiment.mesh, pod_devices(name)), experiment.sharding)
        size = len(pod_devices(name)) // 4
        found = rows_by_process(sharding.activation((axes.BATCH,), (size,)), size)
        assert len(found) == processes and {len(rows) for rows in found.values()} == {rows_per_process}


def test_a_batch_that_does_not_divide_is_read_by_every_process():
    sharding = Sharding(make_mesh(clips.mesh.MeshConfig()))
    rows = rows_by_process(sharding.activation((axes.BATCH,), (12,)), 12)
    assert list(rows) == [0] and rows[0].tolist() == list(range(12))


def test_a_global_array_in_any_order_of_devices():
    devices = np.array(jax.devices())[np.random.default_rng(0).permutation(8)].reshape(1, 4, 2, 1)
    placed = NamedSharding(jax.sharding.Mesh(devices, MESH_AXES), PartitionSpec(("data", "fsdp")))
    whole = np.arange(8 * 3).reshape(8, 3)
    made = global_array(whole, np.arange(8), whole.shape, placed)
    assert np.array_equal(made, whole) and made.sharding == placed
    with pytest.raises(AssertionError, match="for 8 rows"):
        global_array(whole[:4], np.arange(8), whole.shape, placed)


def test_shards_of_rows_with_a_gap():
    whole = np.arange(8 * 3).reshape(8, 3)
    rows = np.array([1, 4, 5, 6])
    for index in ((slice(4, 6), slice(None)), (slice(1, 2), slice(0, 2)), (slice(6, 7, None), slice(None))):
        assert np.array_equal(shard_of(whole[rows], rows, 8, index), whole[index])
    with pytest.raises(AssertionError, match="rows 6:8 not read"):
        shard_of(whole[rows], rows, 8, (slice(6, None), slice(None)))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, quick_compilations) -> tuple[Path, Path]:
    """Clips, and a run of one process on them."""
    data = clips.build(tmp_path_factory.mktemp("clips") / "data")
    run = tmp_path_factory.mktemp("runs") / "one"
    assert train(clips.experiment(data, {"fsdp": 4, "seq": 2}), run) == 0
    return data, run


@pytest.mark.parametrize("layout", ["seq", pytest.param("gap", marks=pytest.mark.slow)])
def test_two_processes_in_an_order_of_a_torus_train_as_one(one_process, tmp_path, layout):
    """The real loader reads what each holds; losses, evaluation and records are those of one process."""
    data, one = one_process
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, clips.__file__, data, tmp_path / "two", layout, "--port", str(port)]
    pair = [
        subprocess.Popen(
            [*command, "--process", str(number)], env=os.environ | {"XLA_FLAGS": quick_xla.flags(2)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=200)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], outputs
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        alone, both = (read_rows(run / file) for run in (one, tmp_path / "two"))
        assert [row["step"] for row in alone] == [row["step"] for row in both] and alone
        for name in ("loss", "input", "high"):
            # "input" is a mean of pixels in [-1, 1], which cancel: it is rounded at their scale, not at its own.
            np.testing.assert_allclose(
                [row[name] for row in both if name in row], [row[name] for row in alone if name in row],
                rtol=1e-5, atol=1e-7 if name == "input" else 0,
            )  # fmt: skip
        assert [row.get("records") for row in alone] == [row.get("records") for row in both]
