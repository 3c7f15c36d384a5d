"""Whole pipelines that diffusers saved, sampled by one command: the same noise becomes the same video."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.cli import main as cli
from jvgen.diffusion.sampler import step_noise
from jvgen.runs.published.placement import Placement
from jvgen.tasks.text_to_video import SAMPLER_KEY

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilations")]

PROMPT, NEGATIVE = "a red ball rolls to the left", "blurry"
FRAMES, HEIGHT, WIDTH, STEPS = 17, 16, 24, 10
LENGTH = 12
WORDS = "▁ ▁a ▁red ▁ball ▁rolls ▁to ▁the ▁left b l u r y".split()


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of pipeline, and what is asked of it."""

    transformer: dict
    scheduler: str
    call: dict
    words: tuple[str, ...]


CASES = {
    "2b": Case({}, "CogVideoXDDIMScheduler", {}, ()),
    "5b": Case(
        {"use_rotary_positional_embeddings": True},
        "CogVideoXDPMScheduler",
        {"use_dynamic_cfg": True},
        ("--dynamic-guidance",),
    ),
    # Patches of two frames: one latent frame more is sampled than is shown.
    "1.5": Case(
        {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
        "CogVideoXDDIMScheduler",
        {"negative_prompt": NEGATIVE},
        ("--negative-prompt", NEGATIVE),
    ),
    "unguided": Case({}, "CogVideoXDDIMScheduler", {"guidance_scale": 1.0}, ("--guidance", "1")),
}


def randomize(module: "torch.nn.Module") -> "torch.nn.Module":
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            offset = (
                1.0
                if "norm" in name and "conv" not in name and name.endswith("weight") and parameter.ndim == 1
                else 0.0
            )
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipeline(case) -> "diffusers.CogVideoXPipeline":
    torch.manual_seed(0)
    vocabulary = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")] + [
        (word, -float(i)) for i, word in enumerate(WORDS)
    ]
    tokenizer = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        sample_height=48, sample_width=40, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
    )  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16, num_layers=2,
        text_embed_dim=16, max_text_seq_length=LENGTH, sample_width=10, sample_height=8, sample_frames=FRAMES,
        **case.transformer,
    )  # fmt: skip
    scheduler = getattr(diffusers, case.scheduler)(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    networks = (randomize(network) for network in (encoder, vae, transformer))
    made = diffusers.CogVideoXPipeline(tokenizer, *networks, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "pipeline"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def latents(folder, tmp_path) -> np.ndarray:
    frames = 6 if folder_has_pairs(folder) else 5
    drawn = np.random.default_rng(3).standard_normal((1, frames, 4, HEIGHT // 4, WIDTH // 4)).astype(np.float32)
    np.save(tmp_path / "latents.npy", drawn)
    return drawn


def folder_has_pairs(folder: Path) -> bool:
    return '"patch_size_t": 2' in (folder / "transformer" / "config.json").read_text()


def replay_noise(monkeypatch, shape: tuple[int, ...]) -> None:
    """Give diffusers' stochastic scheduler the noise that ours draws for the first clip with seed 0."""
    key = jax.random.fold_in(jax.random.key(0), SAMPLER_KEY)
    module = diffusers.schedulers.scheduling_dpm_cogvideox
    steps = iter(range(STEPS))
    now = {}

    def step(self, *arguments, original=module.CogVideoXDPMScheduler.step, **options):
        now["step"] = next(steps)
        return original(self, *arguments, **options)

    def drawn(*arguments, **options):
        batch, frames, channels, height, width = shape
        ours = step_noise(
            key, jnp.int32(now["step"]), (batch, frames, height, width, channels), jnp.zeros(1, jnp.int32)
        )
        return torch.from_numpy(np.array(ours).transpose(0, 1, 4, 2, 3).copy())

    monkeypatch.setattr(module.CogVideoXDPMScheduler, "step", step)
    monkeypatch.setattr(module, "randn_tensor", drawn)


def test_the_same_noise_becomes_the_same_video(case, pipeline, folder, latents, tmp_path, monkeypatch, capsys):
    replay_noise(monkeypatch, latents.shape)
    call = {"guidance_scale": 6.0, **case.call}
    expected = pipeline(
        PROMPT, num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, output_type="np",
        latents=torch.from_numpy(latents), max_sequence_length=LENGTH, **call,
    ).frames[0]  # fmt: skip

    loads, traces = [], []

    def load(self, path, original=Placement.load):
        # What is alive when a network is loaded: no parameters of a text encoder beside the denoiser's.
        loads.append((Path(path).name, sum(array.nbytes for array in jax.live_arrays())))
        return original(self, path)

    def jit(self, function, original=Placement.jit):
        number = len(traces)
        traces.append(0)

        @functools.wraps(function)
        def counted(*arguments, **options):
            traces[number] += 1
            return function(*arguments, **options)

        return original(self, counted)

    monkeypatch.setattr(Placement, "load", load)
    monkeypatch.setattr(Placement, "jit", jit)
    before = sum(array.nbytes for array in jax.live_arrays())
    words = ["--prompt", PROMPT, "--frames", FRAMES, "--size", f"{HEIGHT}x{WIDTH}", "--steps", STEPS, "--devices", 1]
    if "--guidance" not in case.words:
        words += ["--guidance", 6]
    words += [*case.words, "--noise", tmp_path / "latents.npy", "--out", tmp_path / "clip.npy"]
    status = cli.main([str(word) for word in ["sample", "--weights", folder, *words]])
    printed = capsys.readouterr()
    assert status == 0, printed.err

    ours = np.load(tmp_path / "clip.npy")
    assert ours.shape == expected.shape == (FRAMES, HEIGHT, WIDTH, 3) and ours.dtype == np.float32
    # The frames are not gray: a wrong clip is far off.
    assert expected.std() > 0.05
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)

    assert [name for name, _ in loads] == ["text_encoder", "transformer", "vae"]
    encoder = sum(array.nbytes for array in pipeline.text_encoder.state_dict().values())
    assert loads[1][1] - before < encoder / 4
    # One program for all steps; frames have a first batch and others.
    embed, step, frames, whole = traces
    assert (embed, step, frames, whole) == (1, 1, 2, 0)
    assert "10 steps of" in printed.out and "peak memory" in printed.out
