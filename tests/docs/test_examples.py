"""The worked examples of the documentation do what their pages say."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jvgen
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.training.checkpoint.manager import Checkpoints
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.telemetry.json_lines import read_rows

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(autouse=True)
def examples_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_data_source_and_a_task_train(tmp_path):
    import arrays_source
    import patch_task

    clips, data = tmp_path / "clips", tmp_path / "data"
    clips.mkdir()
    ramp = np.linspace(0, 255, 16 * 16 * 3).astype(np.uint8).reshape(16, 16, 3)
    for number in range(12):
        np.save(clips / f"a_ramp_{number}.npy", np.stack([np.roll(ramp, frame + number, axis=1) for frame in range(4)]))
    np.save(clips / "broken.npy", np.zeros((4, 4)))
    summary = arrays_source.build(clips, data)
    assert [(one.name, one.corrupt) for one in summary.rejected] == [("broken", True)]

    bucket = BucketConfig(frames=2, height=16, width=16, batch_size=8)
    experiment = Experiment(
        name="example",
        task=patch_task.PatchTaskConfig(),
        data=DataConfig(sources=(SourceConfig(path=str(data)),), buckets=(bucket,), threads=1),
        training=TrainingConfig(
            steps=8, evaluate_every=0, precision=PrecisionConfig(compute_dtype="float32"), visualize_every=0
        ),
        ema=EmaConfig(decays=()),
        checkpoint=CheckpointConfig(every=8),
    )
    experiment = experiment.replace(optimizer=experiment.optimizer.replace(learning_rate=1e-2, warmup_steps=0))
    jvgen.train(experiment, tmp_path / "run")
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert jvgen.load_run(tmp_path / "run").network("patches").config == patch_task.PatchConfig()
    with pytest.raises(ValueError, match="task.network.patch"):
        experiment.task.check_bucket(bucket.replace(height=18))


def test_a_network_has_a_table_of_weights():
    from patch_network import PatchConfig, PatchNetwork, weight_map

    network = Network.of(lambda rngs: PatchNetwork(PatchConfig(), rngs=rngs))
    parameters = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
    tensors = dict(weight_map().to_torch(parameters))
    assert tensors["encode.weight"].shape == (8, 48)
    back = weight_map().from_torch(tensors, network.shapes)
    for path, leaf in flatten(parameters).items():
        np.testing.assert_array_equal(leaf, flatten(back)[path])


def test_a_kernel_equals_the_reference():
    import heads_kernel

    output, gradients = heads_kernel.largest_differences()
    assert output < 1e-6 and gradients < 1e-5


def test_parameters_are_listed():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        shapes = runpy.run_path(str(EXAMPLES / "shapes.py"))["shapes"]
    assert shapes["blocks/layers/attention/query/kernel"] == (2, 32, 32)
    assert "blocks/layers/attention/query/kernel (2, 32, 32)" in printed.getvalue()


def test_a_checkpoint_is_read_without_jvgen(tmp_path):
    import read_checkpoint

    rng = np.random.default_rng(0)
    names = ("parameters/a/kernel", "ema/0.9/a/kernel")
    arrays = {name: rng.standard_normal((4, 2)).astype(np.float32) for name in names}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, jax.tree.map(jax.numpy.asarray, arrays), {"step": 3}, {})
    checkpoints.close()
    for prefix, name in (("parameters/", "parameters/a/kernel"), ("ema/0.9/", "ema/0.9/a/kernel")):
        found = read_checkpoint.read_checkpoint(tmp_path / "checkpoints" / "3", prefix)
        assert list(found) == [name]
        np.testing.assert_array_equal(found[name], arrays[name])
