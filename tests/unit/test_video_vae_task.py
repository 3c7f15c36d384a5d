"""The video VAE task: losses and gradients, objectives, latents shared with an image VAE, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.data.stream.config import BucketConfig
from jvgen.interop.to_torch import export_network
from jvgen.losses.adversarial import adaptive_weight, hinge_discriminator, hinge_generator, surrogate_loss
from jvgen.losses.frame_mapping import draw_picks, map_frames
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.clip_discriminator import flops as discriminator_flops
from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.models.clip_discriminator.model import ClipDiscriminator, halve
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.inflate import inflate
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.tasks.adversarial import AdversarialConfig
from jvgen.tasks.video_vae import SharedLatentsConfig, VideoVAETaskConfig
from jvgen.training.step import accumulate
from jvgen.training.telemetry.metrics import to_host

pytestmark = pytest.mark.usefixtures("quick_compilations")

IMAGE = ImageVAEConfig(block_channels=(4, 8), layers_per_block=1, groups=2, mid_attention=False)
BUCKET = BucketConfig(frames=5, height=12, width=12, batch_size=2)
ADVERSARIAL = AdversarialConfig(network=ClipDiscriminatorConfig(width=4, halvings=1, groups=2), weight=0.7)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Against a discriminator, with latents shared on both sides."""
    network = Network.of(lambda rngs: _image(rngs))
    parameters = jax.tree.map(lambda leaf: 1.5 * np.asarray(leaf), jax.jit(network.init)(jax.random.key(5)))
    folder = export_network(IMAGE, parameters, tmp_path_factory.mktemp("image") / "vae")
    return VideoVAETaskConfig(
        network=CVVAEConfig.causal(IMAGE),
        image_vae=IMAGE,
        image_vae_weights=str(folder),
        shared=SharedLatentsConfig(decoder_weight=0.8, encoder_weight=0.6, mapping="random"),
        perceptual=PerceptualConfig(kind="laplacian", levels=2),
        kl_weight=1e-2,
        # Steps before and after its start are one program: the step is in the batch.
        adversarial=ADVERSARIAL.replace(start=7),
    )


def _image(rngs):
    from jvgen.models.image_vae.model import ImageVAE

    return ImageVAE(IMAGE, rngs=rngs)


@pytest.fixture(scope="module")
def given(config):
    """Parameters, frozen parameters and a batch."""
    task = config.build()
    parameters = jax.jit(task.init)(jax.random.key(0))
    parameters["scales"] = {"reconstruction": jnp.array([0.3]), "shared": jnp.array([-0.2])}
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 12, 12, 3), dtype=np.uint8)
    batch = {"video": jnp.asarray(video), "slot": jnp.arange(2), "step": jnp.full((2,), 7)}
    return parameters, jax.device_put(task.load_frozen()), batch


def gradient_of(method):
    run = jax.jit(jax.value_and_grad(method, has_aux=True))

    def gradient(parameters, frozen, batch):
        (loss, metrics), gradient = run(parameters, frozen, batch, jax.random.key(3))
        return float(loss), to_host(metrics), gradient

    return gradient


@pytest.fixture(scope="module")
def both_losses(config):
    return gradient_of(config.build().both_losses)


@pytest.fixture(scope="module")
def together(both_losses, given):
    return both_losses(*given)


@pytest.mark.slow
def test_gradient_equals_that_of_the_explicit_losses(config, given, together):
    """With the adaptive weight from derivatives with respect to the kernel itself, and no pass shared or cut short."""
    parameters, frozen, batch = given
    task = config.build()

    def parts(parameters, key):
        made, moments, latents = task._reconstruct(parameters["vae"], frozen, batch, key)
        errors, _ = task._errors(frozen, made)
        judged = [task.adversarial.scores(jax.lax.stop_gradient(parameters["discriminator"]), m.clips) for m in made]
        adversarial = 0.5 * sum(hinge_generator(one) for one in judged)
        return errors, adversarial, made, moments, latents

    def norms_of_derivatives(parameters, key):
        def function(kernel):
            decoder = parameters["vae"]["decoder"]
            changed = {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}
            return parts({**parameters, "vae": {**parameters["vae"], "decoder": changed}}, key)[:2]

        _, pull_back = jax.vjp(function, parameters["vae"]["decoder"]["conv_out"]["kernel"])
        return (jnp.linalg.norm(pull_back(which)[0]) for which in ((1.0, 0.0), (0.0, 1.0)))

    def written_out(parameters, key):
        errors, adversarial, made, moments, latents = parts(parameters, key)
        scale, other = (parameters["scales"][name][0] for name in ("reconstruction", "shared"))
        pull, push = norms_of_derivatives(parameters, key)
        weight = jax.lax.stop_gradient(0.7 * jnp.exp(-scale) * pull / (push + 1e-4))
        shared = task._shared_error(frozen, batch, key, latents)
        from jvgen.models.image_vae import posterior

        divergence = jnp.mean(posterior.kl_divergence(moments)) / (5 * 12 * 12 * 3)
        real = jnp.asarray(batch["video"], jnp.float32) / 127.5 - 1
        against = [
            hinge_discriminator(
                task.adversarial.scores(parameters["discriminator"], real),
                task.adversarial.scores(parameters["discriminator"], jax.lax.stop_gradient(one.clips)),
            )
            for one in made
        ]
        return (
            errors * jnp.exp(-scale) + scale + weight * adversarial
            + 0.8 * (shared * jnp.exp(-other) + other) + 1e-2 * divergence + 0.5 * sum(against)
        )  # fmt: skip

    loss, expected = jax.jit(jax.value_and_grad(written_out))(parameters, jax.random.key(3))
    found_loss, metrics, found = together
    assert found_loss == pytest.approx(float(loss), rel=1e-5) and metrics["adaptive_weight"] > 1e-3
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, got in found.items():
        want = expected[path]
        atol = max(1e-4 * float(jnp.abs(want).max()), 1e-6 * largest)
        np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=path)


def test_alternating_and_joint_updates_have_equal_gradients(config, given, together):
    parameters, frozen, batch = given
    task = config.build()
    _, _, both = together
    _, _, against = gradient_of(task.discriminator_loss)(parameters, frozen, batch)
    ours, alternating = flatten(both["discriminator"]), flatten(against["discriminator"])
    assert ours.keys() == alternating.keys()
    for path, got in ours.items():
        want = alternating[path]
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())), err_msg=path)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(against["vae"]))


def test_objectives(config):
    together = config.build().objectives()
    assert [o.name for o in together] == ["autoencoder", "scales", "discriminator"]
    assert len({o.loss for o in together}) == 1 and {o.update_schedule for o in together} == {(0, 1)}
    alternate = config.replace(adversarial=ADVERSARIAL.replace(update_schedule="alternate")).build().objectives()
    assert [o.update_schedule for o in alternate] == [(0, 2), (0, 2), (1, 2)]
    assert alternate[0].loss == alternate[1].loss != alternate[2].loss
    alone = config.replace(adversarial=None, learned_scales=False).build()
    assert [o.name for o in alone.objectives()] == ["autoencoder"] and set(alone.networks) == {"vae"}
    assert set(alone.network_configs) == {"vae"}


def test_discriminator_has_no_effect_before_its_start(both_losses, given):
    parameters, frozen, batch = given
    _, metrics, gradient = both_losses(parameters, frozen, {**batch, "step": jnp.full((2,), 6)})
    assert metrics["adaptive_weight"] == metrics["hinge"] == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["discriminator"]))
    assert np.any(gradient["vae"]["encoder"]["conv_in"]["kernel"])


def test_microbatches_have_the_same_loss_and_draws(config, given):
    parameters, frozen, batch = given
    task = config.replace(adversarial=None).build()

    def run(parameters, batch, count):
        return accumulate(lambda _, some: task.loss(parameters, frozen, some, jax.random.key(3)), {}, batch, count)[0]

    whole, parts = (jax.jit(functools.partial(run, count=count))(parameters, batch) for count in (1, 2))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
    found, expected = to_host(parts[1]), to_host(whole[1])
    assert found == pytest.approx(expected, rel=1e-4)
    assert {"l1", "psnr", "perceptual_laplacian", "kl_per_element", "image_decoder_error"} < set(found)


def test_evaluation_of_an_inflated_image_vae(config, given):
    """Before any training the image decoder reads the video latents as well as its own, and the other way round."""
    _, frozen, batch = given
    task = config.build()
    vae = inflate(IMAGE, jax.device_get(frozen["image_vae"]), config.network, task.networks["vae"].shapes)
    run = jax.jit(lambda p, f, b: (task.evaluate(p, f, b, jax.random.key(0)), task.visualize(p, f, b, None)))
    metrics, shown = run({"vae": vae}, frozen, batch)
    found = to_host(metrics)
    for measure in ("psnr", "ssim", "l1", "perceptual_laplacian"):
        assert found[f"image_decoder/{measure}"] == pytest.approx(found[f"image_alone/{measure}"], abs=1e-4)
        assert found[f"image_latents/{measure}"] == pytest.approx(found[measure], abs=1e-4)
    assert found["latent/squared_distance"] < 1e-9
    assert found["latent/mean_2"] == pytest.approx(found["image_latent/mean_2"], abs=1e-5)
    shown = {"data": shown.pop("data")} | {name: clips.pixels for name, clips in shown.items() if clips.finite.all()}
    assert {name: clip.shape for name, clip in shown.items()} == {
        name: (2, 5, 12, 12, 3) for name in ("data", "reconstruction", "image_decoder", "image_latents")
    }
    np.testing.assert_array_equal(shown["image_decoder"][:, 3], shown["image_decoder"][:, 4])


# Pure functions.


def test_frame_mappings():
    clip = jnp.broadcast_to(jnp.arange(9.0)[None, :, None, None, None], (2, 9, 1, 1, 1))

    def numbers(mapping, picks=None):
        return map_frames(clip, mapping, 4, picks)[..., 0, 0, 0].tolist()

    assert numbers("first") == [[0.0]] * 2
    assert numbers("slice") == [[0, 4, 8]] * 2
    assert numbers("average") == [[0, 2.5, 6.5]] * 2
    assert numbers("random", jnp.array([[0, 3], [2, 1]])) == [[0, 1, 8], [0, 3, 6]]
    assert map_frames(clip[:, :1], "average", 4).shape == (2, 1, 1, 1, 1)
    keys = jax.random.split(jax.random.key(0), 400)
    picks = np.asarray(draw_picks(keys, 2, 4))
    assert picks.shape == (400, 2) and set(picks.ravel()) == {0, 1, 2, 3}
    assert (picks[:, 0] != picks[:, 1]).mean() > 0.6
    np.testing.assert_array_equal(draw_picks(keys[7:9], 2, 4), picks[7:9])


def test_hinge_loss_and_adaptive_weight():
    real, made = jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.0])
    assert float(hinge_discriminator(real, made)) == 0.5 * (0.25 + 0.5) and float(hinge_generator(made)) == 1.5
    pull, push = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    assert float(adaptive_weight(pull, push)) == pytest.approx(5 / 2.0001)
    assert float(adaptive_weight(pull, 0 * push)) == 1e4 and float(adaptive_weight(pull, push, limit=1.0)) == 1.0
    value, gradient = jax.value_and_grad(lambda x: surrogate_loss(x, jnp.array([5.0, -1.0])))(pull)
    assert float(value) == 0.0 and gradient.tolist() == [5.0, -1.0]


def test_discriminator():
    published = ClipDiscriminatorConfig()
    network = Network.of(lambda rngs: ClipDiscriminator(published, rngs=rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(network.shapes)) == 29_015_041 - 722_304
    for frames, out in {1: 1, 9: 2, 17: 3, 33: 5}.items():
        clip = jax.ShapeDtypeStruct((1, frames, 64, 64, 3), jnp.float32)
        assert jax.eval_shape(network.apply, network.shapes, clip).shape == (1, out, 8, 8, 1)
    halved = halve(jnp.arange(3.0)[None, :, None, None, None] * jnp.ones((1, 3, 5, 4, 1)))
    assert halved.shape == (1, 2, 2, 2, 1) and halved[0, :, 0, 0, 0].tolist() == [0.0, 1.5]
    assert discriminator_flops.forward(published, 17, 64, 64) > 0
    with pytest.raises(ValueError, match="groups = 32 does not divide width = 8"):
        ClipDiscriminatorConfig(width=8).validate()


# Errors.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_weight": -1.0}, ["kl_weight = -1.0", "must be at least 0"]),
        ({"image_vae": None, "image_vae_weights": None}, ["shared needs image_vae"]),
        ({"image_vae_weights": None}, ["belong together"]),
        (
            {"image_vae": IMAGE.replace(latent_channels=8)},
            ["network.latent_channels = 4", "image_vae.latent_channels = 8"],
        ),
        ({"image_vae": IMAGE.replace(block_channels=(4, 4, 4))}, ["network.downsampling = 2", "= 4"]),
        ({"shared": SharedLatentsConfig(encoder_weight=-1.0)}, ["encoder_weight = -1.0"]),
        ({"adversarial": ADVERSARIAL.replace(start=-1)}, ["start = -1"]),
    ],
)
def test_mistakes_in_the_config(config, changes, words):
    with pytest.raises(ConfigError) as error:
        validate_tree(config.replace(**changes), "task")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 6}, ["frames = 6", "2n + 1", "take 5 or 7"]),
        ({"height": 13}, ["height = 13", "multiple of 2", "take 12"]),
        ({"width": 8}, ["width = 8", "at least 11", "SSIM"]),
        ({"views": 2}, ["views = 2", "take 1"]),
    ],
)
def test_batch_shapes_that_do_not_fit(config, changes, words):
    with pytest.raises(ValueError) as error:
        config.check_bucket(BUCKET.replace(**changes))
    assert all(word in str(error.value) for word in words), error.value


def test_weights_of_another_image_vae_are_refused(config):
    config.check_weights()
    with pytest.raises(ValueError, match="task.image_vae_weights.*another network"):
        config.replace(image_vae=IMAGE.replace(layers_per_block=2)).check_weights()
    with pytest.raises(ValueError, match="no pixels"):
        config.build().preprocess({"latents": np.zeros((3, 4, 4, 8), np.float32), "caption": ""})


def test_flops_count_every_network(config):
    parts = config.build().flops(BUCKET)
    assert {"encoder convolutions", "decoder convolutions", "image decoder", "discriminator"} == set(parts)
    assert all(value > 0 for value in parts.values())
