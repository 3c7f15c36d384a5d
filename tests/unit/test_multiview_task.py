"""The multi-view task: batches, loss and masks, which modules are active for which batch, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.store.records import KINDS
from jvgen.data.stream.config import BucketConfig
from jvgen.diffusion.collaborative import PairingConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.geometry import paths
from jvgen.geometry.cameras import Cameras
from jvgen.interop.to_torch import export_network
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nested import flatten
from jvgen.nn.lora import LoraConfig
from jvgen.saved_config import from_json, to_json
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.multiview import MultiViewConfig, view_slots
from jvgen.tasks.task import SampleRequest
from jvgen.tasks.text import TextConfig
from jvgen.training.telemetry.metrics import to_host

pytestmark = pytest.mark.usefixtures("quick_compilations")

CONFIG = MultiViewConfig(
    denoiser=MultiViewDiTConfig(
        layers=2, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=8,
        temporal_compression=1, sync=SyncConfig(every=1, groups=4), adapter_rank=2,
    ),
    text=TextConfig(encoder=ByteTextConfig(width=8, layers=1, heads=2), length=6),
    vae=ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4),
    vae_weights="vae",
    spatial_compression=2,
    temporal_compression=1,
    schedule=ScheduleConfig(kind="rectified_flow"),
    objective=ObjectiveConfig(target="velocity"),
    sampler=SamplerConfig(kind="euler", steps=2),
    guidance=GuidanceConfig(kind="constant", scale=3.0),
)  # fmt: skip
FOLDED = BucketConfig(frames=5, height=8, width=8, batch_size=4, kinds=("static",))
WARPED = BucketConfig(frames=3, height=8, width=8, batch_size=4, kinds=("dynamic",))
RECORDED = BucketConfig(frames=3, height=8, width=8, batch_size=4, views=2)


@pytest.fixture(scope="module")
def task():
    return CONFIG.build()


@pytest.fixture(scope="module")
def parameters(task):
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), network.shapes)
        for name, network in task.networks.items()
    }


@pytest.fixture(scope="module")
def frozen(task):
    return {"vae": jax.jit(task.frozen_networks["vae"].init)(jax.random.key(1))}


@pytest.fixture(scope="module")
def loss(task):
    """Compiled once for each shape of a batch."""
    return jax.jit(lambda parameters, frozen, batch, key: task.loss(parameters, frozen, batch, key)[0])


def example_of(bucket: BucketConfig, seed: int = 0, **changes) -> dict:
    """An example of the data pipeline for a bucket: pixels, and moments as if they were cached."""
    rng = np.random.default_rng(seed)
    shape = (bucket.frames, bucket.height, bucket.width, 3)
    views = (bucket.views,) if bucket.views > 1 else ()
    extrinsics = paths.named_paths("circle", max(bucket.views, 2), bucket.frames, distance=1.0)
    return {
        "video": rng.integers(0, 255, (*views, *shape), np.uint8),
        "latents": rng.standard_normal((*views, bucket.frames, 4, 4, 8), np.float32),
        "caption": "a red ball",
        "kind": np.int32(KINDS.index(bucket.kinds[-1])),
        "seed": np.uint64(seed),
        "has_camera": np.bool_(True),
        "intrinsics": np.full((*views, bucket.frames, 4), 0.8, np.float32) * [1, 1, 0.625, 0.625],
        "extrinsics": (extrinsics if views else extrinsics[1]).astype(np.float32),
        **changes,
    }


def batch_of(task, bucket: BucketConfig) -> dict[str, jax.Array]:
    prepared = [task.preprocess(example_of(bucket, seed)) for seed in range(bucket.batch_size)]
    fields = task.fields(bucket)
    assert prepared[0].keys() == fields.keys()
    for name, spec in fields.items():
        assert (prepared[0][name].shape, len(spec.axes)) == (spec.shape, len(spec.shape)), name
    stacked = {name: jnp.asarray(np.stack([one[name] for one in prepared]), fields[name].dtype) for name in fields}
    return {**stacked, "slot": jnp.arange(bucket.batch_size, dtype=jnp.int32)}


# Batches -------------------------------------------------------------------------------------------------------------


def test_static_clips_are_folded(task):
    example = example_of(FOLDED)
    made = CONFIG.replace(latents="pixels").build().preprocess(example)
    np.testing.assert_array_equal(made["video"], [example["video"][[2, 1, 0]], example["video"][2:]])
    np.testing.assert_array_equal(made["extrinsics"][0], example["extrinsics"][[2, 1, 0]])
    cached = task.preprocess(example)
    np.testing.assert_array_equal(cached["latents"], [example["latents"][[2, 1, 0]], example["latents"][2:]])


def test_dynamic_clips_are_warped_by_their_seed(task):
    first, same, other = (task.preprocess(example_of(WARPED) | {"seed": np.uint64(s)}) for s in (1, 1, 2))
    np.testing.assert_array_equal(first["video"], same["video"])
    assert (first["homographies"] != other["homographies"]).any()
    assert first["valid"].shape == (2, 3, 4, 4) and first["valid"][0].all()


@pytest.mark.parametrize(
    "bucket, changes, message",
    [
        (FOLDED, {"has_camera": np.bool_(False)}, "an example of several views has no cameras"),
        (RECORDED, {"has_camera": np.bool_(False)}, "its data set needs cameras"),
        (FOLDED, {"latents": None}, "lacks 'latents': the data set has none; cache latents with"),
        (WARPED, {"video": None}, "lacks 'video': dynamic clips are warped as pixels"),
    ],
)
def test_incomplete_examples(task, bucket, changes, message):
    example = {name: value for name, value in example_of(bucket, **changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        task.preprocess(example)


@pytest.mark.parametrize(
    "bucket, changes, message",
    [
        (FOLDED.replace(frames=4), {}, "frames = 4: 2N - 1 frames are folded into two views of N; must be odd"),
        (
            FOLDED.replace(kinds=("static", "dynamic")),
            {},
            r"kinds = \('static', 'dynamic'\): single clips become two views",
        ),
        (WARPED, {"vae": None, "vae_weights": None}, "copies are warped as pixels; set task.vae"),
        (WARPED.replace(width=10), {}, "width = 10: must be a multiple of 4"),
        (RECORDED.replace(views=65), {}, "views = 65: must be at most 64"),
        (FOLDED.replace(frames=17), {"vae": None, "temporal_compression": 4}, "cannot be reversed; set task.latents"),
    ],
)
def test_invalid_buckets(bucket, changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**changes).check_bucket(bucket)


# Loss ----------------------------------------------------------------------------------------------------------------


def test_the_loss_does_not_depend_on_microbatches(task, parameters, frozen, loss):
    """Noise, timesteps, directions of lines and dropped captions are drawn per example and view."""
    batch, key = batch_of(task, FOLDED), jax.random.key(5)

    def mean(*microbatches: list[int]) -> float:
        return np.mean(
            [loss(parameters, frozen, {n: v[np.array(m)] for n, v in batch.items()}, key) for m in microbatches]
        )

    assert mean([0, 1], [2, 3]) == pytest.approx(mean([3, 1], [2, 0]), rel=1e-5)
    assert mean([0, 1]) != pytest.approx(mean([2, 3]), rel=1e-3)


@pytest.mark.parametrize("bucket", [FOLDED, WARPED], ids=["folded", "warped"])
def test_which_modules_are_active_for_which_batch(task, parameters, frozen, bucket):
    """Synchronization always; rays and the adapter where there are cameras."""
    batch = {name: value[:1] for name, value in batch_of(task, bucket).items()}

    @jax.jit
    def gradient(views, others, frozen, batch):
        def loss(views):
            return task.loss({**others, "views": views}, frozen, batch, jax.random.key(5))

        return jax.value_and_grad(loss, has_aux=True)(views)

    (loss, metrics), gradients = gradient(parameters["views"], parameters, frozen, batch)
    assert np.isfinite(loss) and loss > 0
    found = to_host(metrics)
    assert found["loss_cameras" if bucket is FOLDED else "loss_warped"] == pytest.approx(float(loss), rel=1e-5)
    moves = {name: max(np.abs(leaf).max() for leaf in jax.tree.leaves(part)) > 0 for name, part in gradients.items()}
    assert moves == {"sync": True, "rays": bucket is FOLDED, "adapter": bucket is FOLDED}


def test_masked_pixels_of_a_copy_have_no_error(task, parameters, frozen, loss):
    batch = batch_of(task, WARPED)

    def where(valid: jax.Array) -> jax.Array:
        return loss(parameters, frozen, {**batch, "valid": valid}, jax.random.key(0))

    full = where(jnp.ones_like(batch["valid"]))
    assert float(where(jnp.zeros_like(batch["valid"]))) == 0.0
    half = where(jnp.ones_like(batch["valid"]).at[:, 1].set(0))
    assert 0 < float(half) < float(full), "the mean is over all elements, as released"


def test_validation_loss_of_pairs(parameters, frozen):
    """The mean over views and fixed timesteps; as in training, what is outside a copy has no error."""
    task = CONFIG.replace(validation_timesteps=2).build()
    batch = {name: value[:1] for name, value in batch_of(task, WARPED).items()}
    run = jax.jit(lambda batch: task.validation_loss(parameters, frozen, batch, jax.random.key(5)))
    whole, nothing = (to_host(run({**batch, "valid": jnp.full_like(batch["valid"], share)})) for share in (1, 0))
    assert set(whole) == {"validation_loss", "validation_loss_t0250", "validation_loss_t0750"}
    assert min(whole.values()) > 0 and set(nothing.values()) == {0.0}


def test_views_have_their_own_random_numbers():
    slots = np.asarray(view_slots(jnp.arange(5, dtype=jnp.int32), 3))
    assert len(set(slots.tolist())) == 15
    np.testing.assert_array_equal(view_slots(jnp.asarray([4], jnp.int32), 3), slots[12:])


def test_timesteps_of_a_pair(task, parameters, frozen):
    """One for each view, as released, or one for both."""
    batch, key, seen = batch_of(task, FOLDED), jax.random.key(0), []
    for one in (False, True):
        chosen = CONFIG.replace(one_timestep=one).build()
        denoise = chosen.denoise

        def watched(parameters, noisy, timesteps, *args, denoise=denoise, **kwargs):
            seen.append(timesteps)
            return denoise(parameters, noisy, timesteps, *args, **kwargs)

        chosen.denoise = watched
        pairs = jax.jit(lambda b, chosen=chosen: (chosen.loss(parameters, frozen, b, key)[0], seen[-1])[1])(batch)
        pairs = np.asarray(pairs).reshape(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all() == one


def test_layers_are_analyzed_of_single_clips(task, parameters, frozen):
    with pytest.raises(ValueError, match="a run of several views: .* give a run of single clips"):
        task.analyze_layers(parameters, frozen, batch_of(task, RECORDED), jax.random.key(0), jnp.float32(300))


def test_a_frozen_transformer(task, parameters, frozen, loss, tmp_path):
    """Its weights are read from a folder, and only the multi-view modules are trained, saved and exported."""
    names = {"denoiser": CONFIG.denoiser.plain, "text_encoder": CONFIG.text.encoder}
    folders = {n: str(export_network(config, parameters[n], tmp_path / n)) for n, config in names.items()}
    config = CONFIG.replace(
        denoiser_weights=folders["denoiser"], text_encoder_weights=folders["text_encoder"], vae=None, vae_weights=None
    )
    config.check_weights()
    frozen_task = config.build()
    assert set(frozen_task.networks) == set(frozen_task.network_configs) == {"views"}
    loaded = frozen_task.load_frozen()
    np.testing.assert_array_equal(
        loaded["denoiser"]["output"]["kernel"], np.asarray(parameters["denoiser"]["output"]["kernel"])
    )
    assert (
        frozen_task.frozen_digest()
        and frozen_task.frozen_digest() != task.config.replace(vae_weights=None).build().frozen_digest()
    )
    other = config.replace(denoiser=config.denoiser.replace(layers=4))
    with pytest.raises(ValueError, match="task.denoiser_weights = .* holds another network"):
        other.check_weights()
    batch, key = {name: value[:2] for name, value in batch_of(frozen_task, FOLDED).items()}, jax.random.key(0)
    own = {"views": parameters["views"]}
    frozen_loss = jax.jit(lambda p, f: frozen_task.loss(p, f, batch, key)[0])(own, jax.tree.map(jnp.asarray, loaded))
    np.testing.assert_allclose(frozen_loss, loss(parameters, frozen, batch, key), rtol=1e-6)


def test_a_lora_is_trained_beside_the_modules(parameters, frozen, loss, tmp_path):
    """Of both networks, and with the adapter for cameras in the same layers; at first it changes nothing."""
    names = {"denoiser": CONFIG.denoiser.plain, "text_encoder": CONFIG.text.encoder}
    folders = {n: str(export_network(config, parameters[n], tmp_path / n)) for n, config in names.items()}
    targets = ("denoiser/blocks/layers/attention/query$", "text_encoder/blocks/layers/value")
    own = CONFIG.replace(
        lora=LoraConfig(rank=2, targets=targets),
        denoiser_weights=folders["denoiser"], text_encoder_weights=folders["text_encoder"],
    ).build()  # fmt: skip
    assert set(own.networks) == {"lora", "views"} and set(own.network_configs) == {"views"}
    batch, key = {name: value[:2] for name, value in batch_of(own, FOLDED).items()}, jax.random.key(0)
    weights = {**frozen, **{name: parameters[name] for name in names}}
    trained = {"lora": jax.jit(own.networks["lora"].init)(key), "views": parameters["views"]}
    found, gradient = jax.jit(jax.value_and_grad(lambda p: own.loss(p, weights, batch, key)[0]))(trained)
    np.testing.assert_allclose(found, loss(parameters, frozen, batch, key), rtol=1e-6)
    for path, leaf in flatten(gradient["lora"]).items():
        # The first factors have no gradient as long as the second ones are zero.
        assert (np.abs(leaf).max() > 0) == path.endswith("/up"), path
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient["views"])) > 0


# Sampling ------------------------------------------------------------------------------------------------------------

REQUEST = SampleRequest(frames=3, height=8, width=8)


def cameras_of(examples: int, views: int) -> Cameras:
    extrinsics = paths.named_paths("circle", views, REQUEST.frames)
    intrinsics = paths.default_intrinsics(views, REQUEST.frames, 1.0)
    return Cameras(*(jnp.float32(np.broadcast_to(part, (examples, *part.shape))) for part in (intrinsics, extrinsics)))


@pytest.mark.parametrize(
    "views, pairing",
    [(3, PairingConfig(matchings=2)), pytest.param(2, PairingConfig(repeats=2), marks=pytest.mark.slow)],
)
def test_views_are_generated(task, parameters, frozen, views, pairing):
    chosen = CONFIG.replace(pairing=pairing).build()

    @jax.jit
    def generate(parameters, frozen, tokens, slots):
        cameras = cameras_of(2, views)
        return chosen.generate_views(parameters, frozen, tokens, cameras, slots, jax.random.key(0), REQUEST)

    def make(tokens, slots):
        return generate(parameters, frozen, tokens, slots)

    tokens = jnp.asarray(chosen.tokens(["a red ball", "a blue cube"]))
    made, finite = jax.device_get(make(tokens, jnp.asarray([7, 9])))
    assert finite.all().tolist() == [True, True] and [finite.fault(row) for row in (0, 1)] == [None, None]
    assert finite.steps.tolist() == [int(finite.total)] * 2
    assert made.shape == (2, views, 3, 8, 8, 3) and made.dtype == np.uint8
    assert (made[:, 0] != made[:, 1]).any()
    again = np.asarray(make(tokens[::-1], jnp.asarray([9, 7])).pixels)
    assert np.abs(made[::-1].astype(int) - again).max() <= 1, "an example depends on its own slot and caption only"


def test_single_clips_are_generated_too(task, parameters, frozen):
    tokens = jnp.asarray(task.tokens(["a red ball"]))
    made = jax.eval_shape(
        lambda t: task.generate(parameters, frozen, t, jnp.asarray([0]), jax.random.key(0), REQUEST), tokens
    )
    assert made.pixels.shape == (1, 3, 8, 8, 3)


def test_visualized_clips(task, parameters, frozen):
    shown = jax.eval_shape(lambda b: task.visualize(parameters, frozen, b, jax.random.key(0)), batch_of(task, FOLDED))
    assert {name: clip.pixels.shape for name, clip in shown.items()} == {n: (4, 3, 8, 8, 3) for n in ("data", "sample")}
    shown = jax.eval_shape(lambda b: task.visualize(parameters, frozen, b, jax.random.key(0)), batch_of(task, WARPED))
    assert set(shown) == {"data"}


def test_the_configuration():
    validate_tree(CONFIG)
    assert from_json(to_json(CONFIG)) == CONFIG
    task = CONFIG.build()
    for bucket in (FOLDED, WARPED, RECORDED):
        assert all(value > 0 for value in task.flops(bucket).values())
    with pytest.raises(ConfigError, match="sync.band = -1.0"):
        validate_tree(CONFIG.replace(denoiser=CONFIG.denoiser.replace(sync=SyncConfig(every=1, groups=4, band=-1.0))))
    with pytest.raises(ConfigError, match="enhance: views are generated without it; leave it none"):
        validate_tree(CONFIG.replace(enhance=EnhanceConfig()))
    assert CONFIG.replace(visualize_clips=0).build().visualize({}, {}, {}, jax.random.key(0)) == {}


# Given frames --------------------------------------------------------------------------------------------------------


def test_every_view_has_a_first_frame_of_its_own(parameters, frozen):
    wide = CONFIG.denoiser.replace(in_channels=8)
    config = CONFIG.replace(condition="first_frame", denoiser=wide, condition_dropout=0.0, sample_posterior=False)
    validate_tree(config)
    task = config.build()
    rng = np.random.default_rng(1)
    kernel = 0.3 * rng.standard_normal((2 * 2 * 8, 16)).astype(np.float32)
    bias = parameters["denoiser"]["patch_embedding"]["projection"]["bias"]
    embedding = {"projection": {"kernel": jnp.asarray(kernel), "bias": bias}}
    weights = {**parameters, "denoiser": {**parameters["denoiser"], "patch_embedding": embedding}}
    for bucket in (FOLDED, RECORDED):
        batch = batch_of(task, bucket)
        assert batch["given"].shape == (4, 2, 1, 8, 8, 3)
        example = example_of(bucket)
        first = example["video"][:, :1] if bucket.views > 1 else np.stack([example["video"][[2]]] * 2)
        np.testing.assert_array_equal(batch["given"][0], first)
    run = jax.jit(jax.value_and_grad(lambda trained, batch: task.loss(trained, frozen, batch, jax.random.key(0))[0]))
    (value, gradients), (other, _) = run(weights, batch), run(weights, {**batch, "given": 255 - batch["given"]})
    assert np.isfinite(value) and value != other
    # The channels of the given frames and the modules between views are trained.
    of_given = gradients["denoiser"]["patch_embedding"]["projection"]["kernel"].reshape(2, 2, 8, 16)[:, :, 4:]
    moved = [float(jnp.abs(leaf).max()) for leaf in (of_given, *jax.tree.leaves(gradients["views"]))]
    assert np.isfinite(moved).all() and moved[0] > 0 and max(moved[1:]) > 0

    cameras = Cameras(batch["intrinsics"], batch["extrinsics"])
    request = SampleRequest(3, 8, 8, given_frames=1)
    config.check_request(request)
    sample = jax.jit(lambda frames: task.generate_views(
        weights, frozen, batch["tokens"], cameras, batch["slot"], jax.random.key(0), request, GivenPixels(frames=frames)
    ).pixels)  # fmt: skip
    one = sample(batch["given"])
    other = sample(batch["given"].at[:, 1].set(255 - batch["given"][:, 1]))
    assert one.shape == (4, 2, 3, 8, 8, 3) and np.any(one[:, 1] != other[:, 1])
