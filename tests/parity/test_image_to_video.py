"""Image to video and video to video against diffusers' pipelines: the same noise becomes the same clip, both ways."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvgen.cli import main as cli
from jvgen.diffusion.objective import slot_normal
from jvgen.runs.inference import open_run
from jvgen.tasks import given_frames
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.pipeline_folder import read_pipeline
from jvgen.tasks.task import SampleRequest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from test_pipeline import LENGTH, PROMPT, RUN_CONFIG, WORDS, randomize  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilations", "one_device")]

FRAMES, HEIGHT, WIDTH, STEPS, CHANNELS = 17, 16, 24, 10, 4
ROTARY = {"use_rotary_positional_embeddings": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of pipeline, and what its files say."""

    pipeline: str
    transformer: dict
    scheduler: str = "CogVideoXDDIMScheduler"
    vae: dict = dataclasses.field(default_factory=dict)
    latent_frames: int = 5


IMAGE = "CogVideoXImageToVideoPipeline"
CASES = {
    "5b": Case(
        IMAGE, ROTARY | {"in_channels": 2 * CHANNELS, "use_learned_positional_embeddings": True},
        "CogVideoXDPMScheduler",
    ),
    # An offset, and patches of two frames: the image is at the place of the padding.
    "1.5": Case(
        IMAGE, ROTARY | {"in_channels": 2 * CHANNELS, "ofs_embed_dim": 16, "patch_size_t": 2, "patch_bias": False},
        vae={"invert_scale_latents": True}, latent_frames=6,
    ),
    "video to video": Case("CogVideoXVideoToVideoPipeline", {}),
    "video to video, dpm": Case("CogVideoXVideoToVideoPipeline", ROTARY, "CogVideoXDPMScheduler"),
}  # fmt: skip


def tiny_pipeline(case: Case):
    torch.manual_seed(0)
    vocabulary = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(word, -float(i)) for i, word in enumerate(WORDS)]
    tokenizer = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
        sample_height=48, sample_width=40, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3, **case.vae,
    )  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(**{
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "time_embed_dim": 16, "num_layers": 2, "text_embed_dim": 16, "max_text_seq_length": LENGTH,
        "sample_width": WIDTH // 4, "sample_height": HEIGHT // 4, "sample_frames": FRAMES, **case.transformer,
    })  # fmt: skip
    scheduler = getattr(diffusers, case.scheduler)(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    networks = [randomize(network) for network in (encoder, vae, transformer)]
    if "use_learned_positional_embeddings" in case.transformer:
        # A buffer of doubles as it is made; published files have narrower ones.
        transformer.patch_embed.pos_embedding = torch.randn(transformer.patch_embed.pos_embedding.shape)
    made = getattr(diffusers, case.pipeline)(tokenizer, *networks, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipeline(case):
    return tiny_pipeline(case)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "pipeline"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def given(case, tmp_path) -> list[Image.Image]:
    """An image, larger than the clip, or the frames of a video; with the noise of the clip in `latents.npy`."""
    rng = np.random.default_rng(3)
    np.save(
        tmp_path / "latents.npy",
        rng.standard_normal((1, case.latent_frames, CHANNELS, HEIGHT // 4, WIDTH // 4)).astype(np.float32),
    )
    smooth = lambda: Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((3 * WIDTH, 3 * HEIGHT))  # noqa: E731
    images = [smooth() for _ in range(1 if case.pipeline == IMAGE else FRAMES)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number:02d}.png")
    return images


def latents_of(tmp_path: Path) -> np.ndarray:
    return np.load(tmp_path / "latents.npy")


def same_posterior_noise(monkeypatch, purpose: int) -> None:
    """Give diffusers' autoencoder the noise that ours draws for the first clip with seed 0."""

    def sample(self, generator=None):
        batch, channels, frames, height, width = self.mean.shape
        key = jax.random.fold_in(jax.random.key(0), purpose)
        drawn = slot_normal(key, (batch, frames, height, width, channels), jnp.zeros(1, jnp.int32))
        return self.mean + self.std * torch.from_numpy(np.array(drawn).transpose(0, 4, 1, 2, 3).copy())

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", sample)


def deterministic(monkeypatch) -> None:
    """Diffusers' stochastic scheduler without its noise, and ours: the table of steps is tested elsewhere."""
    module = diffusers.schedulers.scheduling_dpm_cogvideox
    monkeypatch.setattr(module, "randn_tensor", lambda shape, *a, **k: torch.zeros(shape))
    monkeypatch.setattr("jvgen.runs.published.stages.step_noise", lambda key, step, shape, slots=None: jnp.zeros(shape))


def run(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


SIZE = ("--size", f"{HEIGHT}x{WIDTH}")


def test_the_same_noise_becomes_the_same_clip(case, pipeline, folder, given, tmp_path, monkeypatch):
    deterministic(monkeypatch)
    of_image = case.pipeline == IMAGE
    same_posterior_noise(
        monkeypatch, given_frames.FRAME_POSTERIOR_KEY if of_image else given_frames.VIDEO_POSTERIOR_KEY
    )
    noise = torch.from_numpy(latents_of(tmp_path))
    call = {"num_inference_steps": STEPS, "output_type": "np", "max_sequence_length": LENGTH, "guidance_scale": 6.0}
    call |= {"height": HEIGHT, "width": WIDTH}
    words = ["sample", "--weights", folder, "--prompt", PROMPT, *SIZE, "--steps", STEPS, "--guidance", 6]
    words += ["--devices", 1, "--noise", tmp_path / "latents.npy", "--out", tmp_path / "clip.npy"]
    if of_image:
        expected = pipeline(given[0], PROMPT, num_frames=FRAMES, latents=noise, **call).frames[0]
        run(*words, "--frames", FRAMES, "--image", tmp_path / "00.png")
    else:
        # A video file would change the frames: what is read from it is replaced.
        monkeypatch.setattr(
            "jvgen.runs.given_files.GivenFiles.read",
            lambda self, frames, size, rows: GivenPixels(
                video=np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)) for image in given])[
                    None
                ]
            ),
        )
        monkeypatch.setattr("jvgen.runs.given_files.GivenFiles.size_of_video", lambda self: FRAMES)
        (tmp_path / "in.mp4").write_bytes(b"")
        module = diffusers.pipelines.cogvideo.pipeline_cogvideox_video2video
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise)
        expected = pipeline(given, PROMPT, strength=0.8, **call).frames[0]
        run(*words, "--video", tmp_path / "in.mp4", "--strength", 0.8)
    ours = np.load(tmp_path / "clip.npy")
    assert ours.shape == expected.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.05
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


IMAGE_CASES = ["5b", "1.5"]


@pytest.mark.parametrize("case", IMAGE_CASES, indirect=True)
def test_a_pipeline_goes_through_a_run(case, pipeline, folder, given, tmp_path, monkeypatch, capsys):
    """Imported, exported and read by diffusers: the same class, equal weights; and the run makes the same latents."""
    config, directory, out = tmp_path / "config.py", tmp_path / "run", tmp_path / "exported"
    config.write_text(RUN_CONFIG.format(folder=str(folder), frames=FRAMES, height=HEIGHT, width=WIDTH))
    run("import", folder, "--config", config, "--to", directory)
    run("export", directory, "--to", out)
    assert "no whole" not in capsys.readouterr().out

    exported = diffusers.DiffusionPipeline.from_pretrained(out, low_cpu_mem_usage=False)
    assert type(exported).__name__ == IMAGE
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(exported, name).state_dict(), getattr(pipeline, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])], name
    wanted = json.loads((folder / "model_index.json").read_text())
    classes = json.loads((out / "model_index.json").read_text())
    assert {**classes, "_diffusers_version": 0} == {**wanted, "_diffusers_version": 0}
    assert read_pipeline(out).condition == "first_frame"

    same_posterior_noise(monkeypatch, given_frames.FRAME_POSTERIOR_KEY)
    exported.set_progress_bar_config(disable=True)
    exported.scheduler = diffusers.CogVideoXDDIMScheduler.from_config(exported.scheduler.config)
    latents = latents_of(tmp_path)
    theirs = exported(
        given[0], PROMPT, num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
        output_type="latent", latents=torch.from_numpy(latents), max_sequence_length=LENGTH, guidance_scale=6.0,
    ).frames[0].numpy()  # fmt: skip
    loaded = open_run(directory)
    task, request = loaded.task, SampleRequest(FRAMES, HEIGHT, WIDTH, steps=STEPS, guidance=6.0)
    sampler, guidance = task.config.sampling(request)
    frames = np.asarray(given[0].resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))[None, None]
    monkeypatch.setattr(
        "jvgen.tasks.clip_sampling.slot_normal", lambda *arguments: jnp.asarray(latents.transpose(0, 1, 3, 4, 2))
    )
    ours, _ = jax.jit(
        lambda parameters, frozen, tokens, frames: task.generate_latents(
            parameters, frozen, tokens, jnp.zeros(1, jnp.int32), jax.random.key(0), size=(FRAMES, HEIGHT, WIDTH),
            sampler=sampler.replace(kind="ddim"), guidance=guidance, given=GivenPixels(frames=frames),
        )
    )(loaded.parameters, loaded.frozen, task.tokens([PROMPT]), frames)  # fmt: skip
    ours = np.asarray(ours)[0].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, theirs[-len(ours) :], atol=1e-4, rtol=0)
