"""Samples of a run on image latents, decoded to clips of more frames by a video VAE that shares the latents."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.autoencoding.decoder_swap import DecoderSwap
from jvgen.interop.to_torch import export_network
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.inflate import inflate
from jvgen.models.cv_vae.model import CVVAE
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nn.network import Network
from jvgen.tasks.text_to_video import TextToVideo
from tests.unit.test_text_to_video_task import CONFIG

pytestmark = pytest.mark.usefixtures("quick_compilations")


def exported(config, parameters, folder):
    return export_network(config, jax.tree.map(np.asarray, parameters), folder)


@pytest.fixture(scope="module")
def image():
    return jax.jit(Network.of(lambda rngs: ImageVAE(CONFIG.vae, rngs=rngs)).init)(jax.random.key(1))


def test_inflated_decoder_holds_the_frames_of_the_image_decoder(image, tmp_path):
    video = CVVAEConfig.causal(CONFIG.vae)
    shapes = Network.of(lambda rngs: CVVAE(video, rngs=rngs)).shapes
    swap = DecoderSwap(exported(video, inflate(CONFIG.vae, image, video, shapes), tmp_path / "vae"), CONFIG)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 4)), jnp.float32)
    task = CONFIG.build()
    alone = np.asarray(jax.jit(task.decode)({"vae": image}, latents).pixels, int)
    clips = np.asarray(jax.jit(swap.apply_to(task).decode)({"vae": swap.load()}, latents).pixels, int)
    assert clips.shape == (2, 5, 8, 8, 3) and alone.shape == (2, 3, 8, 8, 3)
    held = alone[:, [0, 1, 1, 2, 2]]
    assert np.abs(clips - held).max() <= 1 and alone.std() > 1
    # The task itself is unchanged.
    assert task.decode({"vae": image}, latents).pixels.shape[1] == 3 and isinstance(swap.apply_to(task), TextToVideo)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4, latent_channels=2), "latent_channels is 2"),
        (ImageVAEConfig.tiny().replace(block_channels=(8, 8, 8), groups=4), "downsampling is 4"),
    ],
    ids=["channels", "sizes"],
)
def test_vaes_that_cannot_share_latents_are_refused(config, words, tmp_path):
    network = Network.of(lambda rngs: ImageVAE(config, rngs=rngs))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.shapes)
    with pytest.raises(ValueError, match=words):
        DecoderSwap(exported(config, zeros, tmp_path / "vae"), CONFIG)


def test_image_decoder_makes_one_frame_per_latent_of_clips(image, tmp_path):
    config = CONFIG.replace(vae=CVVAEConfig.causal(CONFIG.vae), temporal_compression=2)
    swap = DecoderSwap(exported(CONFIG.vae, image, tmp_path / "vae"), config)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4, 4)), jnp.float32)
    frames = jax.jit(swap.apply_to(config.build()).decode)({"vae": swap.load()}, latents).pixels
    np.testing.assert_array_equal(frames, jax.jit(CONFIG.build().decode)({"vae": image}, latents).pixels)
    assert frames.shape == (2, 3, 8, 8, 3)


def test_other_compression_and_other_runs_are_refused(image, tmp_path):
    video = CVVAEConfig.causal(CONFIG.vae)
    shapes = Network.of(lambda rngs: CVVAE(video, rngs=rngs)).shapes
    folder = exported(video, inflate(CONFIG.vae, image, video, shapes), tmp_path / "vae")
    with pytest.raises(ValueError, match="2 frames share a latent, but 4 in the run"):
        DecoderSwap(folder, CONFIG.replace(temporal_compression=4))
    with pytest.raises(ValueError, match="only text-to-video runs"):
        DecoderSwap(folder, SimpleNamespace(vae=None))
