"""Export and import: files are what diffusers reads; writes are atomic; unsafe and corrupt files are refused."""

import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jvgen.config import Config
from jvgen.finite import NotFinite
from jvgen.interop import formats, to_torch
from jvgen.interop.architecture import check_architecture, differences
from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.from_torch import import_folder, read_config
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.interop.sat_file import export_sat
from jvgen.interop.to_torch import ExportError, export_network, export_networks
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.video_dit.config import AggregationConfig, Positions, VideoDiTConfig
from jvgen.models.weight_map import WeightError
from jvgen.nested import flatten, unflatten
from jvgen.nn.rope import RotaryGrid

EXPORTED = ["config.json", "diffusion_pytorch_model.safetensors", DIGESTS_FILE]
VAE = ImageVAEConfig(block_channels=(4, 8), layers_per_block=1, groups=4, sample_size=8)


def random_parameters(config: Config, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = flatten(formats.format_of(config).network(config).shapes)
    return unflatten({path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()})


@pytest.fixture(scope="module")
def parameters() -> dict:
    return random_parameters(VAE)


def foreign(folder: Path) -> Path:
    """An exported folder without digests, as other libraries write it: its files may be changed."""
    (folder / DIGESTS_FILE).unlink()
    return folder


def assert_equal(left: dict, right: dict) -> None:
    left, right = flatten(left), flatten(right)
    assert list(left) == list(right)
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def contents(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_export_import_round_trip(tmp_path, parameters):
    folder = export_network(VAE, parameters, tmp_path / "vae")
    assert contents(tmp_path) == [f"vae/{name}" for name in EXPORTED]
    config, again = import_folder(folder)
    assert config == VAE
    assert_equal(again, parameters)
    single, also = import_folder(folder / "diffusion_pytorch_model.safetensors", VAE)
    assert single == VAE
    assert_equal(also, parameters)


def test_shards_and_their_index(tmp_path, parameters):
    folder = export_network(VAE, parameters, tmp_path / "vae", shard_bytes=4000)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        file = SafetensorsFile(folder / shard)
        assert len(file) == 1 or sum(file[name].nbytes for name in file) <= 4000
    assert index["metadata"]["total_size"] == 4 * sum(array.size for array in flatten(parameters).values())
    assert_equal(import_folder(folder)[1], parameters)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(tmp_path, parameters, dtype):
    folder = export_network(VAE, parameters, tmp_path / "vae", dtype=dtype)
    rounded = {path: array.astype(to_torch.FILE_DTYPES[dtype]) for path, array in flatten(parameters).items()}
    again = flatten(import_folder(folder)[1])
    assert all(again[path].dtype == np.float32 and np.array_equal(again[path], rounded[path]) for path in rounded)
    with pytest.raises(ExportError, match="dtype = 'float64'"):
        export_network(VAE, parameters, tmp_path / "other", dtype="float64")


GATED = VideoDiTConfig(
    layers=2, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=8,
    aggregation=AggregationConfig(),
)  # fmt: skip
# What is written, the parameter whose last value is changed, to what, and how the error starts.
OUT_OF_RANGE = {
    "past float16": (
        "folder",
        "blocks/layers/feed_forward/",
        7e4,
        "float16",
        "reaches 70000, but float16 ends at 65504",
    ),
    "past bfloat16": ("folder", "blocks/layers/feed_forward/", 3.4e38, "bfloat16", "but bfloat16 ends at 3.38953e+38"),
    "NaN": ("folder", "blocks/layers/feed_forward/", np.nan, "float32", "holds NaN or infinity"),
    "extra weights": ("folder", "aggregation/gates", 7e4, "float16", "reaches 70000, but float16"),
    "SAT": ("sat", "blocks/layers/feed_forward/", -7e4, "float16", "reaches 70000, but float16"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_that_the_dtype_of_a_file_cannot_hold_are_an_error(tmp_path, name):
    layout, chosen, value, dtype, said = OUT_OF_RANGE[name]
    leaves = {path: np.array(array) for path, array in flatten(random_parameters(GATED)).items()}
    path = next(path for path in sorted(leaves) if path.startswith(chosen))
    leaves[path].reshape(-1)[-1] = value
    damaged = unflatten(leaves)
    with pytest.raises(NotFinite) as error:
        if layout == "sat":
            export_sat(GATED, damaged, tmp_path / "denoiser.safetensors", dtype=dtype)
        else:
            export_network(GATED, damaged, tmp_path / "denoiser", dtype=dtype)
    assert said in str(error.value)
    # The name is that in the file, and nothing is left.
    assert re.match(r"\S*(blocks|layers|gating)\S*", str(error.value)), str(error.value)
    assert contents(tmp_path) == []


def test_files_are_those_of_the_safetensors_library(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 5)), "b.c": np.arange(7), "scalar": np.array(3.0)}
    arrays["empty"] = np.zeros((0, 2), np.float32)
    write(tmp_path / "ours", {n: TensorSpec(a.shape, a.dtype) for n, a in arrays.items()}, arrays.items())
    theirs = numpy_files.load_file(tmp_path / "ours")
    numpy_files.save_file(arrays, tmp_path / "theirs")
    ours = SafetensorsFile(tmp_path / "theirs")
    assert set(theirs) == set(ours) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], array)
        assert ours[name].dtype == array.dtype and ours.shape(name) == array.shape


def test_several_networks_have_a_subfolder_each(tmp_path, parameters):
    text = ByteTextConfig(width=16, layers=2, heads=2)
    text_parameters = random_parameters(text)
    folder = export_networks(
        {"vae": VAE, "text_encoder": text},
        {"vae": parameters, "text_encoder": text_parameters},
        tmp_path / "run",
        files={"scheduler/scheduler_config.json": "{}\n"},
    )
    assert json.loads((folder / "model_index.json").read_text()) == {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["jvgen", "ByteTextEncoder"],
    }
    assert (folder / "scheduler/scheduler_config.json").read_text() == "{}\n"
    config, again = import_folder(folder / "text_encoder")
    assert config.width == 16
    assert_equal(again, text_parameters)
    with pytest.raises(ValueError, match="no config.json.*give one of: text_encoder, vae"):
        import_folder(folder)


def test_an_existing_folder_is_kept_without_overwrite(tmp_path, parameters):
    folder = export_network(VAE, parameters, tmp_path / "vae")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_network(VAE, parameters, folder)
    other = random_parameters(VAE, seed=1)
    export_network(VAE, other, folder, overwrite=True)
    assert_equal(import_folder(folder)[1], other)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        export_network(VAE, parameters, tmp_path / "file")


def test_full_disk_is_reported_before_writing(tmp_path, parameters, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ExportError, match="too full: the export needs .* MB and 0.0 MB are free. Nothing was written"):
        export_network(VAE, parameters, tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_exports_left_is_removed(tmp_path, parameters, capsys):
    """That of living processes, of other hosts and of other exports stays."""
    with subprocess.Popen(["true"]) as dead:
        pass
    host = socket.gethostname()
    names = [f".vae.partial-{host}-{dead.pid}", f".vae.partial-{host}-{os.getppid()}", f".vae.partial-far-{dead.pid}",
             f".vae2.partial-{host}-{dead.pid}"]  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    export_network(VAE, parameters, tmp_path / "vae")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "vae"])
    assert f"removed {tmp_path / names[0]}, which an export that was killed" in capsys.readouterr().out


def test_links_are_followed_and_stay(tmp_path, parameters):
    (tmp_path / "disk" / "there").mkdir(parents=True)
    for target in ("there", "dangling"):
        link = tmp_path / f"to_{target}"
        link.symlink_to(tmp_path / "disk" / target)
        export_network(VAE, parameters, link)
        assert link.is_symlink() and contents(tmp_path / "disk" / target) == EXPORTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "to_dangling", "to_there"]


def test_folders_that_cannot_be_replaced_are_refused_before_writing(tmp_path, parameters, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="is the working directory.*give one in it, .*/export"):
        export_network(VAE, parameters, ".")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(to_torch, "_mount_points", lambda: {str(tmp_path / "mounted")})
    with pytest.raises(ExportError, match="mounted is a mount point"):
        export_network(VAE, parameters, "mounted")
    assert [path.name for path in tmp_path.rglob("*")] == ["mounted"]


@pytest.mark.parametrize("exists", [False, True])
def test_failed_write_changes_nothing(tmp_path, parameters, exists):
    other = random_parameters(VAE, seed=1)
    if exists:
        export_network(VAE, other, tmp_path / "vae")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(ExportError, match="writing .*vae failed: File too large. Nothing of the export is left"):
            export_network(VAE, parameters, tmp_path / "vae", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == (["vae"] if exists else [])
    if exists:
        assert_equal(import_folder(tmp_path / "vae")[1], other)


def test_weights_of_another_network_are_listed(tmp_path, parameters):
    folder = foreign(export_network(VAE, parameters, tmp_path / "vae"))
    values = json.loads((folder / "config.json").read_text())
    values |= {"latent_channels": 3, "use_quant_conv": False, "use_post_quant_conv": False}
    (folder / "config.json").write_text(json.dumps(values))
    message = "(?s)vae as AutoencoderKL.*4 not expected:.*post_quant_conv.bias.*3 wrongly shaped"
    with pytest.raises(WeightError, match=message):
        import_folder(folder)
    with pytest.raises(WeightError, match="parameters and weight table disagree"):
        export_network(VAE.replace(quant_convolutions=False), parameters, tmp_path / "other")
    assert contents(tmp_path) == [f"vae/{name}" for name in EXPORTED[:2]]


def test_shards_outside_the_folder_are_refused(tmp_path, parameters):
    folder = foreign(export_network(VAE, parameters, tmp_path / "vae", shard_bytes=20000))
    outside = export_network(VAE, parameters, tmp_path / "outside") / "diffusion_pytorch_model.safetensors"
    index_path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for evil in ("../outside/diffusion_pytorch_model.safetensors", str(outside), "..", "a\\b", "sub/x.safetensors"):
        index["weight_map"]["decoder.conv_in.bias"] = evil
        index_path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="give plain file names in the same folder"):
            import_folder(folder)
    index["weight_map"]["decoder.conv_in.bias"] = "absent.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="absent.safetensors.*does not exist"):
        import_folder(folder)


def test_corrupt_files_are_named(tmp_path, parameters):
    folder = foreign(export_network(VAE, parameters, tmp_path / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damages = {
        whole[:-1]: "truncated",
        whole[:5]: "header of",
        b"\xff" * 64: "header of",
        whole[:8] + b"x" * header + whole[8 + header :]: "not JSON",
        whole.replace(b'"F32"', b'"F99"', 1): "cannot be read",
        whole.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1): "has shape",
    }
    for damaged, message in damages.items():
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"vae/diffusion_pytorch_model.safetensors is not a valid .*{message}"):
            import_folder(folder)


def test_mistakes_get_one_message(tmp_path, parameters):
    with pytest.raises(ValueError, match="no such file"):
        import_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no config.json"):
        import_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        import_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="class UNet2DConditionModel, which has no counterpart.*AutoencoderKL"):
        import_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 4}))
    with pytest.raises(ValueError, match="has no weights: expected diffusion_pytorch_model.safetensors"):
        import_folder(tmp_path)
    (tmp_path / "weights.h5").write_text("")
    with pytest.raises(ValueError, match="weights are read from .safetensors files"):
        import_folder(tmp_path / "weights.h5", VAE)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Config):
        pass

    with pytest.raises(ValueError, match="Other: no PyTorch layout is known.*ImageVAEConfig"):
        export_network(Other(), {}, tmp_path / "x")


def test_pickles_are_refused_without_torch(tmp_path, monkeypatch):
    (tmp_path / "weights.bin").write_bytes(pickle.dumps({}))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="is a pickle, which can run code.*torch is not installed"):
        import_folder(tmp_path / "weights.bin", VAE)


@pytest.mark.torch
def test_pickles_with_other_objects_are_refused(tmp_path, parameters):
    torch = pytest.importorskip("torch")
    state = {
        name: torch.from_numpy(array.copy())
        for name, array in formats.format_of(VAE).weight_map(VAE).to_torch(parameters)
    }
    for legacy in (False, True):
        torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
        assert_equal(import_folder(tmp_path / "weights.pt", VAE)[1], parameters)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    torch.save({"state_dict": halves, "epoch": 3}, tmp_path / "weights.ckpt")
    again = flatten(import_folder(tmp_path / "weights.ckpt", VAE)[1])
    for path, array in flatten(parameters).items():
        np.testing.assert_array_equal(again[path], array.astype(ml_dtypes.bfloat16).astype(np.float32))

    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("run",))

    torch.save({"weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="evil.bin was refused"):
        import_folder(tmp_path / "evil.bin", VAE)
    assert not marker.exists()


@pytest.mark.torch
def test_old_names_of_attention_are_read(tmp_path, parameters):
    folder = foreign(export_network(VAE, parameters, tmp_path / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    arrays = dict(SafetensorsFile(file))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new_name, old_name in old.items():
        new_part, old_part = f"attentions.0.{new_name}.", f"attentions.0.{old_name}."
        arrays = {name.replace(new_part, old_part): array for name, array in arrays.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in arrays
    write(file, {n: TensorSpec(a.shape, a.dtype) for n, a in arrays.items()}, arrays.items())
    assert_equal(import_folder(folder)[1], parameters)


def test_memory_is_that_of_a_few_tensors(tmp_path):
    config = ImageVAEConfig(block_channels=(64, 128), layers_per_block=1, groups=4)
    parameters = random_parameters(config)
    total = sum(array.nbytes for array in flatten(parameters).values())
    largest = max(array.nbytes for array in flatten(parameters).values())
    assert largest < total / 5
    tracemalloc.start()
    try:
        export_network(config, parameters, tmp_path / "vae")
        exporting = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        import_folder(tmp_path / "vae")
        importing = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    slack = 1_500_000  # headers, names, the description of the network
    assert exporting < 2.1 * largest + slack < total
    assert importing < total + 2.1 * largest + slack < 2 * total


ROTARY = VideoDiTConfig(
    layers=1, heads=2, head_width=16, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=16,
    sample_height=4, sample_width=6, sample_frames=4, positions=Positions.ROTARY,
)  # fmt: skip


@pytest.mark.parametrize(
    ("temporal_patch", "grid"), [(2, RotaryGrid.SLICE), (None, RotaryGrid.LINSPACE)], ids=["1.5", "1.0"]
)
def test_rotary_positions_that_no_file_says_are_refused(tmp_path, temporal_patch, grid):
    """diffusers and SAT derive them from temporal_patch: a network with the others would be another one there."""
    (other,) = set(RotaryGrid) - {grid}
    config = ROTARY.replace(temporal_patch=temporal_patch, rotary_grid=grid)
    wrong, parameters = config.replace(rotary_grid=other), random_parameters(config)
    export_network(config, parameters, tmp_path / "right")
    assert read_config(tmp_path / "right") == config
    with pytest.raises(ValueError, match=f"rotary_grid = {other.value}.*set rotary_grid to {grid.value}"):
        export_network(wrong, parameters, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match="rotary_grid: .* in the weights, .* in the run"):
        check_architecture(tmp_path / "right", wrong, "task.denoiser_weights")
    check_architecture(tmp_path / "right", config, "task.denoiser_weights")
    if temporal_patch is not None:
        with pytest.raises(ValueError, match="the SAT code has the positions slice"):
            export_sat(wrong, parameters, tmp_path / "wrong.safetensors")
    # Tables of positions are tensors of the released code for 1.0 and none of that for 1.5, which loads strictly.
    written = export_sat(config, parameters, tmp_path / "sat.safetensors")
    tables = [name for name in SafetensorsFile(written) if "pos_embed" in name]
    assert len(tables) == (2 if temporal_patch is None else 0)
    assert_equal(import_folder(written, config)[1], parameters)


def test_rotary_positions_do_not_count_without_effect(tmp_path):
    for positions in (Positions.SINCOS, Positions.ROTARY_AND_LEARNED):
        config = ROTARY.replace(positions=positions)
        wrong = config.replace(rotary_grid=RotaryGrid.SLICE)
        export_network(wrong, random_parameters(config), tmp_path / positions.value)
        check_architecture(tmp_path / positions.value, wrong, "task.denoiser_weights")


def test_the_last_epsilon_comes_back(tmp_path):
    config = ROTARY.replace(output_norm_epsilon=1e-6)
    export_network(config, random_parameters(config), tmp_path / "out")
    assert read_config(tmp_path / "out") == config
    # A run keeps its own: files of other programs do not say it.
    assert not differences(ROTARY, config)
