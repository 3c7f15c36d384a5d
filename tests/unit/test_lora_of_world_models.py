"""A LoRA of a world model's transformer: runs that stop and go on, files, a merged export that is played, mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import nested
from jvgen.config import ConfigError, validate_tree
from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.video_files import encode_video
from jvgen.exit_codes import DONE
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder
from jvgen.interop.lora_folder import read_adapters
from jvgen.interop.to_torch import export_network
from jvgen.nn.lora import LoraConfig
from jvgen.reinforcement.config import ImaginationConfig
from jvgen.reinforcement.pretrained import read_pretrained
from jvgen.runs.exporting import export_run, import_run
from jvgen.runs.world_models import load_world_model
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.checkpoint.restore import load_for_inference
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.loop import train
from tests import tiny_reinforcement

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")

TOKENIZER, TRANSFORMER = tiny_reinforcement.TOKENIZER, tiny_reinforcement.TRANSFORMER.replace(max_positions=140)
# One clip for each device.
BUCKET = BucketConfig(frames=4, height=16, width=16, batch_size=8)
LORA = LoraConfig(
    rank=2, alpha=4.0, dropout=0.2, targets=("transformer/blocks/layers/attention/(query|value)$", "transformer/action")
)
LAYERS = ["action", "blocks/layers/attention/query", "blocks/layers/attention/value"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """On recordings with actions and rewards, beside both networks as folders."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    for name, config in (("tokenizer", TOKENIZER), ("transformer", TRANSFORMER)):
        leaves, structure = jax.tree.flatten(format_of(config).network(config).shapes)
        drawn = [(0.3 * rng.standard_normal(s.shape) + (s.ndim == 1)).astype(np.float32) for s in leaves]
        export_network(config, structure.unflatten(drawn), folder / name)
    with Writer(folder / "data", description="toy", metadata={}) as writer:
        for number in range(8):
            clip = encode_video(rng.integers(0, 255, (6, 16, 16, 3), np.uint8), 8.0)
            writer.add("train", Record(
                id=str(number), kind="dynamic", clips=(clip,), frames_per_second=8.0, frames=6, height=16, width=16,
                actions=rng.standard_normal((6, 2)).astype(np.float32), rewards=np.ones(6, np.float32),
            ))  # fmt: skip
    return Experiment(
        name="tiny",
        task=WorldModelConfig(
            transformer=TRANSFORMER, tokenizer=TOKENIZER, tokenizer_weights=str(folder / "tokenizer"),
            transformer_weights=str(folder / "transformer"), lora=LORA,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "data")),), buckets=(BUCKET,), threads=1, prefetch=1
        ),
        training=TrainingConfig(steps=4, log_every=1, precision=PrecisionConfig(compute_dtype="float32")),
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(experiment, folder) == DONE
    return folder


def trained(run) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in nested.flatten(load_for_inference(run, "raw")[2]).items()}


def test_a_run_that_stopped_goes_on_bit_equal(experiment, run, tmp_path):
    """On eight devices, with dropout; its checkpoints hold the LoRA alone."""
    for steps in (2, 4):
        assert train(experiment, tmp_path / "run", stop_after=steps) == DONE
    rows = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "run")
    ]
    assert len(rows[0]) == 4 and rows[0] == rows[1]
    expected, found = trained(run), trained(tmp_path / "run")
    assert sorted(found) == [f"lora/transformer/{layer}/{part}" for layer in LAYERS for part in ("down", "up")]
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
        assert np.abs(leaf).max() > 0, path


def test_the_loss_is_the_bases_at_first_and_that_of_merged_weights(experiment):
    task, base = experiment.task.build(), experiment.task.without_lora().build()
    frozen, rng = jax.tree.map(jnp.asarray, task.load_frozen()), np.random.default_rng(1)
    batch = {"slot": jnp.arange(8, dtype=jnp.int32)}
    for name, spec in task.fields(BUCKET).items():
        drawn = rng.integers(0, 256, (8, *spec.shape)) if spec.dtype == np.uint8 else rng.normal(size=(8, *spec.shape))
        batch[name] = jnp.asarray(drawn.astype(spec.dtype))
    apart = jax.jit(lambda parameters: task._loss(parameters, frozen, batch, None)[0])
    alone = jax.jit(lambda transformer: base._loss({"transformer": transformer}, frozen, batch, None)[0])
    np.testing.assert_allclose(
        apart(jax.jit(task.init)(jax.random.key(0))), alone(frozen["transformer"]), rtol=1e-6
    )  # fmt: skip
    shapes = task.networks["lora"].shapes
    factors = {
        "lora": jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), shapes)
    }
    np.testing.assert_allclose(apart(factors), alone(task.transformer(factors, frozen)), rtol=1e-5)
    assert abs(apart(factors) - alone(frozen["transformer"])) > 1e-2


def test_files_become_runs_and_merged_ones_are_played(experiment, run, tmp_path):
    export_run(run, tmp_path / "exported", ema="raw")
    assert (tmp_path / "exported" / "transformer" / "adapter_config.json").is_file()
    scale, expected = np.float32(LORA.scale), trained(run)
    back = read_adapters(tmp_path / "exported", {"transformer": TRANSFORMER})["transformer"].factors
    for path, leaf in nested.flatten(back).items():
        factor = scale if path.endswith("up") else np.float32(1)
        np.testing.assert_array_equal(leaf, expected[f"lora/transformer/{path}"] * factor, err_msg=path)
    again = experiment.replace(task=experiment.task.replace(lora=LORA.replace(alpha=None)))
    import_run(tmp_path / "exported", again, tmp_path / "again")
    export_run(tmp_path / "again", tmp_path / "whole", merge_lora=True)

    imagination = ImaginationConfig(tokenizer=TOKENIZER, transformer=TRANSFORMER)
    merged = import_folder(tmp_path / "whole" / "transformer")[1]
    own = read_pretrained(imagination.replace(pretrained=str(tmp_path / "again")))["transformer"]
    for path, leaf in nested.flatten(own).items():
        np.testing.assert_allclose(nested.flatten(merged)[path], leaf, atol=1e-6, err_msg=path)
    base = import_folder(experiment.task.transformer_weights)[1]
    assert np.abs(merged["action"]["kernel"] - base["action"]["kernel"]).max() > 0

    context, made = np.random.default_rng(2).integers(0, 256, (1, 2, 16, 16, 3), np.uint8), []
    for folder in (tmp_path / "again", tmp_path / "whole"):
        world = load_world_model(folder, frames=4, greedy=True)
        made.append(world.step(world.reset(context, 0), np.ones((1, 2), np.float32))[1:])
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, "transformer_weights = .* with lora = none: nothing would be trained"),
        ({"transformer_weights": None}, "task.transformer_weights = none: a LoRA leaves this network as it is"),
        ({"lora": LoraConfig()}, "matches no linear layer of transformer .*nearest are .*transformer/blocks/"),
        ({"lora": LoraConfig(targets=("tokenizer/",))}, "is in tokenizer, which stays as it is in this task"),
    ],
)
def test_mistakes(experiment, change, message):
    config = experiment.task.replace(**change)
    with pytest.raises((ValueError, ConfigError), match=message):
        validate_tree(config)
        config.check_weights()
        config.build()
