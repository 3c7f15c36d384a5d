"""Runs saved by jvgen 0.1.0 still resume, evaluate, sample and export, and every config it shipped still loads.

`saved_by_0_1_0/` was written by release 0.1.0 (commit 2dac202): `files.tar.xz` has small data sets, a run of each task
saved at step 2 of 4, and exports of these runs; `expected.json` has the overrides of each run, the losses of all four
steps and the evaluation at step 2; `configs.json.gz` has the configs of `configs/` as checkpoints store them.
"""

import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jvgen import config, saved_config
from jvgen.cli.main import main
from jvgen.interop.digest import CARD_FILE, DIGESTS_FILE
from jvgen.interop.from_torch import import_folder
from jvgen.training.experiment import Experiment

FIXTURE = Path(__file__).parent / "saved_by_0_1_0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
RUNS = EXPECTED["runs"]
# Compiling the other tasks' steps takes minutes.
QUICK = {"image_vae", "text_to_video"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in RUNS]
CONFIGS = json.loads(gzip.decompress((FIXTURE / "configs.json.gz").read_bytes()))
EXPORTED = ("image_vae", "text_to_video", "tokenizer")
AT_SAVED_STEP = ("--step", EXPECTED["saved"])

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved_by_0_1_0")
    shutil.unpack_archive(FIXTURE / "files.tar.xz", folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def working_directory(files, monkeypatch) -> None:
    """Paths in the saved configs are relative to the unpacked folder."""
    monkeypatch.chdir(files)


def jvgen(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def metrics(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_training_resumes_with_the_same_losses(name):
    before = metrics(name)
    jvgen("train", f"runs/{name}/config.json", "--workdir", f"runs/{name}")
    after = metrics(name)
    assert [row["step"] for row in after] == list(range(EXPECTED["steps"]))
    assert after[: EXPECTED["saved"]] == before, "the run started from the beginning"
    assert [row["loss"] for row in after] == pytest.approx(RUNS[name]["losses"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_gives_the_same_metrics(name, tmp_path):
    jvgen("evaluate", f"runs/{name}", *AT_SAVED_STEP, "--batches", 1, "--out", tmp_path / "metrics.json")
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["step"] == EXPECTED["saved"]
    # Later versions measure more. 0.1.0 computed SSIM on [-1, 1], which has another value.
    expected = {key: value for key, value in RUNS[name]["evaluation"].items() if "ssim" not in key}
    assert {key: found["metrics"].get(key) for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text_to_video", ()),
        pytest.param("multiview", ("--cameras", "circle", "--views", 2), marks=pytest.mark.slow),
    ],
    ids=["text_to_video", "multiview"],
)
def test_clips_are_sampled(name, options, tmp_path):
    jvgen("sample", f"runs/{name}", *AT_SAVED_STEP, "--prompt", "a red ball", *options, "--out", tmp_path / "clips")
    assert any((tmp_path / "clips").rglob("*.mp4"))


@pytest.mark.slow
def test_the_world_model_is_played(tmp_path):
    (tmp_path / "actions.csv").write_text("0.5,0\n0,1\n")
    jvgen(
        "play", "runs/transformer", *AT_SAVED_STEP, "--data", "data/scenes", "--actions", tmp_path / "actions.csv",
        "--quiet", "--out", tmp_path / "episode.mp4",
    )  # fmt: skip
    assert (tmp_path / "episode.mp4").is_file()


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_are_the_same(name, tmp_path):
    old, new = Path("exported") / name, tmp_path / name
    jvgen("export", f"runs/{name}", *AT_SAVED_STEP, "--to", new)
    names = {path.relative_to(old) for path in old.rglob("*") if path.is_file()}
    # Digests and the model card, which 0.1.0 did not write, are beside what other libraries read.
    beside = (DIGESTS_FILE, CARD_FILE)
    written = {path.relative_to(new) for path in new.rglob("*") if path.is_file() and path.name not in beside}
    assert names == written
    for path in sorted(names):
        if path.suffix == ".safetensors":
            old_tensors, new_tensors = load_file(old / path), load_file(new / path)
            assert old_tensors.keys() == new_tensors.keys()
            for tensor in old_tensors:
                np.testing.assert_array_equal(new_tensors[tensor], old_tensors[tensor], err_msg=tensor)
        elif path.name != "jvgen_run.json":
            assert json.loads((new / path).read_text()) == json.loads((old / path).read_text())


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_load(name):
    networks = [path.parent for path in Path("exported", name).glob("*/config.json")]
    assert networks
    for folder in networks:
        _, parameters = import_folder(folder)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters))


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_configs_load(name):
    experiment = saved_config.decode(CONFIGS[name])
    assert isinstance(experiment, Experiment) and experiment.name == name
    config.validate_tree(experiment)
    assert saved_config.from_json(saved_config.to_json(experiment)) == experiment
