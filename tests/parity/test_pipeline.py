"""Whole pipelines that diffusers saved, sampled by one command: the same noise becomes the same video."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvgen.cli import main as cli
from jvgen.diffusion.sampler import step_noise
from jvgen.runs.inference import open_run
from jvgen.runs.published.placement import Placement
from jvgen.tasks.clip_sampling import SAMPLER_KEY
from jvgen.tasks.task import SampleRequest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilations", "one_device")]

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


RUN_CONFIG = """
from pathlib import Path

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.tasks.pipeline_folder import read_pipeline
from jvgen.training.config import PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment


def experiment():
    return Experiment(
        name="finetuned",
        task=read_pipeline(Path({folder!r})),
        data=DataConfig(
            sources=(SourceConfig(path="nowhere"),),
            buckets=(BucketConfig(frames={frames}, height={height}, width={width}, batch_size=8),),
        ),
        training=TrainingConfig(
            steps=1, precision=PrecisionConfig(compute_dtype="float32"), tensorboard=False
        ),
    )
"""


@pytest.mark.parametrize("case", ["2b", pytest.param("1.5", marks=pytest.mark.slow)], indirect=True)
def test_an_exported_run_is_a_pipeline(case, pipeline, folder, latents, tmp_path, capsys):
    config, run, out = tmp_path / "config.py", tmp_path / "run", tmp_path / "exported"
    size = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    config.write_text(RUN_CONFIG.format(folder=str(folder), **size))

    def jvgen(*words: object) -> str:
        status = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    jvgen("import", folder, "--config", config, "--to", run)
    told = jvgen("export", run / "checkpoints" / "0", "--to", out)
    assert all(str(out / name) in told for name in ("transformer", "vae", "text_encoder")) and "no whole" not in told

    # diffusers loads every network strictly and finds the run's weights.
    exported = diffusers.CogVideoXPipeline.from_pretrained(out, low_cpu_mem_usage=False)
    exported.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(exported, name).state_dict(), getattr(pipeline, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    classes = json.loads((out / "model_index.json").read_text())
    wanted = json.loads((folder / "model_index.json").read_text())
    assert {**classes, "_diffusers_version": 0} == {**wanted, "_diffusers_version": 0}
    assert exported.tokenizer(PROMPT).input_ids == pipeline.tokenizer(PROMPT).input_ids

    # The same noise becomes the same latents as in the run.
    theirs = exported(
        PROMPT, num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, output_type="latent",
        latents=torch.from_numpy(latents), max_sequence_length=LENGTH, guidance_scale=6.0,
    ).frames[0].numpy()  # fmt: skip
    loaded = open_run(run)
    task, request = loaded.task, SampleRequest(FRAMES, HEIGHT, WIDTH, steps=STEPS, guidance=6.0)
    sampler, guidance = task.config.sampling(request)
    noise = jnp.asarray(latents.transpose(0, 1, 3, 4, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jvgen.tasks.clip_sampling.slot_normal", lambda *arguments: noise)
        ours, finite = jax.jit(
            lambda parameters, frozen, tokens: task.generate_latents(
                parameters, frozen, tokens, jnp.zeros(1, jnp.int32), jax.random.key(0),
                size=(FRAMES, HEIGHT, WIDTH), sampler=sampler, guidance=guidance,
            )
        )(loaded.parameters, loaded.frozen, task.tokens([PROMPT]))  # fmt: skip
    assert finite.steps.tolist() == [STEPS]
    ours = np.asarray(ours)[0].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, theirs[-len(ours) :], atol=1e-4, rtol=0)
    assert ours.std() > 0.1

    # And ours samples from it as from the run.
    asked = ("--prompt", PROMPT, "--frames", 1, "--steps", 2, "--guidance", 6, "--size", f"{HEIGHT}x{WIDTH}")
    jvgen("sample", run, *asked, "--out", tmp_path / "run.png")
    jvgen("sample", "--weights", out, *asked, "--devices", 1, "--out", tmp_path / "weights.png")
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("run", "weights")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 5


@pytest.mark.parametrize("case", ["2b"], indirect=True)
def test_a_run_on_cached_latents_gets_its_vae_when_it_makes_clips(case, folder, tmp_path, capsys):
    """Its config names none, as those of pods: training has no use for one."""
    config, run, vae = tmp_path / "config.py", tmp_path / "run", folder / "vae"
    text = RUN_CONFIG.format(folder=str(folder), frames=FRAMES, height=HEIGHT, width=WIDTH)
    blind = '.replace(vae=None, vae_weights=None, latents="data")'
    config.write_text(text.replace("')),", f"')){blind},"))

    def jvgen(*words: object, status: int = 0) -> str:
        assert cli.main([str(word) for word in words]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    jvgen("import", folder / "transformer", "--config", config, "--to", run)
    asked = ("--prompt", PROMPT, "--frames", 1, "--steps", 2, "--guidance", 6, "--size", f"{HEIGHT}x{WIDTH}")
    assert "give --vae DIR" in jvgen("sample", run, *asked, "--out", tmp_path / "none.png", status=2)
    assert "holds a VideoDiTConfig" in jvgen(
        "sample", run, *asked, "--vae", folder / "transformer", "--out", tmp_path / "none.png", status=2
    )
    jvgen("sample", run, *asked, "--vae", vae, "--out", tmp_path / "run.png")
    jvgen("sample", "--weights", folder, *asked, "--devices", 1, "--out", tmp_path / "weights.png")
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("run", "weights")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 5

    assert "give --vae DIR" in jvgen("evaluate", run, "--samples", 1, status=2)
    assert "names no data.evaluation_sources" in jvgen("evaluate", run, "--samples", 1, "--vae", vae, status=2)
    assert "give that which made the latents" in jvgen("export", run, "--to", tmp_path / "denoiser")
    assert "part of a whole pipeline" in jvgen(
        "export", run, "--to", tmp_path / "one", "--network", "denoiser", "--vae", vae, status=2
    )
    told = jvgen("export", run, "--to", tmp_path / "whole", "--vae", vae)
    assert "no whole" not in told and "could not be compared with the VAE that made the run's latents" in told
    assert f"the VAE that made the latents (`--vae`): `{vae}`" in (tmp_path / "whole" / "README.md").read_text()
    exported = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "whole", low_cpu_mem_usage=False)
    published = diffusers.CogVideoXPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(exported, name).state_dict(), getattr(published, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
