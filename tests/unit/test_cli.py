"""The `jvgen` command: help texts, and every step from data to PyTorch with tiny networks and clips."""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jvgen import __version__, config, saved_config
from jvgen.cli import main as cli
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window, probe
from jvgen.runs.clip_folder import plan_clips, write_clip
from jvgen.runs.run import load_run
from jvgen.training.checkpoint import initial
from jvgen.training.checkpoint.manager import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")
ROOT = Path(__file__).parents[2]
PROMPTS = ("--prompt", "a red ball moves to the left", "--prompt", "a blue cube moves to the right")


# Help and configs.


def subparsers(parser: argparse.ArgumentParser):
    """Every parser below one, including those that only choose among others."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield child
                yield from subparsers(child)


PARSERS = {parser.prog: parser for parser in subparsers(cli.build_parser())}
COMMANDS = (
    "demo data config check compile estimate launch train sample evaluate analyze play plan encode decode export "
    "import verify lpips"
).split()


def test_help_lists_the_commands(jvgen):
    assert list(dict.fromkeys(prog.split()[1] for prog in PARSERS)) == COMMANDS
    shown = jvgen("--help")
    assert shown.status == 0 and all(name in shown.out for name in COMMANDS)


def test_version_names_jvgen_jax_and_the_commit(jvgen, monkeypatch):
    monkeypatch.setattr(cli, "git_commit", lambda: "0123456789abcdef0123456789abcdef01234567+")
    shown = jvgen("--version")
    assert shown.status == 0 and shown.out == f"jvgen {__version__} (git 0123456789ab+, JAX {version('jax')})\n"
    monkeypatch.setattr(cli, "git_commit", lambda: "")
    assert jvgen("--version").out == f"jvgen {__version__} (JAX {version('jax')})\n"


def test_parsing_imports_no_jax():
    program = "import sys; from jvgen.cli.main import build_parser; build_parser(); print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@pytest.mark.parametrize("prog", [prog for prog in PARSERS])
def test_help_describes_every_argument_and_its_examples_parse(prog, jvgen):
    shown = jvgen(*prog.split()[1:], "--help")
    assert shown.status == 0 and "None)" not in shown.out and "[])" not in shown.out and "False)" not in shown.out
    parser = PARSERS[prog]
    assert parser.description and parser.description.endswith(".")
    for action in parser._actions:
        chooses_commands = isinstance(action, argparse._SubParsersAction)
        assert chooses_commands or len(action.help.split()) > 2, f"{action.option_strings or action.dest}: no help"
    title, *examples = parser.epilog.splitlines()
    assert title == ("Example:" if len(examples) == 1 else "Examples:") and examples
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "jvgen" and words[: len(prog.split()) - 1] == prog.split()[1:]
        assert cli.build_parser().parse_args(words).handler


def test_help_shows_defaults_as_they_are_written(jvgen):
    for command, default in (
        ("data build videos", "1/1"),
        ("data score", "motion sharpness duplicates"),
        ("evaluate", "256x256"),
    ):
        shown = " ".join(jvgen(*command.split(), "--help").out.split())
        assert f"(default: {default})" in shown and "(default: 1x1)" not in shown


def documented_commands() -> list[tuple[str, str]]:
    """(file, command) for every line of the documents, and of the heads of configs, that is a complete command."""
    files = (*ROOT.glob("*.md"), *(file for top in ("docs", "jvgen", "launch") for file in ROOT.glob(f"{top}/**/*.md")))
    texts = {file: file.read_text() for file in files}
    texts |= {file: ast.get_docstring(ast.parse(file.read_text())) or "" for file in ROOT.glob("configs/*.py")}
    found = []
    for file, text in texts.items():
        lines = text.replace("\\\n", " ").splitlines()
        commands = [part.strip() for line in lines for part in re.split(" # | > ", line)[0].split("&&")]
        complete = [c for c in commands if c.startswith("jvgen ") and c.split()[1] in COMMANDS and "..." not in c]
        found += [(str(file.relative_to(ROOT)), command) for command in complete]
    return found


def words_of(command: str) -> list[str]:
    # The array of launch/README.md.
    return [word for word in shlex.split(command)[1:] if word != "${FILES[@]}"]


@pytest.mark.parametrize(("file", "command"), documented_commands())
def test_commands_in_documents_parse(file, command):
    parsed = cli.build_parser().parse_args(words_of(command))
    assert parsed.handler, file
    config_file = str(getattr(parsed, "config", None) or "").partition(":")[0]
    assert not config_file.startswith("configs/") or (ROOT / config_file).is_file(), f"{file}: no {config_file}"


def test_settings_in_documents_exist():
    parser, seen = cli.build_parser(), set()
    for file, command in documented_commands():
        parsed = parser.parse_args(words_of(command))
        named = str(getattr(parsed, "config", None) or "")
        if not named.startswith("configs/") or "VARIANT" in named or not parsed.assignments:
            continue
        # What a command has printed stands in documents as a word.
        assignments = [re.sub("=(SHIFT|SCALE)$", "=1.0", assignment) for assignment in parsed.assignments]
        assert config.override(config.load(ROOT / named), assignments), file
        seen.add(file)
    assert {"README.md", "docs/your_videos.md"} <= seen


def test_flags_cannot_be_abbreviated(jvgen):
    done = jvgen("encode", "film.mp4", "--vae", "vae", "--out", "latents", "--compute", "bfloat16")
    assert done.status == 2 and "unrecognized arguments: --compute" in done.err


def test_config_show(jvgen):
    file = ROOT / "configs" / "cogvideox_2b.py"
    shown = jvgen("config", "show", file, "--set", "training.steps=7")
    assert shown.status == 0 and "training.steps = 7\n" in shown.out
    changed = config.override(config.load(file), ["training.steps=7"])
    assert shown.out == config.dump(changed)
    assert saved_config.from_json(jvgen("config", "show", file, "--json").out) == config.load(file)


# Data.


def test_scenes_are_built_and_shown(jvgen, tmp_path):
    words = ["--train", 2, "--validation", 1, "--set", "frames=2", "--set", "height=16", "--set", "width=16"]
    built = jvgen("data", "build", "scenes", "--out", tmp_path / "scenes", *words)
    assert built.status == 0 and "3 records" in built.out
    assert len(open_source(tmp_path / "scenes", "train")) == 2
    shown = jvgen("data", "show", tmp_path / "scenes", "--count", 1, "--out", tmp_path / "pictures")
    assert shown.status == 0 and "scene-0-00000000" in shown.out
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"sheet.png", "clips.gif"}


# The image VAE: train, evaluate, export, import, train on.


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def vae_run(jvgen, work, vae_words) -> Path:
    done = jvgen("train", *vae_words, "--workdir", work / "vae")
    assert done.status == 0, done.err
    assert "finished at step 3" in done.out
    return work / "vae"


@pytest.fixture(scope="module")
def vae_export(jvgen, work, vae_run) -> Path:
    done = jvgen("export", vae_run, "--to", work / "exported" / "image_vae")
    assert done.status == 0, done.err
    return work / "exported" / "image_vae" / "vae"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_metrics_and_checkpoints(vae_run):
    assert [row["step"] for row in rows(vae_run)] == [0, 1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows(vae_run))
    assert sorted(int(path.name) for path in (vae_run / "checkpoints").iterdir() if path.name.isdigit()) == [2, 3]


def test_evaluation_measures_the_chosen_parameters(jvgen, vae_run, tmp_path):
    done = jvgen("evaluate", vae_run, "--i3d", tmp_path / "none.safetensors")
    assert done.status == 2 and "makes no clips; for reconstructions export its VAE" in done.err
    done = jvgen("evaluate", vae_run, "--lpips-weights", tmp_path / "none.safetensors")
    assert done.status == 2 and "none.safetensors': no such file; `jvgen lpips` writes it" in done.err
    done = jvgen("evaluate", vae_run, "--batches", 1, "--out", tmp_path / "trained.json")
    assert done.status == 0, done.err
    measured = json.loads((tmp_path / "trained.json").read_text())
    assert measured["step"] == 3 and {"psnr", "ssim", "l1"} <= set(measured["metrics"])
    assert measured["not_measured"] == {"perceptual_lpips": "give --lpips-weights FILE"} and measured["weights"] == {}
    assert "psnr" in done.out
    for other in (["--untrained"], ["--ema", "raw"]):
        again = jvgen("evaluate", vae_run, "--batches", 1, "--out", tmp_path / "other.json", *other)
        assert again.status == 0, again.err
        assert json.loads((tmp_path / "other.json").read_text())["metrics"]["l1"] != measured["metrics"]["l1"]


def test_export_is_described_and_not_overwritten(jvgen, vae_run, vae_export):
    files = {"config.json", "diffusion_pytorch_model.safetensors", "jvgen_digests.json"}
    assert {path.name for path in vae_export.iterdir()} == files
    about = json.loads((vae_export.parent / "jvgen_run.json").read_text())
    assert (about["experiment"], about["step"]) == ("demo_image_vae", 3)
    described = jvgen("import", vae_export)
    assert described.status == 0 and "ImageVAEConfig" in described.out and "block_channels = (8, 8)" in described.out
    again = jvgen("export", vae_run, "--to", vae_export.parent)
    assert again.status == 2 and "not empty" in again.err


def test_training_resumes_from_imported_weights(jvgen, work, vae_words, vae_export):
    imported = jvgen("import", vae_export, "--config", *vae_words, "--to", work / "imported")
    assert imported.status == 0, imported.err
    assert "step 0" in imported.out and "'vae'" in imported.out
    assert jvgen("import", vae_export, "--config", *vae_words, "--to", work / "imported").status == 2
    trained = jvgen("train", *vae_words, "--workdir", work / "imported", "--stop-after", 1)
    assert trained.status == 0, trained.err
    assert "restored step 0" in trained.out
    assert rows(work / "imported")[0]["loss"] != rows(work / "vae")[0]["loss"]


def test_training_refuses_an_interrupted_import(jvgen, work, vae_words, vae_export, monkeypatch):
    folder = work / "cut_short"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        # A process that is killed removes nothing.
        patch.setattr(initial, "remove_tree", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            jvgen("import", vae_export, "--config", *vae_words, "--to", folder)
    refused = jvgen("train", *vae_words, "--workdir", folder, "--stop-after", 1)
    assert refused.status == 2 and "import_unfinished" in refused.err and "interrupted" in refused.err
    assert jvgen("import", vae_export, "--config", *vae_words, "--to", folder).status == 0
    trained = jvgen("train", *vae_words, "--workdir", folder, "--stop-after", 1)
    assert trained.status == 0 and "restored step 0" in trained.out


def test_an_import_that_cannot_be_written_fails(jvgen, work, vae_words, vae_export, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    failed = jvgen("import", vae_export, "--config", *vae_words, "--to", work / "full")
    assert failed.status == 74 and "no space left on device" in failed.err and "train with" not in failed.out
    assert not (work / "full").exists()


def kernels_of(text: str) -> list[str]:
    """What is said about kernels: each kind of call once."""
    lines = [line[line.index("kernels: ") :] for line in text.splitlines() if "kernels: " in line]
    assert len(set(lines)) == len(lines) and all("(CPU devices)" in line or "a bias" in line for line in lines)
    return lines


# The video transformer: latents, train, resume, sample, export.


@pytest.fixture(scope="module")
def latents(jvgen, work, scenes, vae_export) -> Path:
    out = work / "latents"
    done = jvgen(
        "data", "build", "latents", scenes, "--vae", vae_export, "--size", "16x16", "--out", out, "--batch-size", 8
    )
    assert done.status == 0, done.err
    assert "task.latent_scale=" in done.out
    return out


@pytest.fixture(scope="module")
def video_run(jvgen, work, video_words, latents, vae_export) -> Path:
    words = ["train", *video_words(latents, vae_export), "--workdir", work / "video"]
    first = jvgen(*words, "--stop-after", 2)
    assert first.status == 0 and "finished at step 2" in first.out, first.err
    said = kernels_of(first.out)
    assert said and kernels_of((work / "video" / "logs" / "process_0.log").read_text()) == said
    second = jvgen(*words)
    assert second.status == 0 and "restored step 2" in second.out and "finished at step 3" in second.out, second.err
    return work / "video"


def test_layers_of_a_run_are_analyzed(jvgen, video_run, vae_run, tmp_path):
    done = jvgen("analyze", video_run, "--timesteps", "800,100", "--out", tmp_path)
    assert done.status == 0, done.err
    document = json.loads((tmp_path / "analysis.json").read_text())
    assert sorted(document["timesteps"]) == ["100", "800"] and document["step"] == 3
    assert len(document["timesteps"]["800"]["similarity_after"][0]) == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"} and "cosine" in done.out
    assert kernels_of(done.out)
    refused = jvgen("analyze", vae_run, "--out", tmp_path / "vae")
    assert refused.status == 2 and "give a text-to-video run" in refused.err
    assert "0 to 999" in jvgen("analyze", video_run, "--timesteps", "1000", "--out", tmp_path).err
    from_python = load_run(video_run).analyze_layers(tmp_path / "python", timesteps=(800, 100))
    assert from_python["timesteps"] == document["timesteps"]


def test_a_loaded_run_samples_clips_and_decodes_them_with_another_vae(video_run, vae_export):
    run = load_run(video_run)
    clips = run.sample(["a red ball", "a blue cube"], count=2, steps=2, seed=1, batch=4)
    assert clips.shape[:2] == (2, 2) and clips.shape[-1] == 3 and clips.dtype == np.uint8
    again = run.sample("a red ball", count=2, steps=2, seed=1, batch=4, vae=vae_export)
    assert np.abs(again[0].astype(int) - clips[0]).max() <= 1


@pytest.mark.slow
def test_enhanced_attention_changes_the_clips(jvgen, video_run, tmp_path):
    clips = {}
    for name, words in {"plain": (), "enhanced": ("--enhance", 30), "off": ("--enhance", -1)}.items():
        done = jvgen("sample", video_run, *PROMPTS[:2], "--batch-size", 8, *words, "--out", tmp_path / name)
        assert done.status == 0, done.err
        clips[name] = next((tmp_path / name).glob("*.mp4")).read_bytes()
    assert clips["off"] == clips["plain"]
    index = json.loads((tmp_path / "enhanced" / "index.jsonl").read_text())
    assert index["enhance"]["temperature"] == 30.0


def test_latents_have_statistics_for_normalization(latents):
    statistics = json.loads((latents / "latent_statistics.json").read_text())
    source = open_source(latents, "train")
    moments = np.stack([source.read(row).latents[0] for row in range(len(source))]).astype(np.float64)
    assert moments.shape == (10, 4, 8, 8, 8)
    assert statistics["mean"] == pytest.approx(moments[..., :4].mean(), abs=0.05)
    assert statistics["deviation"] > moments[..., :4].std()


def test_an_interrupted_run_has_every_step_once(video_run):
    assert [row["step"] for row in rows(video_run)] == [0, 1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows(video_run))


def test_existing_samples_are_kept(jvgen, video_run, tmp_path):
    words = ["sample", video_run, *PROMPTS, "--clips-per-prompt", 2, "--out", tmp_path / "clips"]
    done = jvgen(*words)
    assert done.status == 0 and kernels_of(done.out), done.err
    index = [json.loads(line) for line in (tmp_path / "clips" / "index.jsonl").read_text().splitlines()]
    files = [tmp_path / "clips" / row["file"] for row in index]
    assert [row["prompt"] for row in index] == [PROMPTS[1], PROMPTS[1], PROMPTS[3], PROMPTS[3]]
    assert [probe(file.read_bytes()).frames for file in files] == [4] * 4
    assert decode_window(files[0].read_bytes(), [0, 3]).shape == (2, 16, 16, 3)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert len({content for content, _ in before.values()}) == 4

    again = jvgen(*words)
    assert again.status == 0 and "4 clips existed already" in again.out
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before
    # One that is missing is made again to the byte, whatever it is made together with.
    files[2].unlink()
    assert jvgen(*words, "--batch-size", 1).status == 0
    assert files[2].read_bytes() == before[files[2]][0]
    other = jvgen(*words, "--seed", 1)
    assert other.status == 2 and "made with other settings (seed = 0, now 1)" in other.err
    assert {file: file.read_bytes() for file in files} == {file: content for file, (content, _) in before.items()}


def test_a_single_output_file_is_not_overwritten(jvgen, video_run, tmp_path):
    words = ["sample", video_run, *PROMPTS[:2], "--untrained", "--out", tmp_path / "clip.mp4"]
    assert jvgen(*words).status == 0
    assert probe((tmp_path / "clip.mp4").read_bytes()).frames == 4
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    again = jvgen(*words)
    assert again.status == 2 and "exists" in again.err


@pytest.mark.parametrize(
    ("frames", "count", "out", "words"),
    [
        (1, 1, "clip.mp4", ["1 frames are written as .png"]),
        (4, 1, "clip.png", ["4 frames are written as .mp4"]),
        (4, 2, "clip.mp4", ["one file, but 2 clips"]),
        (4, 0, "clips", ["--clips-per-prompt 0"]),
    ],
)
def test_output_files_that_do_not_fit_the_request(frames, count, out, words, tmp_path):
    with pytest.raises(ValueError) as error:
        plan_clips(["red"], count, tmp_path / out, frames=frames, batch=1)
    assert all(word in str(error.value) for word in words), error.value


def test_single_frames_are_written_as_images(tmp_path):
    clips = plan_clips(["A red ball!"], 2, tmp_path / "out", frames=1, batch=1)
    assert [clip.path.name for clip in clips] == ["0000_00_a_red_ball.png", "0000_01_a_red_ball.png"]
    write_clip(tmp_path / "one.png", np.full((1, 8, 8, 3), 200, np.uint8), 8)
    assert (decode_window((tmp_path / "one.png").read_bytes(), [0]) == 200).all()


@pytest.mark.torch
def test_exports_match_the_original_classes(jvgen, video_run, vae_export, work):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    exported = work / "exported" / "video"
    done = jvgen("export", video_run, "--to", exported)
    assert done.status == 0, done.err
    assert (exported / "scheduler" / "scheduler_config.json").is_file()
    for folder in (exported / "denoiser", exported / "text_encoder", vae_export):
        checked = jvgen("verify", folder)
        assert checked.status == 0 and "loads strictly" in checked.out, checked.err
    assert jvgen("verify", vae_export, "--tolerance", 0).status == 1
