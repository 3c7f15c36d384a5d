"""Configs on their slices: the mesh and every sharding as they were, the table of compiled programs as it is kept."""

import dataclasses
import importlib
import json
import os
import re
from pathlib import Path

import pytest

from jvgen import nested
from jvgen.parallel.mesh import describe
from jvgen.preflight import topology
from jvgen.training.program import Program
from tests.pods import configs, page, runs

GOLDEN = Path(__file__).parents[1] / "golden" / "pods"
UPDATE = "JVGEN_UPDATE_SHARDINGS"


def shardings(run: runs.PodRun) -> str:
    """Mesh, and per array of parameters and batch: dtype, shape, axes that split it, shape on one device."""
    experiment = run.experiment()
    pod, mesh = topology.describe_for(experiment.mesh, run.topology)
    program = Program.build(experiment, mesh)
    lines = [f"{describe(mesh)}, {pod.name}"]
    trees = {"parameters": program.abstract_state().parameters, "frozen": program.abstract_state().frozen}
    trees |= {f"batch {bucket.name}": dict(program.abstract_batch(bucket)) for bucket in experiment.data.buckets}
    for name, tree in trees.items():
        for path, leaf in sorted(nested.flatten(tree).items()):
            local = leaf.sharding.shard_shape(leaf.shape)
            spec = ", ".join("x".join(one) if isinstance(one, tuple) else str(one or "-") for one in leaf.sharding.spec)
            lines.append(f"{name}: {path} {leaf.dtype}{list(leaf.shape)} ({spec}) {list(local)}")
    return "\n".join(lines) + "\n"


def test_the_page_is_the_table():
    """`python -m tests.pods --page` writes it."""
    assert page.PAGE.read_text() == page.page(runs.results())


def test_results_have_the_names_of_runs():
    names = {run.name for run in runs.RUNS}
    assert set(runs.results()) <= names and len(names) == len(runs.RUNS)


def test_a_row_says_what_of_its_config_changed(tmp_path, monkeypatch):
    run = runs.RUNS[0]
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    row = {"config": configs.record(run)}
    assert configs.since(run, row) == ""
    assert configs.since(run, {}) == "; its config is not known"
    assert configs.since(run, {"config": "0" * 16}) == "; config changed since"
    other = dataclasses.replace(run, overrides=("mesh.fsdp=7", "seed=5"))
    monkeypatch.setattr(type(run), "name", property(lambda self: "same"))
    row = {"config": configs.record(other)}
    assert configs.since(run, row) == f"; config changed since: `mesh.fsdp` 7 -> {run.experiment().mesh.fsdp}"
    # A field that the class did not have then has its default, under which nothing changed.
    file = tmp_path / "same.json"
    configs.record(run)
    document = json.loads(file.read_text())
    del document["sharding"]["frozen"]
    file.write_text(json.dumps(document))
    row = {"config": configs._digest(file.read_text())}
    assert configs.since(run, row) == ""


def test_a_row_keeps_where_the_time_goes():
    part = {"least": 0.1, "likely": 0.2, "most": 0.3}
    sent = {"kind": "all-gather", "axes": "fsdp", "network": False, "frozen": True, "count": 2, "bytes": 2**30}
    time = {
        "without_cycles": [],
        "has_code": True,
        "useful_flops": 1e12,
        "seconds": part,
        "utilization": [0.1, 0.2, 0.3],
        "parts": {"matrix products": part, "small": {"least": 0.0, "likely": 1e-5, "most": 0.0}},
        "traffic": [sent | {"seconds": part, "hidden": 0.05}],
    }
    bucket = {"bucket": {"batch_size": 4}, "memory": None, "collectives": None, "seconds": 3.0, "time": time}
    row = runs.row_of({"hbm_bytes": 2**30}, bucket, {})
    assert row["parts_ms"] == {"matrix products": 200.0}
    sent = {"ms": 200.0, "hidden_ms": 50.0, "GiB": 1.0}
    assert row["collectives_ms"] == {"all-gather over fsdp, frozen networks": sent}
    row |= {"date": "2026-01-01", "commit": "0123456", "versions": "jax"}
    text = page.page({runs.RUNS[0].name: {"1x1x64x64": row}})
    assert "matrix products: 200 | all-gather over fsdp, frozen networks: 150 of 200 ms, 1 GiB |" in text
    assert "its config is not known" in text
    least = runs.row_of({"hbm_bytes": 2**30}, bucket | {"time": time | {"has_code": False}}, {})
    text = page.page({runs.RUNS[0].name: {"1x1x64x64": row | least}})
    assert "| at least 0.1 | at most 30% |" in text and "| at least" not in page.page({runs.RUNS[0].name: {"b": row}})


def test_every_slice_that_a_config_names_is_compiled():
    for path in sorted((runs.ROOT / "configs").glob("*.py")):
        chips = re.search(r"^Chips: (.*?)^(?:[A-Z]\w+:|\"\"\")", path.read_text(), re.MULTILINE | re.DOTALL)
        named = set(re.findall(r"`(?:--topology )?(v\w+:[\dx]+)`", chips.group(1))) if chips else set()
        listed = {run.topology for run in runs.RUNS if Path(run.config.split(":")[0]).name == path.name}
        # Sizes of iVideoGPT that differ in their batch only share a slice's kind.
        assert listed <= named and (named <= listed or path.name.startswith("ivideogpt")), path.name


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("run", runs.RUNS, ids=lambda run: run.name)
def test_mesh_and_shardings(run):
    file, text = GOLDEN / f"{run.name}.txt", shardings(run)
    if os.environ.get(UPDATE):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text.splitlines() == file.read_text().splitlines(), f"{UPDATE}=1 writes what the configs say now"


@pytest.mark.parametrize(
    "flags,expected", [([], {"optimized"}), (["--without-code"], set()), (["--again"], {"optimized", "whole"})]
)
def test_rows_without_code_are_compiled_when_asked_for_whole(monkeypatch, tmp_path, flags, expected):
    command = importlib.import_module("tests.pods.__main__")
    run = runs.RUNS[0]
    (bucket,) = run.experiment().data.buckets
    compiled = set()
    for name, row in (("whole", {}), ("optimized", {"has_code": False})):
        monkeypatch.setattr(command, "results", lambda row=row: {run.name: {bucket.name: row | {"batch_size": 1}}})
        monkeypatch.setattr(command, "_compile", lambda *arguments, name=name: not compiled.add(name))
        monkeypatch.setattr(command, "page", lambda found: "")
        monkeypatch.setattr(command, "PAGE", tmp_path / "pods.md")
        assert command.main(["--only", run.name, *flags]) == 0
    assert compiled == expected
