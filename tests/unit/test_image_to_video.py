"""Image to video: refused configs, given frames in batches, training and sampling, a start from text to video."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.sampler import SamplerConfig, coefficients, first_step, partly_noised
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.interop.to_torch import export_network
from jvgen.models.video_dit import conditioned_start
from jvgen.models.video_dit.config import AggregationConfig, Positions, VideoDiTConfig
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.nn.rope import RotaryGrid
from jvgen.parallel.mesh import single_device_mesh
from jvgen.runs.exporting import import_run
from jvgen.tasks import given_frames
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.task import SampleRequest
from jvgen.training.checkpoint import init_from
from jvgen.training.checkpoint.reader import CheckpointReader
from jvgen.training.config import InitFromConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.program import Program

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import BUCKET, CONFIG, random_frozen  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations", "one_device")

WIDE = CONFIG.denoiser.replace(in_channels=8)
FIRST = CONFIG.replace(condition="first_frame", denoiser=WIDE)
BOTH = FIRST.replace(condition="first_and_last")
# Two frames a patch: three latent frames become four.
PAIRS = FIRST.replace(denoiser=WIDE.replace(temporal_patch=2, offset_width=8))
WITH_OFFSET = FIRST.replace(denoiser=WIDE.replace(offset_width=8))


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (CONFIG, {"condition": "first_frame"}, ["no channels for the given frames", "in_channels = 8"]),
        (CONFIG, {"denoiser": WIDE}, ["an image-to-video network", "condition = first_frame", "both must be equal"]),
        (
            CONFIG, {"denoiser": CONFIG.denoiser.replace(offset_width=8)},
            ["offset_width = 8", "only image-to-video networks"],
        ),
        (FIRST, {"vae": None}, ["condition = 'first_frame'", "needs vae"]),
        (FIRST, {"condition": "last"}, ["condition", "'first_and_last'"]),
        (FIRST, {"condition_dropout": 1.0}, ["condition_dropout = 1.0", "below 1"]),
        (FIRST, {"condition_noise_mean": 5.0}, ["condition_noise_mean = 5.0", "none adds no noise"]),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(config, changes, words):
    with pytest.raises(ConfigError) as error:
        validate_tree(config.replace(**changes), "task")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (CONFIG, {"given_frames": 1}, ["--image", "text alone"]),
        (FIRST, {}, ["none are given", "--image FILE"]),
        (FIRST, {"given_frames": 2}, ["--last-image", "leave it out"]),
        (BOTH, {"given_frames": 1}, ["the last frame is missing", "--last-image FILE"]),
        (BOTH, {"given_frames": 2, "frames": 1}, ["frames = 1", "two latent frames"]),
        (FIRST, {"given_frames": 1, "strength": 0.8}, ["--video", "text-to-video network"]),
        (CONFIG, {"strength": 0.1}, ["strength = 0.1 of 2 steps leaves none", "0.5"]),
        (CONFIG, {"strength": 1.5}, ["strength = 1.5", "at most 1"]),
    ],
)
def test_requests_that_cannot_be_served(config, changes, words):
    validate_tree(config)
    with pytest.raises(ValueError) as error:
        config.check_request(SampleRequest(**({"frames": 3, "height": 8, "width": 8} | changes)))
    assert all(word in str(error.value) for word in words), error.value


def test_a_length_that_the_rule_refuses_is_told_with_the_nearest_two():
    with pytest.raises(ValueError, match="4n \\+ 1 frames; take 5 or 9"):
        CONFIG.replace(vae=None, temporal_compression=4).latent_shape(8, 8, 8)


def random_parameters(config) -> dict:
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape, np.float32)), network.shapes)
        for name, network in config.build().networks.items()
    }


def batch_of(config) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {"slot": np.arange(BUCKET.batch_size, dtype=np.int32)}
    for name, spec in config.build().fields(BUCKET).items():
        shape = (BUCKET.batch_size, *spec.shape)
        floating = spec.dtype == np.float32
        arrays[name] = rng.standard_normal(shape, np.float32) if floating else rng.integers(0, 255, shape, spec.dtype)
    return {name: jnp.asarray(value) for name, value in arrays.items()}


def test_frames_of_an_example():
    rng = np.random.default_rng(0)
    video, latents = rng.integers(0, 255, (3, 8, 8, 3), np.uint8), np.zeros((3, 4, 4, 8), np.float32)
    example = {"video": video, "latents": latents, "caption": "red"}
    for config, wanted in ((FIRST, video[[0]]), (BOTH, video[[0, 2]])):
        task = config.build()
        made = task.preprocess(example)
        np.testing.assert_array_equal(made["given"], wanted)
        assert {name: array.shape for name, array in made.items()} == {
            name: spec.shape for name, spec in task.fields(BUCKET).items()
        }
        # The frames of a clip that is pixels are taken from it.
        assert set(config.replace(latents="pixels").build().preprocess(example)) == {"video", "tokens"}
    with pytest.raises(ValueError, match="cached latents only; build it with .*--keep-clips"):
        FIRST.build().preprocess({"latents": latents, "caption": "red"})


def test_latents_of_given_frames_are_noised_dropped_and_placed():
    task, frozen, key, slots = BOTH.replace(sample_posterior=False).build(), random_frozen(), jax.random.key(2), None
    batch = batch_of(BOTH)
    slots, frames = batch["slot"], batch["given"]
    plain = jax.jit(lambda f: task.given.condition(f, frames, key, slots, 4))(frozen)
    assert plain.shape == (4, 4, 4, 4, 4)
    np.testing.assert_array_equal(plain[:, 1:3], 0)
    for place, number in ((0, 0), (-1, 1)):
        alone = (task.encode(frozen, frames[:, number][:, None])[..., :4] - 0.25) * 2.0
        np.testing.assert_allclose(plain[:, place], alone[:, 0], atol=1e-4)

    drawn = BOTH.replace(sample_posterior=False, condition_dropout=0.5).build().given.training_condition
    noised = jax.jit(lambda f, key: drawn(f, batch, key, 3))(frozen, key)
    empty = np.array([not np.any(row) for row in np.asarray(noised)])
    assert 0 < empty.sum() < 4
    assert np.abs(np.asarray(noised - plain[:, jnp.asarray([0, 1, 3])]))[~empty].max() > 1e-3
    # exp(N(-3, 0.5)): one deviation a clip, near the published mean.
    many = jnp.zeros((512, 1, 8, 8, 3))
    levels = np.std(given_frames.noised(many, key, jnp.arange(512), mean=-3.0, std=0.5), axis=(1, 2, 3, 4))
    assert np.mean(np.log(levels)) == pytest.approx(-3.0, abs=0.07) and np.std(np.log(levels)) == pytest.approx(
        0.5, abs=0.06
    )
    np.testing.assert_array_equal(given_frames.noised(many, key, jnp.arange(512), mean=None, std=0.5), many)


def test_microbatches_and_slots_have_draws_of_their_own():
    """A clip's noise on its frame belongs to its slot, not to its place in a batch."""
    task, frozen, batch = FIRST.replace(condition_dropout=0.5).build(), random_frozen(), batch_of(FIRST)
    run = jax.jit(lambda f, b: task.given.training_condition(f, b, jax.random.key(1), 3))
    whole = run(frozen, batch)
    part = run(frozen, {name: array[2:] for name, array in batch.items()})
    np.testing.assert_allclose(part, whole[2:], atol=1e-5)


@pytest.mark.parametrize("config", [FIRST, PAIRS], ids=["first_frame", "pairs of frames"])
def test_the_loss_and_clips_depend_on_the_given_frames(config):
    task, frozen, key = (
        config.replace(condition_dropout=0.0, guidance=config.guidance).build(),
        random_frozen(),
        jax.random.key(0),
    )
    parameters, batch = random_parameters(config), batch_of(config)
    other = {**batch, "given": 255 - batch["given"]}
    run = jax.jit(lambda p, f, b: task.evaluate(p, f, b, key))
    first, second = run(parameters, frozen, batch), run(parameters, frozen, other)
    assert np.isfinite(first["loss"]) and first["loss"] != second["loss"]
    assert first["validation_loss"].total != second["validation_loss"].total

    request = SampleRequest(frames=3, height=8, width=8, given_frames=1)
    config.check_request(request)
    sample = jax.jit(lambda p, f, frames: task.generate(
        p, f, batch["tokens"], batch["slot"], key, request, GivenPixels(frames=frames)).pixels)  # fmt: skip
    made, moved = sample(parameters, frozen, batch["given"]), sample(parameters, frozen, other["given"])
    assert made.shape == (4, 3, 8, 8, 3) and np.any(made != moved)
    shown = jax.jit(task.visualize)(parameters, frozen, batch, key)
    assert shown["sample"].pixels.shape == shown["data"].pixels.shape == (4, 3, 8, 8, 3)


def test_patches_of_two_frames_are_trained_on_repeated_first_latents():
    task, frozen = PAIRS.build(), random_frozen()
    latents = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    assert task.given.padded(latents).ravel().tolist() == [0, 0, 1, 2]
    assert task.given.padded(latents[:, :2]).ravel().tolist() == [0, 1]
    assert PAIRS.latent_shape(3, 8, 8) == (3, 4, 4) and PAIRS.denoised_shape(3, 8, 8) == (4, 4, 4)
    assert task.fields(BUCKET)["latents"].shape[0] == 3
    PAIRS.check_bucket(BUCKET)
    video = CONFIG.replace(denoiser=CONFIG.denoiser.replace(temporal_patch=2)).build()
    batch = batch_of(video.config)
    assert np.isfinite(
        jax.jit(lambda p: video.loss(p, frozen, batch, jax.random.key(0))[0])(random_parameters(video.config))
    )


# A video that is changed.


def test_sampling_starts_from_part_of_a_video():
    task, frozen, key = (
        CONFIG.replace(sampler=SamplerConfig(kind="euler", steps=4)).build(),
        random_frozen(),
        jax.random.key(0),
    )
    parameters, batch = random_parameters(CONFIG), batch_of(CONFIG)
    video = jnp.asarray(np.random.default_rng(1).integers(0, 255, (4, 3, 8, 8, 3), np.uint8))

    def run(strength):
        request = SampleRequest(3, 8, 8, strength=strength)
        generate = jax.jit(lambda p, f, v: task.generate(
            p, f, batch["tokens"], batch["slot"], key, request, GivenPixels(video=v)))  # fmt: skip
        return generate(parameters, frozen, video)

    whole, part = run(1.0), run(0.5)
    assert (int(whole.finite.total), int(part.finite.total)) == (4, 2)
    # All of the noise: the video is gone.
    alone = jax.jit(lambda p, f: task.generate(p, f, batch["tokens"], batch["slot"], key, SampleRequest(3, 8, 8)))
    assert np.abs(np.asarray(whole.pixels, int) - np.asarray(alone(parameters, frozen).pixels, int)).max() <= 1
    assert np.any(np.asarray(part.pixels) != np.asarray(whole.pixels))


def test_the_steps_of_a_strength():
    assert [first_step(50, strength) for strength in (1.0, 0.8, 0.31, 0.02)] == [0, 10, 35, 49]
    schedule = ScheduleConfig(kind="cogvideox").build()
    for kind in ("ddim", "dpm_solver"):
        sampler = SamplerConfig(kind=kind, steps=10)
        whole, part = (coefficients(sampler, schedule, "v", first=first) for first in (0, 4))
        np.testing.assert_array_equal(part.timesteps, whole.timesteps[4:])
        # A multistep sampler has no earlier estimate at its first step.
        assert part.previous_clean[0] == 0 and (kind == "ddim") == np.allclose(part.clean, whole.clean[4:])
    start = partly_noised(jnp.ones((1, 2)), jnp.zeros((1, 2)), sampler=sampler, schedule=schedule, first=4)
    np.testing.assert_allclose(start, schedule.levels(np.array([599]))[0][0], rtol=1e-6)


# A start from text to video.

STARTS = {
    "5b": VideoDiTConfig(
        layers=2, heads=1, head_width=16, in_channels=6, out_channels=3, text_width=8, text_length=3, condition_width=8,
        positions=Positions.ROTARY_AND_LEARNED, sample_height=4, sample_width=4, sample_frames=2,
    ),
    "1.5": VideoDiTConfig(
        layers=2, heads=1, head_width=16, in_channels=6, out_channels=3, text_width=8, text_length=3, condition_width=8,
        positions=Positions.ROTARY, rotary_grid=RotaryGrid.SLICE, temporal_patch=2, offset_width=8, sample_height=4,
        sample_width=4, sample_frames=2, aggregation=AggregationConfig(),
    ),
}  # fmt: skip


def network_of(config: VideoDiTConfig) -> Network:
    return Network.of(lambda rngs: VideoDiT(config, rngs=rngs))


@pytest.mark.parametrize("name", STARTS)
def test_image_to_video_begins_as_text_to_video(name):
    config = STARTS[name]
    parent = conditioned_start.without_condition(config)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    parameters = jax.tree.map(lambda leaf: normal(*leaf.shape), network_of(parent).shapes)
    network = network_of(config)
    begun = conditioned_start.begin(parameters, config, network.shapes)
    flat = flatten(begun)
    missing = {path: shape for path, shape in flatten(network.shapes).items() if path not in flat}
    assert all(path.startswith("offset_embedding/hidden") for path in missing)
    for path, shape in missing.items():
        node = begun
        *folders, last = path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = normal(*shape.shape)
    noisy, given, text = (jnp.asarray(normal(*shape)) for shape in ((2, 2, 4, 4, 3), (2, 2, 4, 4, 3), (2, 3, 8)))
    times = jnp.asarray([900.0, 20.0])
    offsets = None if config.offset_width is None else jnp.asarray([2.0, 2.0])
    apply = lambda network: jax.jit(lambda p, x, o: network.apply(p, x, text, times, offsets=o))  # noqa: E731
    wanted = apply(network_of(parent))(parameters, noisy, None)

    def loss(p):
        made = network.apply(p, jnp.concatenate([noisy, given], -1), text, times, offsets=offsets)
        return jnp.sum(made**2), made

    gradients, made = jax.jit(jax.grad(loss, has_aux=True))(begun)
    np.testing.assert_allclose(made, wanted, atol=1e-5 * float(np.abs(wanted).max()))
    # And everything that begins as zeros is trained.
    for path in conditioned_start.adaptations(config):
        if "hidden" not in path:
            assert np.abs(flatten(gradients)[path]).max() > 0, path


def test_buckets_of_one_frame_and_two_given_ones():
    FIRST.check_bucket(BucketConfig(frames=1, height=8, width=8, batch_size=1))
    with pytest.raises(ValueError, match="two latent frames"):
        BOTH.check_bucket(BucketConfig(frames=1, height=8, width=8, batch_size=1))


# Runs.


def experiment_of(config, name: str, **changes) -> Experiment:
    made = Experiment(
        name=name,
        task=config,
        data=DataConfig(sources=(SourceConfig(path="nowhere"),), buckets=(BUCKET,)),
        training=TrainingConfig(steps=1, precision=PrecisionConfig(compute_dtype="float32"), tensorboard=False),
    )
    return made.replace(**changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the weights of the VAE, of a text-to-video denoiser, and a run that begins with the latter."""
    path = tmp_path_factory.mktemp("parent")
    export_network(CONFIG.vae, random_frozen()["vae"], path / "vae")
    export_network(CONFIG.denoiser, random_parameters(CONFIG)["denoiser"], path / "denoiser")
    parent = experiment_of(CONFIG.replace(vae_weights=str(path / "vae")), "parent")
    import_run(path / "denoiser", parent, path / "run", network="denoiser")
    return path


def parameters_of(run: Path, program: Program) -> dict:
    wanted = {name: want for name, want in program.abstract_state().saved().items() if name.startswith("parameters/")}
    reader = CheckpointReader(run)
    restored = reader.restore(wanted, partial=True)
    reader.close()
    return restored.arrays


def test_a_run_of_image_to_video_begins_from_one_of_text_to_video(folder, tmp_path):
    """By `init_from`, with the text encoder, and by `jvgen import` of the network alone: the same denoiser."""
    child = experiment_of(WITH_OFFSET.replace(vae_weights=str(folder / "vae")), "child")
    import_run(folder / "denoiser", child, tmp_path / "imported", network="denoiser", init_condition=True)
    started = child.replace(init_from=InitFromConfig(run=str(folder / "run"), ema="raw"))
    program = Program.build(started, single_device_mesh())
    init_from.check(program)
    lines = []
    state = init_from.init_from(program, tmp_path, lines.append)
    assert not any("randomly" in line for line in lines)
    arrays = state.saved()
    parent = Program.build(experiment_of(CONFIG, "parent"), single_device_mesh())
    before, imported = parameters_of(folder / "run", parent), parameters_of(tmp_path / "imported", program)
    same = [path for path in before if path.startswith(("parameters/text_encoder", "parameters/denoiser/blocks"))]
    assert len(same) > 10
    for path in same:
        np.testing.assert_array_equal(arrays[path], before[path], err_msg=path)
    kernel = "parameters/denoiser/patch_embedding/projection/kernel"
    for made in (arrays, imported):
        np.testing.assert_array_equal(made[kernel].reshape(4, 8, 16)[:, :4], before[kernel].reshape(4, 4, 16))
        assert not np.any(made[kernel].reshape(4, 8, 16)[:, 4:])
        offset = "parameters/denoiser/offset_embedding/{}/kernel"
        assert np.any(made[offset.format("hidden")]) and not np.any(made[offset.format("output")])
    # Averages start from the parameters.
    for path in (path for path in arrays if path.startswith("ema/") and path.endswith("projection/kernel")):
        np.testing.assert_array_equal(arrays[path], arrays["parameters/" + path.split("/", 2)[2]])


def test_imports_that_need_to_be_said(folder, tmp_path):
    child = experiment_of(FIRST.replace(vae_weights=str(folder / "vae")), "child")
    with pytest.raises(ConfigError, match="no channels for the given frames.*pass --init-condition"):
        import_run(folder / "denoiser", child, tmp_path / "run", network="denoiser")
    parent = experiment_of(CONFIG.replace(vae_weights=str(folder / "vae")), "parent")
    with pytest.raises(ConfigError, match="--init-condition: the run's task has no condition"):
        import_run(folder / "denoiser", parent, tmp_path / "run", network="denoiser", init_condition=True)
