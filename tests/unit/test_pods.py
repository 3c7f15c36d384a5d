"""Configs on their slices: the mesh and every sharding as they were, the table of compiled programs as it is kept."""

import os
import re
from pathlib import Path

import pytest

from jvgen import nested
from jvgen.parallel.mesh import describe
from jvgen.preflight import topology
from jvgen.training.experiment import load_experiment
from jvgen.training.program import Program
from tests.pods import runs

GOLDEN = Path(__file__).parents[1] / "golden" / "pods"
UPDATE = "JVGEN_UPDATE_SHARDINGS"


def shardings(run: runs.PodRun) -> str:
    """Mesh, and per array of parameters and batch: dtype, shape, axes that split it, shape on one device."""
    experiment = load_experiment(runs.ROOT / run.config, run.overrides)
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
    assert runs.PAGE.read_text() == runs.page(runs.results())


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
