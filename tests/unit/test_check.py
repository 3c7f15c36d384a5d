"""`jvgen check`: one page about a run, with a described pod or the attached devices, and its exit status."""

import dataclasses
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.type_handlers import ArrayHandler

from jvgen import storage
from jvgen.data.store import shards
from jvgen.data.store.index_files import load_index, path_of
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.nn.attention import AttentionKernel
from jvgen.parallel.mesh import MeshConfig, make_mesh, single_device_mesh
from jvgen.preflight import page as pages
from jvgen.preflight import topology
from jvgen.preflight.check import inspect_run, kernels, with_buckets
from jvgen.preflight.page import examine
from jvgen.reinforcement.config import ReinforcementConfig
from jvgen.training.balance import with_batch_sizes
from jvgen.training.config import TrainingConfig
from jvgen.training.experiment import Experiment, load_experiment
from jvgen.training.program import Program

sys.path[:0] = [str(Path(__file__).parents[1] / "processes"), str(Path(__file__).parents[1])]
import clips  # noqa: E402
import tiny_reinforcement  # noqa: E402
import tiny_text_to_video  # noqa: E402

needs_compiler = pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return clips.build(tmp_path_factory.mktemp("clips") / "data")


def rows(page: pages.Page, subject: str) -> list[str]:
    return [row.text for row in page.rows if row.subject == subject]


def problems(page: pages.Page) -> dict[str, str]:
    return {row.subject: row.text for row in page.rows if not row.ok}


@needs_compiler
def test_a_valid_run_on_a_described_pod_is_green(data, tmp_path):
    run = clips.experiment(data, {"fsdp": -1, "tensor": 4})
    page = examine(run, topology_name="v5e:4x4", slices=2, workdir=tmp_path / "run")
    assert page.ok, str(page)
    (mesh,) = rows(page, "mesh")
    assert mesh.startswith(
        "mesh data 1 x fsdp 8 x seq 1 x tensor 4 = 32 devices (TPU v5 lite); WARNING: fsdp crosses 2"
    )
    assert rows(page, "processes") == [
        "8, each of 4 devices (hosts of 4 chips assumed; hosts of 8 have half as many processes)"
    ]
    assert len(rows(page, "reading")) == 2 and "of 8 examples per step" in rows(page, "reading")[0]
    assert "of records from storage" in rows(page, "reading")[0]
    assert "1x4x16x16: 24 records for batches of 8, 1 epochs" in rows(page, "data")
    assert "of 15.75 GiB" in rows(page, "memory")[0]
    assert "below sharding.replicate_below" in rows(page, "replicated")[0]
    assert "2 kept and one more" in rows(page, "checkpoints")[0] and "GiB are free" in rows(page, "checkpoints")[0]
    assert rows(page, "time")[0].startswith("6 steps take about 0 seconds assuming 30% MFU")
    assert str(page).startswith("toy on 2 x v5e:4x4") and str(page).endswith("all green")


def test_every_file_of_weights_that_is_missing_is_named(tmp_path):
    run = load_experiment(Path(__file__).parents[2] / "configs" / "cogvideox_2b_lora.py", [])
    found = inspect_run(run, devices=[]).problems["weights"]
    assert found == [
        f"{field}: weights {folder!r}: no such file or folder; --set {field}=PATH names others."
        for field, folder in (
            ("task.text.weights", "weights/t5_v1_1_xxl"),
            ("task.text.tokenizer", "weights/t5_v1_1_xxl"),
            ("task.denoiser_weights", "weights/CogVideoX-2b/transformer"),
        )
    ]
    # What is there and of another network is named beside what is missing.
    (tmp_path / "config.json").write_text("{}")
    changed = run.replace(task=run.task.replace(text=run.task.text.replace(weights=str(tmp_path))))
    found = inspect_run(changed, devices=[]).problems["weights"]
    assert len(found) == 3 and str(tmp_path) in found[2]
    # A bucket is asked once, by the check itself.
    changed = run.replace(task=run.task.replace(text=run.task.text.replace(weights="s3://bucket/t5")))
    found = inspect_run(changed, devices=[]).problems["weights"]
    assert len(found) == 3 and "task.text.tokenizer" in found[0] and "s3://bucket/t5" in found[2], found


def test_every_data_set_that_is_missing_is_named(data):
    run = clips.experiment(data, {"fsdp": 1})
    sources = tuple(SourceConfig(path=str(path)) for path in (data, "data/a", "data/b"))
    held_out = (SourceConfig(path=str(data), split="other"),)
    run = run.replace(
        data=run.data.replace(sources=sources, evaluation_sources=held_out),
        training=run.training.replace(evaluate_every=1),
    )
    found = inspect_run(run, devices=[]).problems["data"]
    assert len(found) == 3, found
    assert "'data/a' does not exist" in found[0] and "'data/b' does not exist" in found[1]
    assert "has no split 'other'" in found[2]


def test_every_problem_is_on_the_page(data, tmp_path, monkeypatch):
    """A missing data set does not hide what else is wrong."""
    run = clips.experiment(data.with_name("nothing"), {"fsdp": 3})
    page = examine(run, workdir=tmp_path)
    assert set(problems(page)) == {"data", "mesh"}
    assert "does not exist" in problems(page)["data"] and "needs 3 devices" in problems(page)["mesh"]
    assert str(page).endswith("2 problems")

    run = clips.experiment(data, {"fsdp": 8})
    uneven = dataclasses.replace(run.data.buckets[0], batch_size=12)
    monkeypatch.setattr(pages.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50_000}))
    monkeypatch.setattr(pages.resource, "getrlimit", lambda kind: (64, 128))
    page = examine(run.replace(data=run.data.replace(buckets=(uneven,))), workdir=tmp_path)
    assert set(problems(page)) == {"division", "checkpoints", "open files"}
    assert "batch_size = 12 must be a multiple of 8" in problems(page)["division"]
    assert "raise `ulimit -Hn`, which is 128" in problems(page)["open files"]
    assert "lower checkpoint.keep_last" in problems(page)["checkpoints"]


def test_memory_that_cannot_suffice(data, monkeypatch):
    run = clips.experiment(data, {"fsdp": 8})
    tiny = pages._Devices("", None, 1000.0, 1e12)
    monkeypatch.setattr(pages, "_attached", lambda experiment: tiny)
    page = examine(run)
    assert set(problems(page)) == {"memory"} and "use more devices along mesh.fsdp" in problems(page)["memory"]


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA of tomorrow"])
def test_memory_of_a_gpu_is_what_jax_may_take_of_it(data, monkeypatch, kind):
    """Three quarters by default; the memory of a GPU that is not in the table is known too."""
    run = clips.experiment(data, {"fsdp": 8})
    gpu = SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: {"bytes_limit": 60 * 2**30})
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [gpu])
        target = pages._attached(run)
    monkeypatch.setattr(pages, "_attached", lambda experiment: target)
    (text,) = rows(examine(run), "memory")
    assert "of 60.00 GiB, what JAX may take of a GPU: XLA_CLIENT_MEM_FRACTION, 0.75" in text


def test_steps_of_stages_are_shared_by_weight(data):
    run = clips.experiment(data, {"fsdp": 8})
    first = BucketConfig(frames=1, height=16, width=16, batch_size=8, end_step=4)
    second = dataclasses.replace(first, frames=2, end_step=None, weight=3.0)
    third = dataclasses.replace(first, frames=4, start_step=4, end_step=99, weight=3.0)
    staged = run.replace(data=run.data.replace(buckets=(first, second, third)))
    assert pages._bucket_steps(staged) == {first: 1.0, second: 3.0 + 1.0, third: 1.0}


def test_one_bucket_has_the_size_and_the_steps_that_it_has_beside_the_others():
    """Alone the short clips would be the longest, whose batch `tokens_per_step` sets, and all steps theirs."""
    task = tiny_text_to_video.CONFIG
    short = tiny_text_to_video.BUCKET.replace(frames=1, end_step=2)
    long = tiny_text_to_video.BUCKET.replace(frames=9, start_step=2)
    run = Experiment(
        name="tiny", task=task, training=TrainingConfig(steps=10), mesh=MeshConfig(fsdp=1),
        data=DataConfig(sources=(SourceConfig(path="nowhere"),), buckets=(short, long), tokens_per_step=4000),
    )  # fmt: skip
    sizes = {bucket.name: bucket.batch_size for bucket in with_batch_sizes(run).data.buckets}
    alone = with_batch_sizes(with_buckets(run, [short.name]))
    assert [bucket.batch_size for bucket in alone.data.buckets] == [sizes[short.name]]
    device = pages._Devices("", None, None, 1e12)
    every, first, later = (
        pages._time(Program.build(one, single_device_mesh()), device).text
        for one in (with_batch_sizes(run), alone, with_buckets(run, [long.name]))
    )
    assert [text.split()[0] for text in (every, first, later)] == ["10", "2", "8"]
    seconds = [float(re.search(r"\(([\d.e-]+) s/step", text)[1]) for text in (every, first, later)]
    assert 10 * seconds[0] == pytest.approx(2 * seconds[1] + 8 * seconds[2], rel=0.01)


@needs_compiler
def test_a_task_that_acts_has_one_process(data, monkeypatch):
    """Four chips of v5e are one host, eight are two."""
    monkeypatch.setattr(ReinforcementConfig, "check_data", lambda task, data: None)
    monkeypatch.setattr(ReinforcementConfig, "check_weights", lambda task: None)
    run = tiny_reinforcement.experiment(str(data))
    assert "mesh" not in problems(examine(run, topology_name="v5e:2x2"))
    told = problems(examine(run.replace(mesh=MeshConfig(data=2)), topology_name="v5e:2x4"))
    assert "runs in one process (with all of its devices), not in 2." in told["mesh"]


@needs_compiler
def test_all_processes_write_a_checkpoint(data):
    """Orbax divides the arrays that replicas share, so that two slices write as fast as one mesh of them would."""
    run = clips.experiment(data, {"data": 2, "fsdp": -1, "tensor": 4})
    page = examine(run, topology_name="v5e:4x4", slices=2)
    assert "for each of 8 processes)" in rows(page, "checkpoints")[0]
    slices = pytest.importorskip("orbax.checkpoint._src.serialization.replica_slices")
    split = NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), P("fsdp"))
    array = jax.device_put(np.zeros((8, 4), np.float32), split)
    written = slices.get_replica_slices(array, 0, ArrayHandler()._use_replica_parallel)
    assert len(written.replica_slices) == 8 and written.local_shape == (1, 4)


def test_checkpoints_that_are_kept(data):
    checkpoint = clips.experiment(data, {"fsdp": 8}).checkpoint.replace(every=10, keep_last=2)
    assert pages._kept(checkpoint, 5) == 1 and pages._kept(checkpoint, 1000) == 2
    assert pages._kept(checkpoint.replace(keep_every=100, best_metric="loss"), 1000) == 13


def test_the_index_is_read_once(data):
    """A page and then a loader open the same data set; a file that was written again is read again."""
    first = load_index(data, "train")
    assert load_index(data, "train") is first
    path = path_of(data, "train")
    storage.write_bytes(path, path.read_bytes())
    again = load_index(data, "train")
    assert again is not first and again.digest == first.digest


def test_the_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        shards.raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256 or hard <= 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_compiler
def test_a_failed_read_is_not_replaced_where_examples_are_shared(data):
    run = clips.experiment(data, {"fsdp": -1, "seq": 8, "data": 1})
    run = run.replace(data=run.data.replace(on_failed_read="quarantine", buckets=run.data.buckets[:1]))
    assert "use 'stop'" in problems(examine(run, topology_name="v5e:4x4"))["division"]
    assert not problems(examine(run.replace(mesh=run.mesh.replace(seq=2)), topology_name="v5e:4x4"))


@needs_compiler
def test_kernels_are_those_of_the_described_devices():
    run = load_experiment(Path(__file__).parents[2] / "configs" / "demo_image_latents.py")
    _, mesh = topology.describe_for(run.mesh, "v5e:2x2")
    report, problems = kernels(Program.build(run, mesh))
    assert report.lines and not problems
    assert all("TPU devices" in line or "a bias" in line for line in report.lines)
    denoiser = run.task.denoiser.replace(attention=AttentionKernel.TOKAMAX)
    refused = Program.build(run.replace(task=run.task.replace(denoiser=denoiser)), make_mesh(run.mesh))
    # A line where it is installed, a problem where not.
    report, problems = kernels(refused)
    assert "tokamax" in " ".join([*report.lines, *problems])


@needs_compiler
def test_the_compilers_word_on_memory(data, monkeypatch):
    run = clips.experiment(data, {"fsdp": -1})
    run = run.replace(data=run.data.replace(buckets=run.data.buckets[:1]))
    (text,) = rows(examine(run, topology_name="v5e:2x2", compiled=True), "compiled")
    assert text.startswith("1x4x16x16: ") and text.endswith("of 15.75 GiB")
    monkeypatch.setattr(topology.Topology, "hbm_bytes", 30_000.0)
    assert "compiled" in problems(examine(run, topology_name="v5e:2x2", compiled=True))


@needs_compiler
def test_the_command(jvgen, vae_words, tmp_path):
    words = [*vae_words, "--topology", "v5e:2x2", "--workdir", tmp_path / "run"]
    done = jvgen("check", *words)
    assert done.status == 0 and "all green" in done.out and "v5e:2x2" in done.out, done
    bad = jvgen("check", *words, "--set", "mesh.seq=3")
    assert bad.status == 2 and "PROBLEM" in bad.out and "1 problem" in bad.out


@pytest.mark.parametrize(
    "words,message",
    [
        (["--topology", "v5e:0x0"], "topology 'v5e:0x0': a slice of v5e comes as"),
        (["--topology", "v7:2x2"], "'v7' is not a TPU generation"),
        (["--slices", "2"], "--slices: needs --topology"),
        (["--bucket", "1x2x3x4"], "bucket '1x2x3x4': data.buckets has 1x1x16x16"),
    ],
)
def test_arguments_that_cannot_be(jvgen, vae_words, words, message):
    done = jvgen("check", *vae_words, *words)
    assert done.status == 2 and message in done.err and "PROBLEM" not in done.out
