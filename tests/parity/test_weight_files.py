"""Which files of a folder are read: variants, shards and whole files, as diffusers and transformers read them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jvgen.cli.main import main
from jvgen.interop import verify
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import check_weights, import_folder, read_config, with_variant
from jvgen.interop.weights_names import variant_of
from jvgen.tasks.pipeline_folder import pipeline_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def vae(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip


def t5(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


MODELS = {"diffusers": vae, "transformers": t5}
SHARDS = {"whole": {}, "shards": {"max_shard_size": "6KB"}}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """What we read, by the names of the original."""
    config, parameters = import_folder(path)
    return dict(format_of(config).weight_map(config).to_torch(parameters))


def assert_read_as_theirs(path: Path, theirs: torch.nn.Module) -> None:
    state = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    for name, array in tensors(path).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.parametrize("sizes", SHARDS)
@pytest.mark.parametrize("library", MODELS)
def test_variants(library, sizes, tmp_path):
    """Two variants in one folder, and nothing without: each is read as by the library."""
    folder = tmp_path / "network"
    for seed, (variant, dtype) in enumerate({"fp16": torch.float16, "bf16": torch.bfloat16}.items()):
        MODELS[library](seed).to(dtype).save_pretrained(folder, variant=variant, **SHARDS[sizes])
    if sizes == "shards":
        assert len(list(folder.glob("*.safetensors"))) >= 4
    kind = type(MODELS[library](0))
    for variant in ("fp16", "bf16"):
        file = with_variant(folder, variant)
        assert variant_of(file.name) == variant and file.parent == folder
        assert read_config(file) == read_config(folder)
        check_weights(file)
        assert_read_as_theirs(file, kind.from_pretrained(folder, variant=variant, torch_dtype=torch.float32))
    assert any(not np.array_equal(a, b) for a, b in zip(
        tensors(with_variant(folder, "fp16")).values(), tensors(with_variant(folder, "bf16")).values(), strict=True
    ))  # fmt: skip
    named = r"has no weights: expected .*It has the variants bf16, fp16: give --variant bf16, or the file .*bf16\."
    with pytest.raises(ValueError, match=named):
        import_folder(folder)
    with pytest.raises(ValueError, match="no weights of the variant 'fp8': .*variants bf16, fp16"):
        with_variant(folder, "fp8")


@pytest.mark.parametrize("library", MODELS)
def test_a_whole_file_beside_an_index(library, tmp_path):
    """diffusers reads the index's shards, transformers the whole file."""
    make = MODELS[library]
    make(0).save_pretrained(tmp_path / "both", max_shard_size="6KB")
    make(1).save_pretrained(tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "both")
    assert_read_as_theirs(tmp_path / "both", type(make(0)).from_pretrained(tmp_path / "both"))


@pytest.mark.parametrize("library", MODELS)
def test_safetensors_before_pickles(library, tmp_path):
    make = MODELS[library]
    make(0).save_pretrained(tmp_path / "both")
    name = {"diffusers": "diffusion_pytorch_model.bin", "transformers": "pytorch_model.bin"}[library]
    torch.save(make(1).state_dict(), tmp_path / "both" / name)
    assert_read_as_theirs(tmp_path / "both", type(make(0)).from_pretrained(tmp_path / "both"))


def test_mistakes_about_variants(tmp_path):
    vae(0).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="It has weights without variants: leave --variant out"):
        with_variant(tmp_path / "plain", "fp16")
    with pytest.raises(ValueError, match="--variant fp16: .*nowhere is not a folder with config.json"):
        with_variant(tmp_path / "nowhere", "fp16")
    assert with_variant(tmp_path / "plain", None) == tmp_path / "plain"


def test_networks_of_a_pipeline_without_the_variant_are_read_without_it(tmp_path):
    """As `CogVideoXPipeline.from_pretrained(variant=...)` does; a variant that no network has is an error."""
    vae(0).save_pretrained(tmp_path / "vae", variant="fp16")
    vae(0).save_pretrained(tmp_path / "transformer")
    t5(0).save_pretrained(tmp_path / "text_encoder", variant="fp16", max_shard_size="6KB")
    found = pipeline_weights(tmp_path, "fp16")
    assert {name: path.name for name, path in found.items()} == {
        "transformer": "transformer",
        "vae": "diffusion_pytorch_model.fp16.safetensors",
        "text_encoder": "model.safetensors.index.fp16.json",
    }
    with pytest.raises(ValueError, match="no weights of the variant 'bf16'"):
        pipeline_weights(tmp_path, "bf16")


def test_a_variant_is_verified_with_the_library(tmp_path, capsys):
    vae(0).half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert main(["verify", str(tmp_path / "vae"), "--variant", "fp16"]) == 0
    assert "AutoencoderKL loads strictly" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "vae")]) == 2
    assert "give --variant fp16" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_tolerances_that_are_none(tolerance, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["verify", "nowhere", f"--tolerance={tolerance}"])
    assert refused.value.code == 2
    assert "tolerance" in capsys.readouterr().err


def test_outputs_that_are_not_numbers_do_not_pass(tmp_path, monkeypatch, capsys):
    vae(0).save_pretrained(tmp_path / "vae")
    report = verify.Report("AutoencoderKL", {"moments": 0.0, "decoded": float("nan"), "x": 1e-9}, dict.fromkeys("x", 1))
    assert np.isnan(report.max_abs_error)
    monkeypatch.setattr(verify.Report, "__str__", lambda self: "")
    monkeypatch.setattr(verify, "verify", lambda *arguments: report)
    assert main(["verify", str(tmp_path / "vae")]) == 1


def test_quantized_weights_are_named(tmp_path):
    """bitsandbytes' config, with integers that would be read as values up to 127."""
    from safetensors.torch import load_file, save_file

    vae(0).save_pretrained(tmp_path / "vae")
    file, described = tmp_path / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae/config.json"
    state = load_file(file)
    name = "encoder.conv_in.weight"
    save_file(state | {name: (state[name] * 100).to(torch.int8)}, file)
    with pytest.raises(ValueError, match=f"(?s)1 without floating-point numbers.*{name}: int8"):
        import_folder(tmp_path / "vae")
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    described.write_text(json.dumps(json.loads(described.read_text()) | {"quantization_config": quantization}))
    for read in (read_config, import_folder, check_weights):
        with pytest.raises(ValueError, match=r"config.json: quantization_config .* bitsandbytes \(load_in_8bit\).*Deq"):
            read(tmp_path / "vae")


def test_narrow_floats_are_read_as_torch_reads_them(tmp_path):
    from safetensors.torch import load_file, save_file

    vae(0).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64)
    state = {name: tensor.to(kinds[i % 5]) for i, (name, tensor) in enumerate(load_file(file).items())}
    save_file(state, file)
    from_safetensors = tensors(tmp_path / "vae")
    file.unlink()
    torch.save(state, tmp_path / "vae/diffusion_pytorch_model.bin")
    from_pickle = tensors(tmp_path / "vae")
    for name, tensor in state.items():
        np.testing.assert_array_equal(from_safetensors[name], tensor.float().numpy())
        np.testing.assert_array_equal(from_pickle[name], tensor.float().numpy())


ADAPTERS = {
    "diffusers": "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "peft": "base_model.model.blocks.0.to_q.lora_B.default.weight",
    "kohya": "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "SAT": "model.diffusion_model.transformer.layers.0.attention.query_key_value.original.matrix_A.0",
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_adapters_are_named(kind, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({ADAPTERS[kind]: torch.zeros(2, 3)}, file)
    vae(0).save_pretrained(tmp_path / "vae")
    config = read_config(tmp_path / "vae")
    readers = {
        "import FILE": lambda: import_folder(file),
        "import FOLDER": lambda: import_folder(tmp_path),
        "import FILE --config": lambda: import_folder(file, config),
    }
    for read in readers.values():
        said = "not among those that jvgen reads" if kind == "kohya" else "--lora FILE"
        with pytest.raises(ValueError, match=f"is a LoRA adapter .* {said}"):
            read()
