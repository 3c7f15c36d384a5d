"""Exports whose files were damaged are refused by every reader, which names the file; other folders are read."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from jvgen.interop import file_digests
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import DIGESTS_FILE, content_digest
from jvgen.interop.file_digests import DamagedExport, check_digests
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import check_weights, import_folder
from jvgen.interop.sat_file import export_sat
from jvgen.interop.to_torch import export_network, export_networks
from jvgen.interop.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_exports import DENOISER, VAE, drawn  # noqa: E402

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
INDEX, GATES = f"{WEIGHTS}.index.json", "repvideo_gates"


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """`vae` in one file, `shards` in several, `denoiser` with gates of its own; `other` is another VAE."""
    root = tmp_path_factory.mktemp("exports")
    for name, seed in {"vae": 0, "other": 1}.items():
        export_network(VAE, drawn(VAE, seed), root / name)
    export_network(VAE, drawn(VAE), root / "shards", shard_bytes=20_000)
    export_network(DENOISER, drawn(DENOISER), root / "denoiser")
    return root


def flip(where: float):
    """One bit, at a part of the file's length."""

    def damage(content: bytes) -> bytes:
        at = min(int(where * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]

    return damage


def zero(where: float):
    """4 KiB of zeros, at a part of the file's length."""

    def damage(content: bytes) -> bytes:
        at = int(where * len(content))
        return content[:at] + bytes(min(4096, len(content) - at)) + content[at + 4096 :]

    return damage


def cut(where: float):
    return lambda content: content[: int(where * len(content))]


def edit(old: str, new: str):
    def damage(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return damage


SHARD = "diffusion_pytorch_model-00002-of-*.safetensors"
# Name: folder, file, what happens to it.
DAMAGES = {
    "bit in the header's length": ("vae", WEIGHTS, flip(0)),
    "bit in the header": ("vae", WEIGHTS, flip(0.01)),
    "bit in the first weights": ("vae", WEIGHTS, flip(0.2)),
    "bit in weights": ("vae", WEIGHTS, flip(0.5)),
    "bit in later weights": ("vae", WEIGHTS, flip(0.8)),
    "bit in the last byte": ("vae", WEIGHTS, flip(1)),
    "zeros in the header": ("vae", WEIGHTS, zero(0)),
    "zeros in weights": ("vae", WEIGHTS, zero(0.5)),
    "zeros at the end": ("vae", WEIGHTS, zero(0.99)),
    "weights without a byte": ("vae", WEIGHTS, lambda content: content[:-1]),
    "half the weights": ("vae", WEIGHTS, cut(0.5)),
    "empty weights": ("vae", WEIGHTS, cut(0)),
    "a byte more": ("vae", WEIGHTS, lambda content: content + b"\0"),
    "two names exchanged": ("vae", WEIGHTS, edit('"decoder.conv_norm_out.weight"', '"decoder.conv_norm_out.bias"  ')),
    "weights of another network": ("vae", WEIGHTS, None),
    "config: a value": ("vae", CONFIG, edit('"scaling_factor": 1.0', '"scaling_factor": 1.8')),
    "config: a value that no tensor has": ("vae", CONFIG, edit('"sample_size": 32', '"sample_size": 64')),
    "config: a bit": ("vae", CONFIG, flip(0.5)),
    "config: zeros": ("vae", CONFIG, zero(0)),
    "config: half": ("vae", CONFIG, cut(0.5)),
    "config: empty": ("vae", CONFIG, cut(0)),
    "shard: a bit": ("shards", SHARD, flip(0.7)),
    "shard: zeros": ("shards", SHARD, zero(0.5)),
    "shard: half": ("shards", SHARD, cut(0.5)),
    "index: a bit": ("shards", INDEX, flip(0.5)),
    "index: half": ("shards", INDEX, cut(0.5)),
    "gates: a bit": ("denoiser", f"{GATES}.safetensors", flip(0.99)),
    "gates: another period": ("denoiser", f"{GATES}.json", edit('"period": 6', '"period": 7')),
    "digests: a bit": ("vae", DIGESTS_FILE, flip(0.7)),
    "digests: zeros": ("vae", DIGESTS_FILE, zero(0)),
    "digests: half": ("vae", DIGESTS_FILE, cut(0.5)),
    "digests: another object": ("vae", DIGESTS_FILE, edit("sha256", "sha257")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_exports_are_refused(name, exports, tmp_path):
    source, file, damage = DAMAGES[name]
    folder = shutil.copytree(exports / source, tmp_path / source)
    [target] = folder.glob(file)
    before = target.read_bytes()
    target.write_bytes((exports / "other" / file).read_bytes() if damage is None else damage(before))
    assert target.read_bytes() != before
    config = DENOISER if source == "denoiser" else VAE
    parameters = drawn(config)
    readers = {
        "import": lambda: import_folder(folder),
        "sample --weights": lambda: check_weights(folder),
        "frozen weights": lambda: check_architecture(folder, config, "task.vae_weights"),
        "verify": lambda: verify(folder, config, parameters),
    }
    for reader in readers.values():
        with pytest.raises(ValueError) as refused:
            reader()
        assert target.name in str(refused.value) and str(folder) in str(refused.value)
    if DIGESTS_FILE not in name and target.name != DIGESTS_FILE:
        with pytest.raises(DamagedExport, match="is not what was exported.* remove jvgen_digests.json"):
            check_digests(folder)


def test_a_file_that_is_gone_is_named(exports, tmp_path):
    folder = shutil.copytree(exports / "denoiser", tmp_path / "denoiser")
    for suffix in (".json", ".safetensors"):
        (folder / f"{GATES}{suffix}").unlink()
    with pytest.raises(DamagedExport, match=f"{GATES}.json is missing, {GATES}.safetensors is missing"):
        import_folder(folder)


def test_damage_ends_commands_with_one_message(jvgen, exports, tmp_path):
    folder = shutil.copytree(exports / "vae", tmp_path / "vae")
    (folder / WEIGHTS).write_bytes(flip(0.5)((folder / WEIGHTS).read_bytes()))
    for words in (["import", folder], ["verify", folder]):
        done = jvgen(*words)
        assert done.status == 2 and done.err.startswith(f"jvgen {words[0]}: {folder} is not what was exported: ")
        assert f"{WEIGHTS} has other content" in done.err and "Traceback" not in done.err


def test_whole_exports_and_folders_of_others_are_read(exports, tmp_path):
    check_digests(exports / "vae", reread=True)
    folder = shutil.copytree(exports / "vae", tmp_path / "vae")
    (folder / "notes.txt").write_text("mine")
    import_folder(folder)
    (folder / DIGESTS_FILE).unlink()
    (folder / CONFIG).write_bytes(edit('"sample_size": 32', '"sample_size": 64')((folder / CONFIG).read_bytes()))
    assert import_folder(folder)[0].sample_size == 64
    check_digests(tmp_path / "nowhere")


def test_digests_are_no_part_of_what_a_run_remembers_of_its_frozen_weights(exports, tmp_path):
    folder = shutil.copytree(exports / "vae", tmp_path / "vae")
    with_digests = content_digest(folder)
    (folder / DIGESTS_FILE).unlink()
    assert content_digest(folder) == with_digests


def test_one_file_of_a_folder_is_checked_alone(exports, tmp_path):
    folder = shutil.copytree(exports / "denoiser", tmp_path / "denoiser")
    (folder / f"{GATES}.json").write_text("{}")
    with pytest.raises(DamagedExport):
        check_weights(folder)
    (folder / f"{GATES}.json").write_bytes((exports / "denoiser" / f"{GATES}.json").read_bytes())
    (folder / WEIGHTS).write_bytes(flip(0.6)((folder / WEIGHTS).read_bytes()))
    with pytest.raises(DamagedExport, match=WEIGHTS):
        import_folder(folder / WEIGHTS)


def test_every_subfolder_has_its_own_digests(tmp_path):
    folder = export_networks({"vae": VAE}, {"vae": drawn(VAE)}, tmp_path / "run", files={"scheduler/a.json": "{}\n"})
    found = {str(path.parent.relative_to(folder)): path for path in folder.rglob(DIGESTS_FILE)}
    assert set(found) == {".", "vae", "scheduler"}
    digests = json.loads(found["."].read_text())["sha256"]
    assert list(digests) == ["model_index.json"] and len(digests["model_index.json"]) == 64


def test_files_of_sat_keep_each_others_digests(tmp_path):
    config = DENOISER.replace(aggregation=None)
    for name in ("a", "b"):
        export_sat(config, drawn(config), tmp_path / f"{name}.safetensors")
    assert set(json.loads((tmp_path / DIGESTS_FILE).read_text())["sha256"]) == {"a.safetensors", "b.safetensors"}
    (tmp_path / "a.safetensors").write_bytes(flip(0.5)((tmp_path / "a.safetensors").read_bytes()))
    with pytest.raises(DamagedExport, match="a.safetensors has other content"):
        import_folder(tmp_path / "a.safetensors", config)
    import_folder(tmp_path / "b.safetensors", config)


def test_large_files_are_hashed_once_and_verify_reads_them_again(exports, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(file_digests, "file_digest", lambda path, reread=False: read.append((path.name, reread)))
    with pytest.raises(DamagedExport):
        import_folder(exports / "vae")
    assert set(read) == {(CONFIG, False), (WEIGHTS, False)}
    read.clear()
    with pytest.raises(DamagedExport):
        verify(exports / "vae", VAE, {})
    assert set(read) == {(CONFIG, True), (WEIGHTS, True)}


@pytest.mark.torch
@pytest.mark.parametrize(("library", "config"), [("diffusers", VAE), ("transformers", None)])
def test_other_libraries_load_exports_strictly(library, config, tmp_path):
    from jvgen.models.t5.config import T5Config

    module = pytest.importorskip(library)
    config = config or T5Config(vocabulary=16, width=8, layers=1, heads=1, head_width=8, hidden=8)
    folder = export_network(config, drawn(config), tmp_path / "network")
    assert (folder / DIGESTS_FILE).is_file()
    loaded = getattr(module, format_of(config).class_name).from_pretrained(folder, output_loading_info=True)[1]
    assert not any(loaded[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
