"""Lengths and sizes besides those of the shipped configs: shapes of training and sampling, without computing."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jvgen import config
from jvgen.data.stream.config import BucketConfig
from jvgen.nn.network import Network
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.text_to_video import TextToVideo

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Case:
    """A clip's frames, height and width, and its latent frames without and with padding."""

    size: tuple[int, int, int]
    latent: int
    padded: int


CASES = {
    "10 s": Case((161, 768, 1360), 41, 42),
    "5 s, portrait": Case((81, 1360, 768), 21, 22),
    "a square": Case((73, 768, 768), 19, 20),
    "an image": Case((1, 768, 1360), 1, 2),
}


@pytest.fixture(scope="module", params=["text_to_video", "image_to_video"])
def task(request) -> TextToVideo:
    """CogVideoX1.5-5B with one block."""
    made = config.load(f"{CONFIGS / 'cogvideox1_5_5b.py'}:{request.param}").task
    return made.replace(denoiser=made.denoiser.replace(layers=1), validation_timesteps=0).build()


def shapes(networks: dict[str, Network]) -> dict:
    return {name: network.shapes for name, network in networks.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cogvideox1_5_takes_any_length_and_aspect(task, case):
    (frames, height, width), made = case.size, task.config
    bucket = BucketConfig(frames=frames, height=height, width=width, batch_size=2)
    made.check_bucket(bucket)
    space = height // 8, width // 8
    assert made.latent_shape(*case.size) == (case.latent, *space)
    assert made.denoised_shape(*case.size) == (case.padded, *space)
    assert task.sequence_length(bucket) == case.padded // 2 * (height // 16) * (width // 16)
    fields = task.fields(bucket)
    assert fields["latents"].shape == (case.latent, *space, 32)
    batch = {name: jax.ShapeDtypeStruct((2, *spec.shape), spec.dtype) for name, spec in fields.items()}
    batch["slot"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    denoised = []

    def loss(parameters, frozen, batch):
        denoise = task.denoise
        task.denoise = lambda weights, noisy, *more, **options: (
            denoised.append((noisy.shape, getattr(options["given"], "shape", None)))
            or denoise(weights, noisy, *more, **options)
        )
        try:
            return task.loss(parameters, frozen, batch, jax.random.key(0))[0]
        finally:
            del task.denoise

    parameters, frozen = shapes(task.networks), shapes(task.frozen_networks)
    assert jax.eval_shape(loss, parameters, frozen, batch).shape == ()
    latents = (2, case.padded, *space, 16)
    given = latents if made.given_frames else None
    assert denoised == [(latents, given)]

    def sample(parameters, frozen, tokens, images):
        return task.generate_latents(
            parameters, frozen, tokens, jnp.arange(2), jax.random.key(0), size=case.size, sampler=made.sampler,
            guidance=made.guidance, given=GivenPixels(frames=images),
        )[0]  # fmt: skip

    images = jax.ShapeDtypeStruct((2, 1, height, width, 3), jnp.uint8) if made.given_frames else None
    sampled = jax.eval_shape(sample, parameters, frozen, batch["tokens"], images)
    assert sampled.shape == (2, case.latent, *space, 16)


def test_learned_positions_are_for_one_size():
    """Of CogVideoX-5B's image-to-video network: refused with the bucket or the request, before anything is loaded."""
    made = config.load(f"{CONFIGS / 'cogvideox_5b.py'}:image_to_video").task
    made.check_bucket(BucketConfig(frames=25, height=480, width=720, batch_size=1))
    for frames, height, width in ((49, 720, 480), (57, 480, 720)):
        with pytest.raises(
            ValueError, match=rf"{frames} frames of {height}x{width} pixels are a grid of .* exactly 30x45"
        ):
            made.check_bucket(BucketConfig(frames=frames, height=height, width=width, batch_size=1))
