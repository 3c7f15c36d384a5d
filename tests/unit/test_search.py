"""The search over meshes, rematerialization and batch sizes: which candidates there are, their order, and the best."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_text_to_video  # noqa: E402

from jvgen.cli.main import main  # noqa: E402
from jvgen.config import ConfigError  # noqa: E402
from jvgen.data.stream.config import DataConfig, SourceConfig  # noqa: E402
from jvgen.nn.kernel_report import KernelReport, collecting  # noqa: E402
from jvgen.nn.stacked import Remat  # noqa: E402
from jvgen.parallel.mesh import single_device_mesh  # noqa: E402
from jvgen.preflight import search, topology  # noqa: E402
from jvgen.training.config import TrainingConfig  # noqa: E402
from jvgen.training.experiment import Experiment  # noqa: E402
from jvgen.training.program import Program  # noqa: E402

needs_libtpu = pytest.mark.skipif(not topology.has_compiler(), reason="needs libtpu, the TPU compiler")
LAYERS = 3


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    task = tiny_text_to_video.CONFIG
    task = task.replace(
        latents="data", vae_weights=None, denoiser=task.denoiser.replace(layers=LAYERS, token_multiple=8)
    )
    bucket = tiny_text_to_video.BUCKET.replace(batch_size=8)
    data = DataConfig(sources=(SourceConfig(path="nowhere"),), buckets=(bucket,))
    return Experiment(name="tiny", task=task, data=data, training=TrainingConfig(steps=1))


def few_candidates(monkeypatch) -> None:
    """Of two rematerializations, by their state alone: what is built and traced takes a search's time here."""
    monkeypatch.setattr(search, "REMATS", search.REMATS[:2])
    monkeypatch.setattr(search, "stored_bytes", lambda *_: 0)


@dataclasses.dataclass(frozen=True)
class Time:
    likely: float
    is_whole: bool = True

    @property
    def seconds(self):
        return self


@dataclasses.dataclass(frozen=True)
class Memory:
    total: float


@dataclasses.dataclass(frozen=True)
class Report:
    memory: Memory | None
    time: Time | None
    problem: str = ""


def test_only_fsdp_takes_the_remaining_devices(experiment):
    changed = experiment.replace(mesh=experiment.mesh.replace(data=-1, fsdp=1))
    with pytest.raises(ConfigError, match="mesh.data = -1: .* set mesh.data to 1"):
        search.search(changed, "v5e:2x4")


@needs_libtpu
def test_what_is_wrong_with_every_candidate_is_said(experiment, monkeypatch):
    monkeypatch.setattr(search, "SEQUENCE_SHARDS", (1,))
    bucket = experiment.data.buckets[0].replace(batch_size=7)
    with pytest.raises(ConfigError, match="batch_size = 7 must be a multiple of 8"):
        search.search(experiment.replace(data=experiment.data.replace(buckets=(bucket,))), "v5e:2x4")


def test_stored_bytes_are_those_of_the_policy(experiment):
    (bucket,) = experiment.data.buckets
    program = Program.build(experiment, single_device_mesh())
    stored = {}
    with collecting(KernelReport()) as said:
        for remat in (Remat.FULL, Remat.SAVE_ATTENTION, Remat.NONE):
            task = experiment.task.replace(denoiser=experiment.task.denoiser.replace(remat=remat))
            program = Program.build(experiment.replace(task=task), single_device_mesh())
            stored[remat] = search.stored_bytes(program, bucket)
    assert not said.lines, "a candidate that is not compiled prints no kernels"
    rows, width = 3 * 2 * 2 + 6, experiment.task.denoiser.width
    rows += -rows % 8
    layer = bucket.batch_size * rows * width * jnp.dtype(jnp.bfloat16).itemsize
    # Outside of the blocks there are the inputs of the embeddings and of the head.
    assert LAYERS * layer <= stored[Remat.FULL] < stored[Remat.SAVE_ATTENTION] < stored[Remat.NONE]
    assert stored[Remat.SAVE_ATTENTION] - stored[Remat.FULL] >= LAYERS * layer


@needs_libtpu
def test_candidates_divide_devices_examples_and_tokens_and_come_least_recomputation_first(experiment):
    found = list(search.candidates(experiment, "v5e:2x2", 1, (2, 8)))
    assert {(one.mesh["fsdp"], one.mesh["seq"], one.batch_size) for one in found} == {
        (4, 1, 8), (2, 2, 2), (1, 4, 2)
    }  # fmt: skip
    remats = [one.remat for one in found]
    assert remats == sorted(remats, key=search.REMATS.index) and set(remats) == set(search.REMATS)
    assert found[0].mesh["seq"] == 1 and found[0].experiment.task.denoiser.remat is Remat.NONE
    assert found[0].settings == (
        "mesh.data=1 mesh.fsdp=4 mesh.seq=1 mesh.tensor=1 task.denoiser.remat=none data.buckets.0.batch_size=8"
    )
    by_remat = {one.remat: one.estimated for one in found if (one.mesh["seq"], one.batch_size) == (1, 8)}
    assert by_remat[Remat.NONE] > by_remat[Remat.SAVE_ATTENTION] > by_remat[Remat.FULL] > 0


@needs_libtpu
def test_the_fastest_per_example_that_fits_is_first(experiment, monkeypatch):
    few_candidates(monkeypatch)
    compiled = []

    def fake(candidate, topology_name, slices):
        compiled.append(candidate)
        memory, seconds = 1e9, 1.0 * candidate.batch_size / candidate.mesh["seq"] ** 0.5
        if candidate.mesh["seq"] == 1 and candidate.remat is Remat.NONE:
            memory = 1e12
        return search.Found(candidate, Report(Memory(memory), Time(seconds)))

    monkeypatch.setattr(search, "_compiled", fake)
    # A batch shape of later stages, alone.
    bucket = experiment.data.buckets[0].replace(start_step=3)
    experiment = experiment.replace(data=experiment.data.replace(buckets=(bucket,)))
    report = search.search(experiment, "v5e:2x2", batch_sizes=(2, 8), compilations=4, places=(1, 4))
    assert len(compiled) == 4 and report.too_large == 0
    assert report.best.candidate.mesh["seq"] == 2 and report.best.candidate.remat is Remat.NONE
    # Of every rematerialization and batch size the one with the fewest shards of a sequence is compiled.
    assert {(one.remat, one.batch_size, one.mesh["seq"]) for one in compiled} == {
        (remat, batch_size, seq) for remat in search.REMATS[:2] for batch_size, seq in ((8, 1), (2, 2))
    }
    # Then slower ones, what does not fit, and what was not compiled.
    assert [one.candidate.mesh["seq"] for one in report.found[:4]] == [2, 2, 1, 1]
    assert [one.candidate.remat for one in report.found[:4]][2:] == [Remat.SAVE_MATMULS, Remat.NONE]
    text = str(report)
    assert report.best.candidate.settings.endswith("data.buckets.1.batch_size=2 data.buckets.4.batch_size=2")
    assert "does not fit" in text and "not compiled" in text and f"best: {report.best.candidate.settings}" in text


@needs_libtpu
def test_times_that_are_not_known_do_not_make_a_candidate_the_best(experiment, monkeypatch):
    """A kernel whose cycles are not known would make a step look short; on tpu7x no time is known."""
    few_candidates(monkeypatch)

    def fake(candidate, topology_name, slices):
        short = candidate.mesh["seq"] == 2
        return search.Found(candidate, Report(Memory(1e9), Time(0.1 if short else 1.0, is_whole=not short)))

    monkeypatch.setattr(search, "_compiled", fake)
    report = search.search(experiment, "v5e:2x2", batch_sizes=(2, 8), compilations=4)
    assert report.best.candidate.mesh["seq"] == 1 and report.best.seconds == 1.0
    monkeypatch.setattr(search, "_compiled", lambda candidate, *_: search.Found(candidate, Report(Memory(1e9), None)))
    text = str(search.search(experiment, "v5e:2x2", compilations=1))
    assert "times are not known for these chips; the first that fits: mesh." in text and "best" not in text


@needs_libtpu
def test_nothing_that_fits_is_an_error_with_the_smallest(experiment, monkeypatch):
    few_candidates(monkeypatch)
    monkeypatch.setattr(search, "FILLED", 1e-9)
    with pytest.raises(ConfigError, match=r"none of \d+ candidates fits by arithmetic.*use more devices"):
        search.search(experiment, "v5e:2x2")


def test_batch_sizes_that_a_run_would_replace_are_not_searched(capsys):
    """`data.tokens_per_step` chooses them again when the run is read with what the search suggests."""
    settings = ("data.tokens_per_step=2000000", "data.batch_multiple=128")
    words = [word for setting in settings for word in ("--set", setting)]
    config = str(Path(__file__).parents[2] / "configs/repvideo_2b_scratch.py")
    assert main(["compile", config, "--topology", "v5p:4x4x8", "--search", "--batch-sizes", "8", *words]) == 2
    assert "--batch-sizes: data.tokens_per_step = 2000000 chooses batch sizes" in capsys.readouterr().err
