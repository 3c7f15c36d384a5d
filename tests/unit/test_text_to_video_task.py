"""The text-to-video task: its loss, latents, captions, sampling and frozen networks."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import validate_tree
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig, draw_noise, validation_timesteps
from jvgen.diffusion.sampler import SamplerConfig, grid
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.interop.to_torch import export_network
from jvgen.models.byte_text import tokenizer as byte_tokenizer
from jvgen.models.t5.config import T5Config
from jvgen.models.t5.model import T5Encoder
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat
from jvgen.tasks.task import SampleRequest
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import VALIDATION_KEY, TextToVideoConfig
from jvgen.training.step import accumulate
from jvgen.training.telemetry.metrics import to_host

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import BUCKET, CONFIG, random_frozen  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations")

REQUEST = SampleRequest(frames=3, height=8, width=8)


@pytest.fixture(scope="module")
def parameters():
    """Far from the start, where a caption hardly matters."""
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape, np.float32)), network.shapes)
        for name, network in CONFIG.build().networks.items()
    }


@pytest.fixture(scope="module")
def frozen():
    return random_frozen()


def batch_of(config: TextToVideoConfig = CONFIG) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {"slot": np.arange(BUCKET.batch_size, dtype=np.int32)}
    for name, spec in config.build().fields(BUCKET).items():
        shape = (BUCKET.batch_size, *spec.shape)
        floating = spec.dtype == np.float32
        arrays[name] = rng.standard_normal(shape, np.float32) if floating else rng.integers(0, 255, shape, spec.dtype)
    return {name: jnp.asarray(value) for name, value in arrays.items()}


# Loss.


@pytest.fixture(scope="module")
def losses(parameters):
    """(loss, metrics) of one batch, in one and in two microbatches."""
    task, key = CONFIG.replace(caption_dropout=0.5).build(), jax.random.key(5)

    def run(parameters, batch, count):
        return accumulate(lambda _, some: task.loss(parameters, {}, some, key), {}, batch, count)[0]

    made = [jax.jit(run, static_argnums=2)(parameters, batch_of(), count) for count in (1, 2)]
    return [(float(loss), to_host(metrics)) for loss, metrics in made]


def test_microbatches_make_the_same_loss(losses):
    """Noise, timesteps, dropped captions and posterior draws belong to a slot, not to its place in a microbatch."""
    (whole, metrics), (parts, metrics_of_parts) = losses
    assert np.isfinite(whole) and whole > 0
    assert parts == pytest.approx(whole, rel=1e-5)
    assert metrics_of_parts == pytest.approx(metrics, rel=1e-5)


def test_bands_of_timesteps_add_up_to_the_loss(parameters):
    task, batch, key = CONFIG.build(), batch_of(), jax.random.key(5)
    loss, metrics = jax.jit(task.loss)(parameters, {}, batch, key)
    total, count = (sum(float(getattr(pair, part)) for pair in metrics.values()) for part in ("total", "count"))
    assert count == BUCKET.batch_size and total / count == pytest.approx(float(loss), rel=1e-5)


def test_validation_loss_is_at_fixed_timesteps_without_dropped_captions(parameters):
    """It is the plain error of the mean of the posterior; the training loss beside it drops captions and draws."""
    key, batch = jax.random.key(5), batch_of()
    training = CONFIG.replace(caption_dropout=0.9, sample_posterior=True, validation_timesteps=2)
    plain = training.replace(caption_dropout=0.0, sample_posterior=False)
    found, other = (to_host(jax.jit(one.build().evaluate)(parameters, {}, batch, key)) for one in (training, plain))
    for name in ("validation_loss", "validation_loss_t0250", "validation_loss_t0750"):
        assert found[name] == pytest.approx(other[name], rel=1e-5)
    assert found["loss"] != pytest.approx(other["loss"], rel=1e-3)
    halves = found["validation_loss_t0250"], found["validation_loss_t0750"]
    assert halves[0] != halves[1] and found["validation_loss"] == pytest.approx(sum(halves) / 2)
    assert "validation_loss" not in CONFIG.replace(validation_timesteps=0).build().validation_loss({}, {}, {}, key)

    @jax.jit
    def explicit(parameters, batch):
        task = plain.build()
        clean = (batch["latents"][..., :4] - 0.25) * 2.0
        noise = draw_noise(jax.random.fold_in(jax.random.fold_in(key, VALIDATION_KEY), 250), clean.shape)
        text, times = task.text_embeddings(parameters, {}, batch["tokens"]), jnp.full(4, 250.0)
        velocity = task.denoise(parameters, 0.75 * clean + 0.25 * noise, times, text)
        return jnp.mean(jnp.square(velocity - (noise - clean)))

    assert found["validation_loss_t0250"] == pytest.approx(float(explicit(parameters, batch)), rel=1e-4)


def test_timesteps_of_the_validation_loss():
    discrete, continuous = (ScheduleConfig(kind=kind).build() for kind in ("cogvideox", "rectified_flow"))
    assert validation_timesteps(10, discrete).tolist() == list(range(50, 1000, 100))
    assert validation_timesteps(3, discrete).tolist() == [166, 500, 833]
    np.testing.assert_allclose(validation_timesteps(3, continuous), [1000 / 6, 500, 5000 / 6], rtol=1e-6)


def test_recorded_clips_are_decoded_posterior_means(frozen, key):
    task, batch = CONFIG.build(), batch_of()
    clips = jax.jit(task.recorded_clips)({}, frozen, batch, key)
    mean = (batch["latents"][..., :4] - 0.25) * 2.0
    decoded = jax.jit(task.decode_pixels)(frozen["vae"], mean)
    assert clips.shape == (4, 3, 8, 8, 3)
    np.testing.assert_allclose(clips, np.clip((np.asarray(decoded) + 1) / 2, 0, 1), atol=1e-5)


def test_captions_are_dropped_per_slot(key):
    task = CONFIG.replace(caption_dropout=0.25).build()
    tokens = jnp.broadcast_to(jnp.arange(1, 7, dtype=jnp.int32), (2000, 6))
    slots = jnp.arange(2000)
    kept = np.asarray(task.drop_captions(tokens, key, slots))
    dropped = (kept != np.asarray(tokens)).any(axis=1)
    assert dropped.mean() == pytest.approx(0.25, abs=0.04)
    np.testing.assert_array_equal(kept[dropped], np.broadcast_to(byte_tokenizer.tokenize("", 6), kept[dropped].shape))
    again = np.asarray(task.drop_captions(tokens[:500], key, slots[700:1200]))
    np.testing.assert_array_equal(again, kept[700:1200])
    other = np.asarray(task.drop_captions(tokens, jax.random.fold_in(key, 1), slots))
    assert (other != kept).any()
    np.testing.assert_array_equal(CONFIG.replace(caption_dropout=0.0).build().drop_captions(tokens, key, slots), tokens)


def test_cached_latents_are_those_of_the_pixels(frozen, key):
    cached, pixels = CONFIG.build(), CONFIG.replace(latents="pixels").build()
    batch = batch_of(CONFIG.replace(latents="pixels"))

    @jax.jit
    def run(frozen, batch):
        moments = pixels.encode(frozen, batch["video"])
        return (
            moments,
            cached.clean_latents(frozen, batch | {"latents": moments}, key),
            pixels.clean_latents(frozen, batch, key),
        )

    moments, from_data, from_pixels = run(frozen, batch)
    np.testing.assert_allclose(from_data, from_pixels, rtol=1e-5, atol=1e-5)
    mean_only = CONFIG.replace(sample_posterior=False).build()
    clean = mean_only.clean_latents(frozen, {"latents": moments, "slot": batch["slot"]}, key)
    assert clean.shape == (4, 3, 4, 4, 4)
    np.testing.assert_allclose(clean, (np.asarray(moments)[..., :4] - 0.25) * 2.0, rtol=1e-5)
    assert np.abs(np.asarray(from_data) - np.asarray(clean)).max() > 0.1


# Text.


@pytest.mark.parametrize("null", ["empty_caption", "zeros"])
def test_the_unconditional_embedding_is_the_empty_caption_or_zeros(parameters, null):
    task = CONFIG.replace(text=CONFIG.text.replace(unconditional=null)).build()
    tokens = jnp.stack([task.text.unconditional(), jnp.asarray(byte_tokenizer.tokenize("", 6))])
    embeddings = np.asarray(task.text_embeddings(parameters, {}, tokens))
    assert np.abs(embeddings[1]).max() > 0.1
    np.testing.assert_array_equal(embeddings[0], 0 * embeddings[1] if null == "zeros" else embeddings[1])


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A folder with a small T5 encoder and a tokenizer of a few words, and the configuration that names it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("t5")
    encoder = T5Config(vocabulary=20, width=8, layers=1, heads=2, head_width=4, hidden=16, buckets=8, max_distance=20)
    weights = jax.jit(Network.of(lambda rngs: T5Encoder(encoder, rngs=rngs)).init)(jax.random.key(3))
    export_network(encoder, weights, folder / "encoder")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "ball": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "words").mkdir()
    model.save(str(folder / "words" / "tokenizer.json"))
    text = TextConfig(
        encoder=encoder,
        length=6,
        weights=str(folder / "encoder"),
        tokenizer=str(folder / "words"),
        unconditional="zeros",
    )
    return CONFIG.replace(text=text, vae=None, vae_weights=None)


def test_a_frozen_encoder_is_read_from_its_folder_and_not_trained(t5):
    validate_tree(t5)
    t5.check_weights()
    task = t5.build()
    assert set(task.networks) == set(task.network_configs) == {"denoiser"} and set(task.frozen_networks) == {
        "text_encoder"
    }
    assert task.tokens(["a red ball", "a blue ball"]).tolist() == [[3, 4, 5, 0, 0, 0], [3, 2, 5, 0, 0, 0]]
    frozen, parameters = task.load_frozen(), jax.jit(task.init)(jax.random.key(0))
    assert len(task.frozen_digest()) == 64
    batch = batch_of(t5) | {"tokens": jnp.asarray(task.tokens(["a red ball"] * 4))}

    @jax.jit
    def run(frozen, parameters, batch):
        return task.loss(parameters, frozen, batch, jax.random.key(2))[0], task.text_embeddings(
            parameters, frozen, batch["tokens"]
        )

    loss, embeddings = run(frozen, parameters, batch)
    assert np.isfinite(loss) and embeddings.shape == (4, 6, 8) and np.abs(np.asarray(embeddings)).max() > 0
    example = {"latents": np.zeros((3, 4, 4, 8), np.float32), "caption": "a red ball"}
    assert task.preprocess(example)["tokens"].tolist() == [3, 4, 5, 0, 0, 0]


def test_files_of_a_frozen_encoder_are_checked(t5, tmp_path):
    def message(**changes) -> str:
        with pytest.raises(ValueError) as error:
            t5.replace(text=t5.text.replace(**changes)).check_weights()
        return str(error.value)

    assert "task.text.weights = none" in message(weights=None)
    assert "task.text.tokenizer = none" in message(tokenizer=None)
    assert "no such file or folder" in message(weights=str(tmp_path / "nowhere"))
    assert "no tokenizer at" in message(tokenizer=str(tmp_path))
    other = message(encoder=t5.text.encoder.replace(heads=4, head_width=2))
    assert "task.text.weights" in other and "heads: 2 in the weights, 4 in the run" in other and "head_width" in other
    # How a network is run is nothing that its weights know of.
    t5.replace(text=t5.text.replace(encoder=t5.text.encoder.replace(remat=Remat.FULL, unroll=True))).check_weights()


# Sampling.


@pytest.fixture(scope="module")
def compiled():
    task = CONFIG.build()
    return jax.jit(lambda p, f, tokens, slots, key: task.generate(p, f, tokens, slots, key, REQUEST))


@pytest.fixture(scope="module")
def generate(compiled, parameters, frozen):
    tokens = CONFIG.build().tokens
    return lambda prompts, slots, seed=0: np.asarray(
        compiled(parameters, frozen, tokens(prompts), jnp.asarray(slots), jax.random.key(seed)).pixels
    )


# The network whose parameters are NaN (with None, none are), and the fault of the clips.
DAMAGED = {
    None: None,
    "text_encoder": ("the embeddings of its caption", "text encoder"),
    "denoiser": ("the latents after denoising step 1 of 2", "denoiser"),
    "vae": ("the decoded pixels", "VAE"),
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_numbers_that_are_not_finite_are_named(compiled, parameters, frozen, damaged):
    networks = {**parameters, **frozen}
    if damaged is not None:
        networks[damaged] = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), networks[damaged])
    trained, rest = ({name: networks[name] for name in names} for names in (parameters, frozen))
    made = compiled(trained, rest, CONFIG.build().tokens(["red"] * 4), jnp.arange(4), jax.random.key(0))
    assert made.finite.fault(2) == DAMAGED[damaged]
    assert made.finite.all().tolist() == [damaged is None] * 4


def test_a_clip_depends_on_its_prompt_key_and_slot_only(generate):
    clips = generate(["red", "blue", "red", "green"], [0, 1, 2, 3])
    assert clips.shape == (4, 3, 8, 8, 3) and clips.dtype == np.uint8
    assert clips.std() > 0 and (clips[0] != clips[2]).any()
    others = generate(["green", "red", "red", "pink"], [3, 7, 0, 1])
    np.testing.assert_array_equal(others[0], clips[3])
    np.testing.assert_array_equal(others[2], clips[0])
    assert (others[1] != clips[0]).any() and (others[3] != clips[1]).any()
    assert (generate(["red"] * 4, [0] * 4, seed=1)[0] != clips[0]).any()


def test_guidance_of_one_is_no_guidance(parameters, key):
    task = CONFIG.build()
    tokens, slots = jnp.asarray(task.tokens(["red", "blue"])), jnp.arange(2)

    def latents(guidance):
        run = jax.jit(
            lambda parameters: task.generate_latents(
                parameters, {}, tokens, slots, key, size=(3, 8, 8), sampler=CONFIG.sampler, guidance=guidance
            )
        )
        return np.asarray(run(parameters)[0])

    one = latents(GuidanceConfig(kind="constant", scale=1.0))
    np.testing.assert_allclose(one, latents(GuidanceConfig(kind="none")), rtol=1e-4, atol=1e-5)
    assert np.abs(one - latents(GuidanceConfig(kind="constant", scale=4.0))).max() > 1e-3


def test_a_request_overrides_the_config():
    sampler, guidance = CONFIG.sampling(REQUEST)
    assert (sampler, guidance) == (CONFIG.sampler, CONFIG.guidance)
    sampler, guidance = CONFIG.sampling(SampleRequest(3, 8, 8, steps=7, guidance=5.5))
    assert (sampler.steps, guidance.kind, guidance.scale) == (7, "constant", 5.5)
    assert CONFIG.sampling(SampleRequest(3, 8, 8, guidance=1.0))[1].kind == "none"
    unguided = CONFIG.replace(guidance=GuidanceConfig(kind="none"))
    assert unguided.sampling(SampleRequest(3, 8, 8, guidance=2.0))[1].kind == "constant"


@pytest.mark.parametrize(
    ("request_changes", "config_changes", "words"),
    [
        ({"frames": 0}, {}, ["frames = 0", "at least 1"]),
        ({"height": 10}, {}, ["height = 10", "multiple of 4", "take 8"]),
        ({"width": -4}, {}, ["width = -4", "at least 1"]),
        ({"steps": 0}, {}, ["steps = 0", "at least 1"]),
        ({"steps": 1001}, {}, ["steps = 1001", "at most 1000"]),
        ({}, {"vae": None}, ["task.vae = none", "--vae DIR"]),
    ],
)
def test_requests_that_cannot_be_served(request_changes, config_changes, words):
    request = SampleRequest(**({"frames": 3, "height": 8, "width": 8} | request_changes))
    with pytest.raises(ValueError) as error:
        CONFIG.replace(**config_changes).check_request(request)
    assert all(word in str(error.value) for word in words), error.value


def test_clips_for_tensorboard(parameters, frozen):
    task = CONFIG.replace(visualize_clips=2).build()
    shown = jax.jit(task.visualize)(parameters, frozen, batch_of(), jax.random.key(0))
    assert {name: (clip.pixels.shape, clip.pixels.dtype, clip.finite.all()) for name, clip in shown.items()} == {
        name: ((2, 3, 8, 8, 3), jnp.uint8, True) for name in ("data", "sample")
    }
    assert CONFIG.replace(visualize_clips=0).build().visualize(parameters, frozen, batch_of(), jax.random.key(0)) == {}
    blind = CONFIG.replace(vae=None, vae_weights=None).build()
    assert blind.visualize(parameters, {}, batch_of(), jax.random.key(0)) == {}


SCHEDULERS = {
    "flow": (
        ScheduleConfig(kind="rectified_flow", flow_shift=3.0), "velocity",
        SamplerConfig(kind="euler", spacing="linspace"),
    ),
    "flow by noise levels": (ScheduleConfig(kind="rectified_flow"), "velocity", SamplerConfig(kind="euler")),
    "cogvideox": (ScheduleConfig(kind="cogvideox"), "v", SamplerConfig(kind="ddim")),
    "cogvideox 5b": (ScheduleConfig(kind="cogvideox", snr_shift=1.0), "v", SamplerConfig(kind="dpm_solver_sde")),
    "stable diffusion": (
        ScheduleConfig(kind="scaled_linear"), "epsilon",
        SamplerConfig(spacing="leading", steps_offset=1, final_step_clean=False),
    ),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers_samples_with_the_same_timesteps(name):
    diffusers = pytest.importorskip("diffusers")
    schedule, target, sampler = SCHEDULERS[name]
    config = CONFIG.replace(
        schedule=schedule, objective=ObjectiveConfig(target=target), sampler=sampler.replace(steps=20)
    )
    values = json.loads(config.build().exported_files()["scheduler/scheduler_config.json"])
    scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
    levels = grid(config.sampler, config.schedule.build())
    if name == "flow by noise levels":
        scheduler.set_timesteps(sigmas=levels.sigma.tolist())
    else:
        scheduler.set_timesteps(20)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), levels.timesteps, rtol=1e-5)
    if not schedule.continuous:
        expected = config.schedule.build().alpha_bar
        np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), expected, rtol=2e-4, atol=1e-7)
        assert scheduler.config.prediction_type == {"v": "v_prediction", "epsilon": "epsilon"}[target]
    else:
        np.testing.assert_allclose(scheduler.sigmas.numpy()[:-1], levels.sigma, rtol=1e-5)


def test_targets_that_diffusers_lacks_are_not_exported():
    for schedule, target in (
        (ScheduleConfig(kind="rectified_flow"), "v"),
        (ScheduleConfig(kind="cogvideox"), "velocity"),
    ):
        config = CONFIG.replace(schedule=schedule, objective=ObjectiveConfig(target=target))
        assert config.build().exported_files() == {}
