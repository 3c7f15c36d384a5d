"""Guidance scales against published numbers, and the double batch against two calls."""

import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.diffusion.guidance import GuidanceConfig, guidance_scales, guided, rescale_guided, unguided

# First and last of CogVideoX's dynamic scales: 50 steps, trailing, scale 6, exponent 5.
DYNAMIC_FIRST = [2.291487174551452, 2.5435028667646318, 6.974351832175483, 6.4203584231448385, 2.7880975291587946]


def test_dynamic_scales_have_the_published_numbers():
    timesteps = np.arange(999, 0, -20)
    scales = guidance_scales(GuidanceConfig(kind="dynamic"), timesteps)
    np.testing.assert_allclose(scales[:5], DYNAMIC_FIRST, rtol=1e-7)
    np.testing.assert_allclose(scales[-4:], [1.0636, 1.0, 1.0, 1.1234], atol=1e-4)


def test_constant_and_none():
    np.testing.assert_array_equal(guidance_scales(GuidanceConfig(scale=4.5), np.arange(3)), [4.5] * 3)
    np.testing.assert_array_equal(guidance_scales(GuidanceConfig(kind="none"), np.arange(3)), [1.0] * 3)


def test_fractional_exponents_are_refused_where_they_have_no_value():
    with pytest.raises(ValueError, match="choose an integer"):
        guidance_scales(GuidanceConfig(kind="dynamic", exponent=2.5), np.asarray([999, 499]))


def normal(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def network(noisy, timesteps, condition):
    return noisy * timesteps[:, None] + condition["text"] - condition["mask"]


def test_one_batch_of_two_halves_is_two_calls():
    noisy, conditional, unconditional = normal((3, 4, 6))
    timesteps = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    mask = jnp.asarray([[0.0], [1.0], [2.0], [3.0]])
    with_text, without = {"text": conditional, "mask": mask}, {"text": unconditional, "mask": mask}
    together = guided(network, with_text, without)(noisy, timesteps, jnp.float32(3.0))
    first = unguided(network, without)(noisy, timesteps, jnp.float32(0.0))
    second = unguided(network, with_text)(noisy, timesteps, jnp.float32(0.0))
    np.testing.assert_allclose(together, first + 3.0 * (second - first), atol=1e-5)


def test_rescaling_restores_the_conditional_standard_deviation():
    guided_prediction, conditional = normal((2, 3, 200)) * jnp.asarray([5.0, 2.0])[:, None, None]
    whole = rescale_guided(guided_prediction, conditional, 1.0)
    np.testing.assert_allclose(jnp.std(whole, axis=1), jnp.std(conditional, axis=1), rtol=1e-5)
    half = rescale_guided(guided_prediction, conditional, 0.5)
    np.testing.assert_allclose(half, (whole + guided_prediction) / 2, rtol=1e-5)


@pytest.mark.torch
def test_rescaling_is_that_of_diffusers():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    mixed, conditional = normal((2, 3, 4, 5)) * 2.0
    theirs = module.rescale_noise_cfg(torch.tensor(np.array(mixed)), torch.tensor(np.array(conditional)), 0.7)
    np.testing.assert_allclose(rescale_guided(mixed, conditional, 0.7), theirs.numpy(), atol=1e-6)
