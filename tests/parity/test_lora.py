"""LoRA files against diffusers and peft, and against SAT's formula: read, written, sampled with, imported, exported."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import nested
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder
from jvgen.interop.lora_file import read_lora, write_lora
from jvgen.interop.safetensors_file import SafetensorsFile
from jvgen.interop.to_torch import ExportError, export_network
from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.model import VideoDiT
from jvgen.models.weight_map import WeightError
from jvgen.nn import lora
from jvgen.nn.network import Network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilations", "one_device")]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "norm1.linear", "ff.net.0.proj", "ff.net.2", "proj", "text_proj", "proj_out", "linear_1")
PATCHES = {"one frame": {}, "two frames": {"patch_size_t": 2, "patch_bias": False}}


def transformer(layers: int = 2, **options) -> "diffusers.CogVideoXTransformer3DModel":
    torch.manual_seed(0)
    made = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        num_layers=layers, text_embed_dim=16, max_text_seq_length=5, sample_width=6, sample_height=4, sample_frames=13,
        use_rotary_positional_embeddings=bool(options), **options,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return made


def pipeline(made) -> "diffusers.CogVideoXPipeline":
    return diffusers.CogVideoXPipeline(None, None, None, made, diffusers.CogVideoXDDIMScheduler())


def with_adapter(made, targets, *, rank: int = 2, alpha: int = 3, seed: int = 1):
    made.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return made


def saved(made, folder: Path) -> Path:
    metadata = diffusers.training_utils._collate_lora_metadata({"transformer": made})
    layers = peft.get_peft_model_state_dict(made)
    diffusers.CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def inputs(made) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    frames = 4
    return {
        "hidden_states": rng.standard_normal((1, frames, 4, 4, 6), np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 5, 16), np.float32),
        "timestep": np.array([300]),
    }


def theirs(made, given) -> np.ndarray:
    options = {}
    if made.config.use_rotary_positional_embeddings:
        options["image_rotary_emb"] = pipeline(made)._prepare_rotary_positional_embeddings(
            32, 48, given["hidden_states"].shape[1], torch.device("cpu")
        )
    with torch.no_grad():
        return made(**{name: torch.from_numpy(value) for name, value in given.items()}, **options).sample.numpy()


def ours(config, parameters, factors, scale, given) -> np.ndarray:
    network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    arrays = [
        jnp.asarray(given["hidden_states"].transpose(0, 1, 3, 4, 2)), jnp.asarray(given["encoder_hidden_states"]),
        jnp.asarray(given["timestep"], jnp.float32),
    ]  # fmt: skip
    run = jax.jit(lambda parameters, factors: lora.apply(network, parameters, factors, *arrays, scale=scale))
    return np.asarray(run(parameters, factors)).transpose(0, 1, 4, 2, 3)


@pytest.fixture(scope="module", params=PATCHES)
def base(request, tmp_path_factory):
    """Options, configuration and parameters of a transformer without an adapter."""
    options, folder = PATCHES[request.param], tmp_path_factory.mktemp("base")
    transformer(**options).save_pretrained(folder)
    return options, *import_folder(folder)


@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
def test_an_adapter_of_diffusers_gives_equal_outputs(base, targets, tmp_path):
    options, config, parameters = base
    adapted = with_adapter(transformer(**options), targets)
    found = read_lora(saved(adapted, tmp_path), config)
    assert (found.rank, found.alpha) == (2, 3.0)
    given = inputs(adapted)
    made = ours(config, parameters, found.factors, found.scale, given)
    np.testing.assert_allclose(made, theirs(adapted, given), atol=1e-4)
    assert np.abs(made - theirs(transformer(**options), given)).max() > 1e-2


@pytest.mark.parametrize("pattern", ["blocks/layers/attention/(query|key|value|output)$", ""], ids=["attention", "all"])
def test_diffusers_loads_ours_strictly(base, pattern, tmp_path, caplog):
    options, config, parameters = base
    network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
    layers = lora.targets(lora.LoraConfig(targets=(f"d/{pattern}",)), {"d": network})
    layers = {path.removeprefix("d/"): found for path, found in layers.items()}
    rng = np.random.default_rng(0)
    factors = nested.map_with_path(
        lambda _, leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
        Network.of(lambda rngs: lora.Factors(layers, rank=3, rngs=rngs)).shapes,
    )
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", config, factors, 0.5)
    made = transformer(**options)
    with caplog.at_level("WARNING"):
        pipeline(made).load_lora_weights(tmp_path)
    assert not [record for record in caplog.records if "key" in record.getMessage().lower()]
    stacked = sum(config.layers if path.startswith("blocks/") else 1 for path in layers)
    assert sum(name.endswith("lora_A") for name, _ in made.named_modules()) == stacked
    given = inputs(made)
    np.testing.assert_allclose(theirs(made, given), ours(config, parameters, factors, 0.5, given), atol=1e-4)
    back = read_lora(tmp_path, config)
    assert back.scale == 1.0
    for path, leaf in nested.flatten(back.factors).items():
        factor = 0.5 if path.endswith("up") else 1.0
        np.testing.assert_array_equal(leaf, nested.flatten(factors)[path] * np.float32(factor))


def t5() -> tuple:
    config = T5Config(vocabulary=16, width=8, layers=2, heads=2, head_width=4, hidden=12)
    return config, transformers.T5EncoderModel, lambda model, ids: model(input_ids=ids).last_hidden_state


def llama() -> tuple:
    config = FrameTransformerConfig(vocabulary=16, width=8, layers=2, heads=2, hidden=12, max_positions=64)
    return config, transformers.LlamaForCausalLM, lambda model, ids: model.model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("network", [t5, llama], ids=["T5", "Llama"])
def test_peft_loads_ours_strictly(network, tmp_path, recwarn):
    """The adapter of a text encoder or a world model's transformer, with all of its layers, and one made by peft."""
    config, model_class, run = network()
    form, rng = format_of(config), np.random.default_rng(0)
    structure = form.network(config)
    layers = lora.targets(lora.LoraConfig(targets=("n/",)), {"n": structure})
    layers = {path.removeprefix("n/"): found for path, found in layers.items()}
    parameters, factors = (
        jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
        for shapes in (structure.shapes, Network.of(lambda rngs: lora.Factors(layers, rank=3, rngs=rngs)).shapes)
    )
    export_network(config, parameters, tmp_path / "base")
    write_lora(tmp_path / "ours" / "adapter_model.safetensors", config, factors, 0.5)
    ids = np.array([[1, 5, 2, 0]])
    ours = jax.jit(
        lambda factors, scale: lora.apply(structure, parameters, factors, jnp.asarray(ids), scale=scale),
        static_argnums=1,
    )
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "ours")
        assert sum(name.endswith("lora_A") for name, _ in adapted.named_modules()) == sum(
            config.layers if path.startswith("blocks/") else 1 for path in layers
        )
        theirs = run(adapted.base_model.model.eval(), torch.from_numpy(ids)).numpy()
    assert not [warning for warning in recwarn if "key" in str(warning.message)]
    np.testing.assert_allclose(ours(factors, 0.5), theirs, atol=1e-4)
    assert np.abs(ours(factors, 0.0) - theirs).max() > 1e-2

    made = peft.get_peft_model(
        model_class.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q", "v", "q_proj", "down_proj"]),
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        theirs = run(made.base_model.model, torch.from_numpy(ids)).numpy()
    made.save_pretrained(tmp_path / "theirs")
    found = read_lora(tmp_path / "theirs", config)
    assert (found.rank, found.alpha) == (2, 3.0)
    np.testing.assert_allclose(ours(found.factors, found.scale), theirs, atol=1e-4)


def test_sats_adapters(base, tmp_path):
    """A checkpoint with matrices for each of queries, keys and values, whose updates SAT divides by the rank."""
    from safetensors.numpy import save_file

    _, config, _ = base
    rng, stem, width, rank = np.random.default_rng(0), "model.diffusion_model.transformer.layers", config.width, 4
    tensors = {f"{stem}.0.attention.query_key_value.original.weight": np.zeros((3 * width, width), np.float32)}
    for layer in range(config.layers):
        for module, count in (("query_key_value", 3), ("dense", 1)):
            for number in range(count):
                name = f"{stem}.{layer}.attention.{module}.matrix"
                tensors[f"{name}_A.{number}"] = rng.standard_normal((rank, width), np.float32)
                tensors[f"{name}_B.{number}"] = rng.standard_normal((width, rank), np.float32)
    save_file(tensors, tmp_path / "sat.safetensors")
    found = read_lora(tmp_path / "sat.safetensors", config)
    assert found.scale == 1 / rank
    kernels = {f"{path}/kernel": jnp.zeros((config.layers, width, width)) for path in lora.pairs(found.factors)}
    merged = nested.flatten(lora.merge(nested.unflatten(kernels), found.factors, found.scale))
    for name, module, number in (("key", "query_key_value", 1), ("output", "dense", 0)):
        down, up = (tensors[f"{stem}.1.attention.{module}.matrix_{letter}.{number}"] for letter in "AB")
        expected = (down.T @ up.T) / rank
        np.testing.assert_allclose(merged[f"blocks/layers/attention/{name}/kernel"][1], expected, atol=1e-5)
    write_lora(tmp_path / "again.safetensors", config, found.factors, found.scale, layout="sat")
    written = SafetensorsFile(tmp_path / "again.safetensors")
    assert set(written) == {name for name in tensors if "matrix" in name}
    assert all(np.allclose(written[name], tensors[name], rtol=1e-6) for name in written)


def test_what_is_no_adapter_of_the_network_is_refused(base, tmp_path):
    from safetensors.numpy import save_file

    options, config, _ = base
    deeper = saved(with_adapter(transformer(layers=3, **options), ATTENTION), tmp_path / "deeper")
    with pytest.raises(WeightError, match=r"another network(.|\n)*not expected(.|\n)*transformer_blocks\.2\.attn1"):
        read_lora(deeper, config)
    with pytest.raises(WeightError, match=r"another network(.|\n)*wrongly shaped(.|\n)*transformer_blocks\.0\.attn1"):
        read_lora(deeper, config.replace(layers=3, heads=3))
    tensors = {name: SafetensorsFile(deeper)[name] for name in SafetensorsFile(deeper)}
    some = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {some: tensors[some][:1]}, tmp_path / "ranks.safetensors")
    with pytest.raises(WeightError, match=r"ranks \[1, 2\]"):
        read_lora(tmp_path / "ranks.safetensors", config.replace(layers=3))
    save_file({"x.weight": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightError, match="is no LoRA adapter"):
        read_lora(tmp_path / "other.safetensors", config)
    with pytest.raises(ValueError, match="no such file"):
        read_lora(tmp_path / "missing.safetensors", config)
    everywhere = read_lora(saved(with_adapter(transformer(**options), EVERYWHERE), tmp_path / "all"), config)
    with pytest.raises(ExportError, match="SAT has a LoRA for attention only"):
        write_lora(tmp_path / "sat.safetensors", config, everywhere.factors, 1.0, layout="sat")
