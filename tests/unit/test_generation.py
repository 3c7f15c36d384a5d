"""`jvgen sample --weights`: what is refused before weights are read, whole calls, folders that are gone on with."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jvgen.data.video_files import decode_window, probe
from jvgen.interop import schedulers
from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.runs.published.placement import Placement
from jvgen.tasks.pipeline_folder import adopt_pipeline, default_request, frames_per_second, is_pipeline, read_pipeline

pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_pipeline import DENOISER, ENCODER, FIELDS, SCHEDULER, TEXT, VAE, write_pipeline  # noqa: E402

ASKED = ("--prompt", "a red ball", "--steps", "1", "--devices", "1")


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A pipeline folder as small as they come."""
    return write_pipeline(tmp_path_factory.mktemp("published") / "pipeline")


@pytest.fixture
def pipeline(whole, tmp_path) -> Path:
    """A copy to damage, without digests; weights are links."""
    folder = tmp_path / "pipeline"
    for path in whole.rglob("*"):
        target = folder / path.relative_to(whole)
        if path.is_dir():
            target.mkdir(parents=True)
        elif path.name == DIGESTS_FILE:
            continue
        elif path.suffix == ".safetensors":
            target.symlink_to(path)
        else:
            target.write_bytes(path.read_bytes())
    return folder


def keep(folder: Path, *names: str) -> None:
    """Remove everything else of a pipeline."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_pipeline_is_read_as_a_task(whole):
    config = read_pipeline(whole)
    assert (config.denoiser, config.vae, config.text.encoder) == (DENOISER, VAE, ENCODER)
    assert (config.latent_scale, config.spatial_compression, config.temporal_compression) == (VAE.scaling_factor, 2, 2)
    assert (config.sampler.kind, config.sampler.step_to, config.objective.target) == ("ddim", "stride", "v")
    assert (config.schedule.effective_snr_shift, config.schedule.ends_in_pure_noise) == (3.0, True)
    request = default_request(config)
    assert (request.frames, request.height, request.width) == (5, 8, 12) and frames_per_second(config) == 8
    pairs = config.replace(denoiser=config.denoiser.replace(temporal_patch=2))
    assert default_request(pairs).frames == 81 and frames_per_second(pairs) == 16
    assert pairs.denoised_shape(5, 8, 12) == (4, 4, 6) and pairs.clip_frames(5) == 3
    assert is_pipeline(whole) and not is_pipeline(whole / "vae")


def test_a_pipeline_does_not_change_how_given_frames_are_scaled(whole):
    wide = read_pipeline(whole).replace(condition="first_frame", denoiser=DENOISER.replace(in_channels=8))
    assert adopt_pipeline(wide, whole).vae == VAE
    inverted = VAE.replace(invert_scale_latents=True)
    with pytest.raises(ValueError, match="task.vae.invert_scale_latents = True, the pipeline's is False"):
        adopt_pipeline(wide.replace(vae=inverted), whole)


@pytest.mark.parametrize("kind", ["ddim", "dpm_solver_sde"])
@pytest.mark.parametrize("target", ["v", "epsilon", "clean"])
def test_scheduler_files_come_back(kind, target):
    config = schedulers.from_diffusers({**SCHEDULER, "steps_offset": 1, "snr_shift_scale": 1.0}, "file")
    config = schedulers.Scheduler(config.schedule, target, config.sampler.replace(kind=kind))
    written = schedulers.to_diffusers(config)
    assert schedulers.from_diffusers(json.loads(json.dumps(written)), "file") == config


# Bad input: one message, before any weights are read.

BAD_FOLDERS = {
    "nothing there": (lambda p: p.rename(p.with_name("moved")), "no such folder"),
    "no vae": (lambda p: (p / "vae").rename(p / "v"), "it has no vae/config.json"),
    "two missing": (
        lambda p: ((p / "vae" / "config.json").unlink(), (p / "tokenizer" / "tokenizer.json").rename(p / "t"),
                   (p / "tokenizer").rmdir()),
        "it has no vae/config.json, tokenizer",
    ),
    "no scheduler": (
        lambda p: (p / "scheduler" / "scheduler_config.json").unlink(), "has no scheduler/scheduler_config.json"
    ),
    "no tokenizer file": (lambda p: (p / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json or spiece.model"),
    "other pipeline": (
        lambda p: edit(p / "model_index.json", _class_name="StableDiffusionPipeline"),
        "is a StableDiffusionPipeline; supported are CogVideoXPipeline",
    ),
    "no image to video": (
        lambda p: edit(p / "model_index.json", _class_name="CogVideoXImageToVideoPipeline"),
        "is a CogVideoXImageToVideoPipeline, but its transformer takes no image",
    ),
    "exported VAE": (lambda p: keep(p, "vae", "model_index.json"), "is not a pipeline: it holds the networks vae."),
    "exported denoiser": (
        lambda p: (keep(p, "transformer", "model_index.json"), (p / "transformer").rename(p / "denoiser")),
        "take a single network, for example",
    ),
    "other scheduler": (
        lambda p: edit(p / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler"),
        "class 'EulerDiscreteScheduler', which is not supported",
    ),
    "other betas": (
        lambda p: edit(p / "scheduler" / "scheduler_config.json", beta_schedule="squaredcos_cap_v2"),
        "beta_schedule = 'squaredcos_cap_v2'; supported: 'scaled_linear', 'linear'",
    ),
    "betas that fall": (
        lambda p: edit(p / "scheduler" / "scheduler_config.json", beta_start=0.5),
        "scheduler_config.json: ScheduleConfig: beta_start = 0.5, beta_end = 0.012: must rise",
    ),
    "broken scheduler": (
        lambda p: (p / "scheduler" / "scheduler_config.json").write_text("{"), "scheduler_config.json is not JSON"
    ),
    "wrong network": (
        lambda p: (p / "vae" / "config.json").write_text((p / "text_encoder" / "config.json").read_text()),
        "holds a T5Config; a CogVideoXPipeline has a CogVideoXVAEConfig there",
    ),
    "image to video": (
        lambda p: edit(p / "transformer" / "config.json", in_channels=8),
        "make clips from images (condition = 'first_frame'), none are given: give --image FILE",
    ),
    "channels of nothing": (
        lambda p: (edit(p / "transformer" / "config.json", in_channels=6), (p / "model_index.json").unlink()),
        "no channels for the given frames",
    ),
    "other text width": (
        lambda p: edit(p / "transformer" / "config.json", text_embed_dim=10),
        "do not match each other: TextToVideoConfig: text.width = 8 but denoiser.text_width = 10",
    ),
    "other weights": (
        lambda p: edit(p / "transformer" / "config.json", num_layers=2), "transformer as CogVideoXTransformer3DModel"
    ),
    "no weights": (
        lambda p: (p / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae has no weights"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "transformer/config.json", "model_index.json"])
def test_a_pipeline_that_was_damaged_after_its_export(name, whole, tmp_path, jvgen, nothing_loaded):
    """Files of any part: each folder has digests."""
    folder = shutil.copytree(whole, tmp_path / "pipeline")
    (folder / name).write_text((folder / name).read_text() + "\n")
    done = jvgen("sample", "--weights", folder, "--out", tmp_path / "clips", *ASKED)
    assert done.status == 2 and f"{Path(name).name} has other content" in done.err, done.err


BAD_WORDS = {
    "even frames": (("--frames", "6"), "frames = 6: .*takes 4n \\+ 1 frames.*take 5 or 9"),
    "frames of half a batch": (("--frames", "7"), "takes 4n \\+ 1 frames.*take 5 or 9"),
    "height": (("--size", "10x12"), "height = 10: must be a multiple of 4"),
    "width": (("--size", "8x14"), "width = 14: must be a multiple of 4"),
    "no steps": (("--steps", "0"), "--steps: '0': must be at least 1"),
    "half steps of guidance": (("--batch-size", "0"), "--batch-size: '0': must be at least 1"),
    "two nulls": (
        ("--unconditional", "zeros", "--negative-prompt", "blue"),
        "--unconditional zeros replaces the embedding of",
    ),
    "sat's spacing": (
        ("--noise-levels", "sat", "--timestep-spacing", "linspace"),
        "levels = 'sat': leave spacing = 'trailing'",
    ),
    "a run's option": (("--ema", "0.9"), "--ema: only valid with RUN"),
    "fps": (("--fps", "0"), "--fps: '0': must be positive"),
    "devices": (("--devices", "99"), "--devices 99: this machine has"),
    "noise": (("--noise", "nowhere.npy"), "--noise nowhere.npy: no such file"),
    "ending": (("--out", "clip.png"), "5 frames are written as .mp4"),
    "ending that no clip has": (("--out", "clip.AVI"), "5 frames are written as .mp4"),
    "below a file": (("--out", "file.txt/clip.mp4"), "file.txt: a folder is needed there"),
    "several in one": (("--clips-per-prompt", "2", "--out", "clip.mp4"), "one file, but 2 clips"),
    "tiles": (("--tiles",), "a tile of 6x5 latents has a stride of"),
    "enhanced layers": (("--enhance", "1", "--enhance-set", "layers=1,1"), "layers has 2 factors"),
}


@pytest.fixture
def nothing_loaded(monkeypatch):
    def load(self, folder):
        raise AssertionError(f"{folder} was read")

    monkeypatch.setattr(Placement, "load", load)


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_folders_that_are_refused(name, pipeline, jvgen, tmp_path, nothing_loaded):
    damage, said = BAD_FOLDERS[name]
    damage(pipeline)
    done = jvgen("sample", "--weights", pipeline, *ASKED, "--out", tmp_path / "clips")
    assert done.status == 2 and said in done.err, done.err
    assert "Traceback" not in done.err and not (tmp_path / "clips").exists()


@pytest.mark.parametrize("name", BAD_WORDS)
def test_requests_that_are_refused(name, pipeline, jvgen, tmp_path, nothing_loaded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, said = BAD_WORDS[name]
    (tmp_path / "file.txt").write_text("")
    if name == "tiles":
        edit(pipeline / "vae" / "config.json", sample_height=26)
    done = jvgen("sample", "--weights", pipeline, "--out", "clips", *ASKED, *words)
    assert done.status == 2 and re.search(said, done.err), done.err
    assert "Traceback" not in done.err and not (tmp_path / "clips").exists()


def test_a_run_and_weights_are_two_things(whole, jvgen, tmp_path):
    both = jvgen("sample", tmp_path, "--weights", whole, *ASKED, "--out", tmp_path / "clips")
    neither = jvgen("sample", "--prompt", "a", "--out", tmp_path / "clips")
    for done in (both, neither):
        assert done.status == 2 and "give exactly one of" in done.err
    done = jvgen("sample", tmp_path, "--prompt", "a", "--noise", "x.npy", "--tiles", "--out", tmp_path / "clips")
    assert done.status == 2 and "--noise, --tiles: only valid with --weights" in done.err
    done = jvgen("sample", "--weights", whole, "--out", tmp_path / "clips")
    assert done.status == 2 and "no prompts" in done.err


# Whole calls.


def test_a_folder_is_gone_on_with(whole, jvgen, tmp_path, quick_compilations):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt_en": "a red ball"}, {"prompt_en": "a blue ball of red a red ball a"}]))
    out = tmp_path / "clips"
    words = ["sample", "--weights", whole, "--prompts", prompts, "--steps", "2", "--devices", "1", "--out", out]
    first = jvgen(*words, "--clips-per-prompt", "2", "--batch-size", "3")
    assert first.status == 0, first.err
    assert "more than 6 tokens; cut off: 'a red ball a'" in first.err
    assert "4 clips of 5x8x12" in first.out and "4 steps of" in first.out and "peak memory" in first.out
    names = [f"{prompt}-{i}.mp4" for prompt in ("a red ball", "a blue ball of red a red ball a") for i in (0, 1)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "index.jsonl"])
    clips = {name: (out / name).read_bytes() for name in names}
    assert len(set(clips.values())) == 4
    assert probe(clips[names[0]]).frames == 5
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [row["file"] for row in index] == names and index[0]["sampler"] == "ddim" and index[0]["steps"] == 2

    # A clip that is missing is made again to the byte, alone; others are left.
    (out / names[2]).unlink()
    again = jvgen(*words, "--clips-per-prompt", "2")
    assert again.status == 0 and "1 clips of" in again.out and "3 clips were there already" in again.out
    assert {name: (out / name).read_bytes() for name in names} == clips
    other = jvgen(*words, "--clips-per-prompt", "2", "--guidance", "3")
    assert other.status == 2 and "made with other settings (scale = 6.0, now 3.0)" in other.err


@pytest.mark.slow
def test_what_can_be_asked_for_is_seen_in_the_clip(whole, jvgen, tmp_path, quick_compilations):
    def sample(name: str, *words: object) -> np.ndarray:
        done = jvgen("sample", "--weights", whole, *ASKED, *words, "--out", tmp_path / f"{name}.npy")
        assert done.status == 0, done.err
        frames = np.load(tmp_path / f"{name}.npy")
        assert frames.dtype == np.float32 and 0 <= frames.min() < frames.max() <= 1
        return frames

    one = ("--frames", 1)
    plain = sample("plain", *one)
    assert plain.shape == (1, 8, 12, 3)
    sat = ("--noise-levels", "sat", "--sampler", "dpm_solver_sde", "--steps", 2, "--dynamic-guidance")
    for name, words in {"zeros": ("--unconditional", "zeros"), "tiles": ("--tiles",), "sat": sat}.items():
        assert np.abs(sample(name, *one, *words) - plain).max() > 1e-4, name
    assert 0 < np.abs(sample("bfloat16", *one, "--dtype", "bfloat16") - plain).max() < 0.1
    clips = [sample(f"enhanced{factor}", "--enhance", factor) for factor in (-1, 30)]
    assert clips[0].shape == (5, 8, 12, 3) and np.abs(clips[0] - clips[1]).max() > 1e-4


def test_clips_split_over_devices_are_the_same(whole, jvgen, tmp_path, quick_compilations):
    prompts = ("--prompt", "a red ball", "--prompt", "a blue ball")
    clips = []
    # Both clips on one device; each on three, which do not divide its 26 tokens.
    for devices in (1, 6):
        out = tmp_path / str(devices)
        asked = (*prompts, "--frames", 9, "--size", "8x8", "--steps", 2, "--batch-size", 2, "--devices", devices)
        done = jvgen("sample", "--weights", whole, *asked, "--out", out)
        assert done.status == 0, done.err
        made = [path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".mp4"]
        clips.append(np.stack([decode_window(clip, range(9)) for clip in made]).astype(int))
    assert clips[0].shape == (2, 9, 8, 8, 3) and np.abs(clips[0] - clips[1]).max() <= 2


# What is wrong with the pipeline and what is asked for; the step or the pixels, the network, the dtype; what to do.
NOT_FINITE = {
    "activations past float16": (
        ("transformer", "ff.net.", 2000.0), ("--dtype", "float16"),
        ("after denoising step 1 of 1, from the denoiser in float16", "take --dtype bfloat16"),
    ),
    "overflow in the VAE": (
        ("vae", "_out.", 1e30), (), ("decoded pixels, from the VAE in float32", "damaged"),
    ),
    "overflow in the VAE, as floats": (
        ("vae", "_out.", 1e30), ("--out", "clip.npy"), ("decoded pixels, from the VAE in float32",),
    ),
    "overflow in the text encoder": (
        ("text_encoder", "DenseReluDense", 1e20), (),
        ("embeddings of the caption 'a red ball'", "text encoder in float32"),
    ),
}  # fmt: skip


def scale(folder: Path, name: str, factor: float) -> None:
    """Multiply the tensors with a name in a folder's file of weights."""
    (path,) = folder.glob("*.safetensors")
    tensors = dict(SafetensorsFile(path))
    assert any(name in tensor for tensor in tensors)
    changed = {key: np.float32(factor) * array if name in key else array for key, array in tensors.items()}
    path.unlink()
    write(path, {key: TensorSpec(array.shape, array.dtype) for key, array in changed.items()}, changed.items())


@pytest.mark.parametrize("name", NOT_FINITE)
def test_clips_that_are_not_finite_are_an_error_and_no_file(name, pipeline, jvgen, tmp_path, quick_compilations):
    (network, tensor, factor), words, said = NOT_FINITE[name]
    scale(pipeline / network, tensor, factor)
    out = tmp_path / (words[1] if "--out" in words else "clips")
    asked = ("sample", "--weights", pipeline, *ASKED, *([] if "--out" in words else words), "--frames", 1, "--out", out)
    for _ in range(2):  # The second call makes it again.
        done = jvgen(*asked)
        assert done.status == 65, (done.out, done.err)
        assert all(text in done.err for text in said), done.err
        assert not [path for path in tmp_path.rglob("*") if path.suffix in (".mp4", ".png", ".npy")]


def test_finite_clips_of_a_batch_are_kept(whole, jvgen, tmp_path, quick_compilations):
    noise = np.random.default_rng(0).standard_normal((3, 1, 4, 6, 4), np.float32)
    noise[1] = 3e38
    np.save(tmp_path / "noise.npy", noise)
    asked = ("sample", "--weights", whole, *ASKED, "--frames", 1, "--clips-per-prompt", 3, "--batch-size", 2)
    done = jvgen(*asked, "--noise", tmp_path / "noise.npy", "--out", tmp_path / "clips")
    assert done.status == 65, (done.out, done.err)
    assert "1 of 3 clips hold NaN or infinity" in done.err and "clip 1 of 'a red ball': the latents" in done.err
    made = [f"0000_{number:02d}_a_red_ball.png" for number in (0, 2)]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == [*made, "index.jsonl"]
    again = jvgen(*asked, "--noise", tmp_path / "noise.npy", "--out", tmp_path / "clips")
    assert again.status == 65 and "1 of 1 clips" in again.err


CONFIG = """
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.training.experiment import Experiment
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import PrecisionConfig, TrainingConfig


def experiment():
    return Experiment(
        name="from_published",
        task=TextToVideoConfig(
            denoiser=VideoDiTConfig(**{denoiser}),
            text=TextConfig(encoder=T5Config(**{encoder}), length=6, unconditional="zeros"),
            latent_scale=1.15258426, spatial_compression=2, temporal_compression=2,
            schedule=ScheduleConfig(kind="cogvideox", snr_shift=3.0),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="nowhere"),), buckets=(BucketConfig(frames=5, height=8, width=12, batch_size=8),)
        ),
        training=TrainingConfig(steps=1, precision=PrecisionConfig(compute_dtype="float32"), tensorboard=False),
    )
"""


def test_a_pipeline_becomes_a_run_that_samples_and_a_pipeline_again(pipeline, jvgen, tmp_path, quick_compilations):
    whole = pipeline
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(denoiser=FIELDS, encoder=TEXT))
    told = jvgen("import", whole)
    assert told.status == 0 and all(name in told.out for name in ("VideoDiTConfig", "CogVideoXVAEConfig", "T5Config"))
    wrong = jvgen("import", whole, "--config", config, "--set", "task.latent_scale=0.7", "--to", tmp_path / "run")
    assert wrong.status == 2 and "task.latent_scale = 0.7, the pipeline's is 1.15258426" in wrong.err
    done = jvgen("import", whole, "--config", config, "--to", tmp_path / "run")
    assert done.status == 0, done.err
    sampled = jvgen("sample", tmp_path / "run", "--prompt", "a red ball", "--steps", 1, "--out", tmp_path / "clip.mp4")
    assert sampled.status == 0, sampled.err
    assert probe((tmp_path / "clip.mp4").read_bytes()).frames == 5

    # A checkpoint of it can be named; the step is then fixed.
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "0"
    other = jvgen("export", checkpoint, "--step", 3, "--to", tmp_path / "none")
    assert other.status == 2 and "step 3 is asked for, but" in other.err and "leave the step out" in other.err
    exported = jvgen("export", checkpoint, "--to", tmp_path / "exported")
    assert exported.status == 0, exported.err
    assert "note: the run was trained with zeros for no caption" in exported.out and "no whole" not in exported.out
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "CogVideoXPipeline", "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }  # fmt: skip
    for name in ("transformer", "vae", "text_encoder"):
        (new,), (old,) = ((folder / name).glob("*.safetensors") for folder in (tmp_path / "exported", whole))
        assert new.read_bytes() == old.read_bytes(), name
    again = jvgen("sample", "--weights", tmp_path / "exported", *ASKED, "--unconditional", "zeros", "--guidance", 6,
                  "--frames", 1, "--out", tmp_path / "again.png")  # fmt: skip
    assert again.status == 0, again.err

    alone = jvgen("export", run, "--network", "denoiser", "--to", tmp_path / "alone")
    assert alone.status == 0, alone.err
    names = ["README.md", "denoiser", "jvgen_digests.json", "jvgen_run.json", "model_index.json", "scheduler"]
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == names
    unknown = jvgen("export", run, "--network", "vae", "--to", tmp_path / "none")
    assert unknown.status == 2 and "--network vae: the run trains denoiser" in unknown.err

    # Other frozen weights than the run's are no part of its pipeline.
    scale(pipeline / "vae", "decoder.conv_out", 2.0)
    changed = jvgen("export", run, "--to", tmp_path / "changed")
    assert changed.status == 0 and "no whole pipeline was written" in changed.out
    assert "not those that the run was trained with" in changed.out and (tmp_path / "changed" / "denoiser").is_dir()
