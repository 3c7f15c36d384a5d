"""The image VAE task: its loss, its metrics, draws per slot, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.stream.config import BucketConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.tasks.image_vae import ImageVAETaskConfig
from jvgen.tasks.task import SampleRequest
from jvgen.training.step import accumulate
from jvgen.training.telemetry.metrics import to_host

pytestmark = pytest.mark.usefixtures("quick_compilations")

CONFIG = ImageVAETaskConfig(
    network=ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4),
    perceptual=PerceptualConfig(kind="laplacian", levels=2),
    kl_weight=1e-2,
)
BUCKET = BucketConfig(frames=3, height=12, width=12, batch_size=4)


@pytest.fixture(scope="module")
def parameters():
    task = CONFIG.build()
    return jax.jit(task.init)(jax.random.key(0))


def batch_of(bucket: BucketConfig = BUCKET, task_config: ImageVAETaskConfig = CONFIG) -> dict[str, jax.Array]:
    spec = task_config.build().fields(bucket)["video"]
    video = np.random.default_rng(0).integers(0, 256, (bucket.batch_size, *spec.shape), dtype=np.uint8)
    return {"video": jnp.asarray(video), "slot": jnp.arange(bucket.batch_size, dtype=jnp.int32)}


def losses(task_config: ImageVAETaskConfig, parameters, batch, key, accumulation: int):
    """Loss and metrics of a step, without its gradient."""
    task = task_config.build()

    def run(parameters, batch, key):
        return accumulate(lambda _, some: task.loss(parameters, {}, some, key), {}, batch, accumulation)[0]

    loss, metrics = jax.jit(run)(parameters, batch, key)
    return float(loss), to_host(metrics)


@pytest.fixture(scope="module")
def whole(parameters):
    """Loss and metrics of one batch of which two frames of three are used."""
    return losses(CONFIG.replace(frames_per_clip=2), parameters, batch_of(), jax.random.key(3), 1)


def test_microbatches_have_the_same_loss(parameters, whole):
    """The posterior's noise and the frames that are picked belong to a slot, not to its place in a microbatch."""
    loss, metrics = whole
    parts, of_parts = losses(CONFIG.replace(frames_per_clip=2), parameters, batch_of(), jax.random.key(3), 2)
    assert parts == pytest.approx(loss, rel=1e-5)
    assert of_parts == pytest.approx(metrics, rel=1e-4)


def test_the_loss_is_the_sum_of_its_parts(whole):
    loss, metrics = whole
    assert np.isfinite(loss) and loss > 0
    assert set(metrics) == {"reconstruction", "perceptual_laplacian", "kl_per_element", "psnr"}
    parts = metrics["reconstruction"] + metrics["perceptual_laplacian"] + 1e-2 * metrics["kl_per_element"]
    assert loss == pytest.approx(parts, rel=1e-6)


def test_drawn_frames_are_distinct_and_equal_in_every_view(key):
    task = CONFIG.replace(frames_per_clip=2).build()
    bucket = BUCKET.replace(views=2, frames=5, batch_size=6)
    shape = (bucket.batch_size, *task.fields(bucket)["video"].shape)
    assert shape == (6, 2, 5, 12, 12, 3)
    numbers = jnp.broadcast_to(jnp.arange(5)[:, None, None, None], shape)
    chosen = np.asarray(task._draw_frames(numbers, jnp.arange(6), key))
    assert chosen.shape == (6, 2, 2, 12, 12, 3)
    picked = chosen[..., 0, 0, 0]
    assert (picked[:, 0] == picked[:, 1]).all()
    assert (picked[:, :, 0] != picked[:, :, 1]).all() and len(np.unique(picked)) > 2
    some = np.asarray(task._draw_frames(numbers[3:5], jnp.array([3, 4]), key))
    np.testing.assert_array_equal(some, chosen[3:5])


def test_evaluation_uses_the_posterior_mean(parameters):
    task, batch = CONFIG.build(), batch_of()

    @jax.jit
    def run(parameters, batch, key):
        return task.evaluate(parameters, {}, batch, key), task.visualize(parameters, {}, batch, key)

    first, shown = run(parameters, batch, jax.random.key(1))
    second, _ = run(parameters, batch, jax.random.key(2))
    assert to_host(first) == to_host(second)
    assert set(to_host(first)) == {"psnr", "ssim", "l1", "perceptual_laplacian", "latent_mean", "latent_square"}
    reconstruction, finite = shown["reconstruction"]
    assert shown["data"].shape == reconstruction.shape == (4, 3, 12, 12, 3) and finite.all()
    np.testing.assert_array_equal(shown["data"], batch["video"])
    # What is measured is what is shown, up to the rounding to whole pixels.
    error = np.asarray(reconstruction, np.float64) / 127.5 - np.asarray(batch["video"], np.float64) / 127.5
    assert np.abs(error).mean() == pytest.approx(to_host(first)["l1"], abs=1 / 255)
    assert reconstruction.dtype == jnp.uint8


def test_flops_count_the_frames_used():
    clip, frame = (CONFIG.replace(frames_per_clip=n).build().flops(BUCKET) for n in (0, 1))
    assert sum(clip.values()) == pytest.approx(3 * sum(frame.values()))
    both = CONFIG.build().flops(BUCKET.replace(views=2))
    assert sum(both.values()) == pytest.approx(2 * sum(clip.values()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_weight": -1.0}, ["kl_weight = -1.0", "must be at least 0"]),
        ({"perceptual_weight": -0.5}, ["perceptual_weight = -0.5", "must be at least 0"]),
        ({"frames_per_clip": -2}, ["frames_per_clip = -2", "0 for all"]),
        ({"network": CONFIG.network.replace(groups=3)}, ["network", "groups = 3", "does not divide", "block_channels"]),
        ({"perceptual": PerceptualConfig(kind="lpips")}, ["perceptual", "weights = none", "safetensors"]),
    ],
)
def test_mistakes_in_the_config(changes, words):
    with pytest.raises(ConfigError) as error:
        validate_tree(CONFIG.replace(**changes), "task")
    assert all(word in str(error.value) for word in ["task", *words]), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 13}, ["height = 13", "multiple of 2", "take 12"]),
        ({"width": 10}, ["width = 10", "at least 11", "SSIM"]),
        ({"frames": 1}, ["frames = 1", "frames_per_clip = 2"]),
    ],
)
def test_batch_shapes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError) as error:
        CONFIG.replace(frames_per_clip=2).check_bucket(BUCKET.replace(**changes))
    assert all(word in str(error.value) for word in words), error.value


def test_needs_pixels_and_refuses_prompts(tmp_path):
    with pytest.raises(ValueError, match="cached latents and no pixels"):
        CONFIG.build().preprocess({"latents": np.zeros((3, 4, 4, 8), np.float32), "caption": ""})
    with pytest.raises(ValueError, match="text-to-video run"):
        CONFIG.check_request(SampleRequest(1, 12, 12))
    missing = CONFIG.replace(perceptual=PerceptualConfig(kind="lpips", weights=str(tmp_path / "vgg.safetensors")))
    with pytest.raises(ValueError, match="vgg.safetensors.*no such file"):
        missing.check_weights()
