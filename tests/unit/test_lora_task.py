"""The text-to-video task with a LoRA of its denoiser, or of both networks: what is trained and saved, its start, its
mistakes; files to runs and back."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import nested
from jvgen.cli.sample import lora_argument
from jvgen.config import ConfigError, validate_tree
from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder
from jvgen.interop.lora_file import read_lora, write_lora
from jvgen.interop.lora_folder import is_lora, read_adapters, write_adapters
from jvgen.interop.safetensors_file import SafetensorsFile
from jvgen.interop.to_torch import ExportError, export_network
from jvgen.models.t5.config import T5Config
from jvgen.models.weight_map import WeightError
from jvgen.nn import lora
from jvgen.nn.lora import LoraConfig
from jvgen.nn.network import Network
from jvgen.parallel.mesh import single_device_mesh
from jvgen.runs.exporting import export_run, import_run
from jvgen.runs.published.placement import Placement
from jvgen.tasks.text import TextConfig
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program
from jvgen.training.state import size_of
from jvgen.training.telemetry.throughput import step_flops

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import BUCKET, CONFIG, random_frozen  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")

LORA = LoraConfig(rank=2, alpha=1.0)
BOTH = LORA.replace(targets=("denoiser/blocks/layers/attention/query$", "text_encoder/blocks/layers/(query|feed_)"))
# With the layers that they choose; the first are those of all earlier versions.
LAYERS = {
    "denoiser": (LORA, [f"denoiser/blocks/layers/attention/{name}" for name in ("key", "output", "query", "value")]),
    "both": (
        BOTH,
        ["denoiser/blocks/layers/attention/query"]
        + [f"text_encoder/blocks/layers/{name}" for name in ("feed_forward/hidden", "feed_forward/output", "query")],
    ),
}


def random_parameters(network: Network) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape, np.float32), network.shapes)


@pytest.fixture(scope="module")
def weights():
    return {name: random_parameters(network) for name, network in CONFIG.build().networks.items()}


@pytest.fixture(scope="module")
def config(weights, tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("weights"), CONFIG.build()
    for name, parameters in weights.items():
        export_network(task.network_configs[name], parameters, folder / name)
    export_network(CONFIG.vae, random_frozen()["vae"], folder / "vae")
    return CONFIG.replace(
        lora=LORA, denoiser_weights=str(folder / "denoiser"), text_encoder_weights=str(folder / "text_encoder"),
        vae_weights=str(folder / "vae"), validation_timesteps=2,
    )  # fmt: skip


def experiment_of(config) -> Experiment:
    return Experiment(
        name="tiny", task=config, data=DataConfig(sources=(SourceConfig(path="none"),), buckets=(BUCKET,)),
        training=TrainingConfig(steps=2, precision=PrecisionConfig(compute_dtype="float32")),
    )  # fmt: skip


def batch_of(task) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {"slot": np.arange(BUCKET.batch_size, dtype=np.int32)}
    for name, spec in task.fields(BUCKET).items():
        shape = (BUCKET.batch_size, *spec.shape)
        floating = spec.dtype == np.float32
        arrays[name] = rng.standard_normal(shape, np.float32) if floating else rng.integers(0, 200, shape, spec.dtype)
    return {name: jnp.asarray(value) for name, value in arrays.items()}


@pytest.mark.parametrize("networks", LAYERS)
def test_a_step_trains_the_lora_alone(config, weights, networks):
    """At first the loss is that of the weights; then only the factors move, and only they are saved and averaged."""
    chosen, layers = LAYERS[networks]
    config = config.replace(lora=chosen)
    program = Program.build(experiment_of(config), single_device_mesh())
    state = program.init()
    task, batch = program.task, batch_of(program.task)
    assert set(task.networks) == set(state.parameters) == {"lora"} and not task.network_configs
    saved = {name for name in state.saved() if name.startswith(("parameters/", "ema/"))}
    paths = {f"lora/{layer}/{part}" for layer in layers for part in ("down", "up")}
    assert saved == {f"{part}{path}" for part in ("parameters/", "ema/0.9999/") for path in paths}
    # The kernels have no gradients; what attention multiplies has them all.
    passes = {
        part: step_flops(task, BUCKET)[part] / flops / BUCKET.batch_size for part, flops in task.flops(BUCKET).items()
    }
    alone = {"text_encoder"} - task.adapted_networks
    assert passes == {part: 1.0 if part in alone else 3.0 if part == "attention" else 2.0 for part in passes}
    assert size_of(state.parameters)[0] < size_of(state.frozen["denoiser"])[0]
    for path, value in nested.flatten(weights["denoiser"]).items():
        np.testing.assert_array_equal(nested.flatten(state.frozen["denoiser"])[path], value)
    full = CONFIG.replace(vae_weights=config.vae_weights).build()
    frozen = {"vae": state.frozen["vae"]}
    expected = jax.jit(full.loss)(weights, frozen, batch, jax.random.key(5))[0]
    found = jax.jit(task.loss)(state.parameters, state.frozen, batch, jax.random.key(5))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    before = jax.tree.map(np.asarray, state.parameters)
    after, metrics = jax.jit(program.step(BUCKET))(state, batch)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    moved = {path: not np.array_equal(leaf, nested.flatten(after.parameters)[path])
             for path, leaf in nested.flatten(before).items()}  # fmt: skip
    # The gradient of the first factor is zero as long as the second is; weight decay moves it.
    assert all(moved[path] for path in moved if path.endswith("up"))


def products(jaxpr) -> float:
    """FLOPs of the matrix products of a jaxpr, loops counted as often as they run."""
    total = 0.0
    for one in jaxpr.eqns:
        if one.primitive.name == "dot_general":
            (summed, _), _ = one.params["dimension_numbers"]
            shape = one.invars[0].aval.shape
            total += 2 * math.prod(one.outvars[0].aval.shape) * math.prod(shape[axis] for axis in summed)
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(one.params.values()))]
        times = one.params["length"] if one.primitive.name == "scan" else 1
        total += times * sum(products(part) for part in inner if hasattr(part, "eqns"))
    return total


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_flops_of_a_step_are_those_of_its_program(config, trained):
    """A LoRA saves the gradients of kernels, a third of their FLOPs; attention has its whole backward pass."""
    wide = CONFIG.denoiser.replace(layers=2, heads=4, head_width=16)
    task = (config if trained == "lora" else CONFIG).replace(denoiser=wide, latents="data", vae=None, vae_weights=None)
    bucket = BUCKET.replace(frames=9, height=32, width=32, batch_size=1)
    run = experiment_of(task)
    program = Program.build(run.replace(data=run.data.replace(buckets=(bucket,))), single_device_mesh())
    abstract, flops = program.abstract, step_flops(program.task, bucket)

    def gradient(parameters, frozen, batch, key):
        return jax.grad(lambda chosen: program.task.loss(chosen, frozen, batch, key)[0])(parameters)

    batch = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in program.abstract_batch(bucket).items()}
    jaxpr = jax.make_jaxpr(gradient)(abstract.parameters, abstract.frozen, batch, abstract.key).jaxpr
    # The reference computes the scores again, half a forward pass of attention.
    again = program.task.flops(bucket)["attention"] / 2
    assert products(jaxpr) == pytest.approx(sum(flops.values()) + again, rel=0.01)


def test_dropout_is_for_training(config):
    task = config.replace(lora=BOTH.replace(dropout=0.5)).build()
    parameters = {"lora": jax.tree.map(jnp.asarray, random_parameters(task.networks["lora"]))}
    batch, frozen = batch_of(task), jax.tree.map(jnp.asarray, task.load_frozen())
    loss = jax.jit(lambda batch, key: task.loss(parameters, frozen, batch, key)[0])
    training = {**batch, "step": jnp.zeros(BUCKET.batch_size, jnp.int32)}
    key = jax.random.key(0)
    assert loss(training, key) != pytest.approx(float(loss(batch, key)), rel=1e-4)
    halves = [{name: value[rows] for name, value in training.items()} for rows in (slice(0, 2), slice(2, 4))]
    assert np.mean([loss(half, key) for half in halves]) == pytest.approx(float(loss(training, key)), rel=1e-5)


def test_files_become_runs_and_runs_files(config, tmp_path):
    task = config.build()
    factors = random_parameters(task.networks["lora"])["denoiser"]
    write_lora(tmp_path / "given.safetensors", config.denoiser, factors, 1.0)
    experiment = experiment_of(config.replace(lora=LORA.replace(alpha=None)))
    import_run(tmp_path / "given.safetensors", experiment, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "exported")
    assert f"`{tmp_path / 'given.safetensors'}`, SHA-256" in (tmp_path / "exported" / "README.md").read_text()
    back = read_lora(tmp_path / "exported", config.denoiser).factors
    for path, leaf in nested.flatten(back).items():
        np.testing.assert_array_equal(leaf, nested.flatten(factors)[path], err_msg=path)
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_run(tmp_path / "run", tmp_path / "exported")
    export_run(tmp_path / "run", tmp_path / "whole", merge_lora=True)
    base, merged = (import_folder(folder)[1] for folder in (config.denoiser_weights, tmp_path / "whole" / "denoiser"))
    expected = nested.flatten(lora.merge(jax.tree.map(jnp.asarray, base), factors))
    for path, leaf in nested.flatten(merged).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    export_run(tmp_path / "run", tmp_path / "sat", layout="sat")
    assert read_lora(tmp_path / "sat" / "lora_sat.safetensors", config.denoiser).alpha == 1.0
    for change, message in (
        ({"rank": 3}, "lora.rank = 3, but .* has rank 2"),
        ({"alpha": 1.0}, r"= 0.5, but .* 2 / 2 = 1: set task.lora.alpha=2"),
        ({"targets": ("denoiser/blocks/layers/attention/query",)}, "key: in the file, not in task.lora.targets"),
    ):
        other = experiment_of(config.replace(lora=LORA.replace(**{"alpha": None, **change})))
        with pytest.raises(ConfigError, match=message):
            import_run(tmp_path / "given.safetensors", other, tmp_path / "other")
    plain = experiment_of(CONFIG.replace(vae_weights=config.vae_weights))
    with pytest.raises(ConfigError, match="is a LoRA, and tiny trains none"):
        import_run(tmp_path / "given.safetensors", plain, tmp_path / "other")
    with pytest.raises(ConfigError, match="trains a LoRA alone"):
        import_run(Path(config.denoiser_weights), experiment, tmp_path / "other")


def test_adapters_of_two_networks_are_two_files(config, weights, tmp_path):
    config = config.replace(lora=BOTH.replace(alpha=None))
    task, experiment = config.build(), experiment_of(config)
    configs = {name: base.config for name, base in task.base_networks.items()}
    factors = random_parameters(task.networks["lora"])
    write_adapters(tmp_path / "given", configs, factors, 1.0)
    import_run(tmp_path / "given", experiment, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "exported")
    assert (tmp_path / "exported" / "text_encoder" / "adapter_config.json").is_file()
    back = {name: found.factors for name, found in read_adapters(tmp_path / "exported", configs).items()}
    for path, leaf in nested.flatten(factors).items():
        np.testing.assert_array_equal(nested.flatten(back)[path], leaf, err_msg=path)
    export_run(tmp_path / "run", tmp_path / "whole", merge_lora=True)
    for name in weights:
        expected = nested.flatten(lora.merge(jax.tree.map(jnp.asarray, weights[name]), factors[name]))
        for path, leaf in nested.flatten(import_folder(tmp_path / "whole" / name)[1]).items():
            np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    file = tmp_path / "given" / "text_encoder" / "adapter_model.safetensors"
    with pytest.raises(ConfigError, match="  denoiser/.*/query: in task.lora.targets, not in the file"):
        import_run(file, experiment, tmp_path / "other")
    with pytest.raises(ExportError, match="SAT has a LoRA for attention only, that of a denoiser"):
        export_run(tmp_path / "run", tmp_path / "sat", layout="sat")


@pytest.mark.parametrize(
    ("header", "alphas", "found"),
    [
        ({}, {}, 2.0),
        ({"lora_alpha": 3}, {}, 3.0),
        ({"lora_alpha": 3, "use_rslora": True}, {}, 3.0 * 2**0.5),
        ({}, {"to_q": 3.0, "to_k": 3.0, "to_v": 3.0, "to_out.0": 3.0}, 3.0),
        ({}, {"to_q": 3.0}, r"alphas \[2.0, 3.0\]"),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 1}}, {}, r"alphas \[1, 3.0\]"),
        ({"lora_alpha": 3, "use_dora": True}, {}, "DoRA"),
    ],
)
def test_what_a_file_says_of_its_scale(config, header, alphas, found, tmp_path):
    """Header of peft, or a tensor for each layer; without either alpha is the rank."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    factors = random_parameters(config.build().networks["lora"])["denoiser"]
    written = SafetensorsFile(write_lora(tmp_path / "plain.safetensors", config.denoiser, factors, 1.0))
    tensors = {name: written[name] for name in written}
    stem = "transformer.transformer_blocks.0.attn1"
    tensors |= {f"{stem}.{layer}.alpha": np.float32([alpha]) for layer, alpha in alphas.items()}
    values = {f"transformer.{name}": value for name, value in header.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(values)} if header else None)
    if isinstance(found, str):
        with pytest.raises(WeightError, match=found):
            read_lora(tmp_path / "x.safetensors", config.denoiser)
    else:
        assert read_lora(tmp_path / "x.safetensors", config.denoiser).scale == pytest.approx(found / 2)


def test_a_file_of_some_blocks_has_zeros_for_the_others(config, tmp_path):
    """As peft's layers_to_transform=[1] writes it, also by the names of older files."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    factors = random_parameters(config.build().networks["lora"])["denoiser"]
    deep = config.denoiser.replace(layers=2)
    written = SafetensorsFile(write_lora(tmp_path / "one.safetensors", config.denoiser, factors, 1.0))
    moved = {name.replace("blocks.0.", "blocks.1."): written[name] for name in written}
    save_file(moved, tmp_path / "second.safetensors")
    old = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for name, value in moved.items()}
    save_file(old, tmp_path / "old.safetensors")
    for name in ("second", "old"):
        file = tmp_path / f"{name}.safetensors"
        assert is_lora(file)
        found = read_lora(file, deep)
        assert set(found.absent.values()) == {(0,)} and set(found.absent) == set(lora.pairs(factors))
        for path, leaf in nested.flatten(found.factors).items():
            np.testing.assert_array_equal(leaf[1], nested.flatten(factors)[path][0])
            assert not leaf[0].any()
    with pytest.raises(WeightError, match="is no LoRA adapter"):
        read_lora(tmp_path / "second.safetensors", config.denoiser)
    lone = next(name for name in moved if "lora_B" in name)
    save_file({name: value for name, value in moved.items() if name != lone}, tmp_path / "lone.safetensors")
    with pytest.raises(WeightError, match="1 missing"):
        read_lora(tmp_path / "lone.safetensors", deep)
    folder = export_network(deep, random_parameters(format_of(deep).network(deep)), tmp_path / "deep")
    experiment = experiment_of(config.replace(denoiser=deep, denoiser_weights=str(folder), lora=LoraConfig(rank=2)))
    with pytest.raises(ConfigError, match="some blocks only(.|\n)*denoiser/blocks/layers/attention/key: blocks 0"):
        import_run(tmp_path / "second.safetensors", experiment, tmp_path / "run")


def test_adapters_in_sampling_are_merged_or_apart(weights):
    """With other ranks than a run's, on the devices; the prediction is the same."""
    task, placement = CONFIG.build(), Placement.of(1, jnp.float32, jax.devices()[:1])
    network = task.denoiser_network
    layers = lora.targets(LoraConfig(targets=("denoiser/blocks/",)), {"denoiser": network})
    shapes = Network.of(lambda rngs: lora.Factors(layers, rank=3, rngs=rngs))
    factors = random_parameters(shapes)["denoiser"]
    adapter = lora.combined([(factors, 0.5), (factors, -0.2)])
    parameters = jax.tree.map(jnp.asarray, weights["denoiser"])
    noisy, text = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 4)), jnp.ones((1, 6, 8))
    denoise = jax.jit(lambda parameters: task.denoise(parameters, noisy, jnp.array([500.0]), text))
    alone = denoise({"denoiser": parameters})
    apart = denoise({"denoiser": parameters, "lora": {"denoiser": placement.replicate(adapter)}})
    merged = denoise({"denoiser": placement.merge(parameters, adapter)})
    np.testing.assert_allclose(apart, merged, atol=2e-5)
    assert np.abs(apart - alone).max() > 1e-2


def test_adapters_of_the_text_encoder_are_merged_or_apart(weights, config):
    task = config.replace(lora=BOTH).build()
    factors = jax.tree.map(jnp.asarray, random_parameters(task.networks["lora"]))
    frozen, captions = jax.tree.map(jnp.asarray, weights), task.tokens(["a red ball", "blue"])
    embed = jax.jit(lambda parameters: task.text_embeddings(parameters, frozen, captions))
    alone, apart = embed({}), embed({"lora": factors})
    merged = embed({"text_encoder": lora.whole("text_encoder", {**frozen, "lora": factors}, BOTH)})
    np.testing.assert_allclose(apart, merged, atol=2e-5)
    assert np.abs(apart - alone).max() > 1e-2


def test_the_scale_of_an_adapter_on_the_command_line(tmp_path):
    (tmp_path / "a:b.safetensors").touch()
    assert lora_argument(f"{tmp_path}/x.safetensors:0.8") == (tmp_path / "x.safetensors", 0.8)
    assert lora_argument(f"{tmp_path}/x.safetensors") == (tmp_path / "x.safetensors", 1.0)
    assert lora_argument(f"{tmp_path}/a:b.safetensors") == (tmp_path / "a:b.safetensors", 1.0)
    for scale in ("much", "nan", "1e9"):
        with pytest.raises(ValueError, match=f"--lora .*{scale!r} is no scale"):
            lora_argument(f"{tmp_path}/x.safetensors:{scale}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, "nothing of the denoiser would be trained"),
        ({"lora": LoraConfig(rank=0)}, "rank"),
        ({"lora": LoraConfig(alpha=0.0)}, "alpha"),
    ],
)
def test_mistakes_of_a_config(config, change, message):
    with pytest.raises(ValueError, match=message):
        validate_tree(config.replace(**change))


def test_mistakes_of_files_and_targets(config):
    for field in ("denoiser_weights", "text_encoder_weights"):
        with pytest.raises(ValueError, match=f"task.{field} = none: a LoRA leaves this network as it is"):
            config.replace(**{field: None}).check_weights()
    with pytest.raises(ValueError, match="holds another network(.|\n)*layers: 1 in the weights, 2 in the run"):
        config.replace(denoiser=config.denoiser.replace(layers=2)).check_weights()
    with pytest.raises(ConfigError, match="is in vae, which stays as it is"):
        config.replace(lora=LoraConfig(targets=("vae/",))).build()
    cached = TextConfig(encoder=T5Config(width=8, layers=1), length=6, embeddings="data")
    with pytest.raises(ConfigError, match="is in text_encoder, which the step does not run, because task.text.embed"):
        config.replace(text=cached, text_encoder_weights=None, lora=BOTH).build()
    digest = config.build().frozen_digest()
    assert len(digest.split("+")) == 3
    assert config.replace(denoiser_weights=config.text_encoder_weights).build().frozen_digest() != digest
