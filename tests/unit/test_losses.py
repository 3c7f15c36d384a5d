"""Reconstruction losses against closed forms, LPIPS against a torch module of the same arithmetic, its substitute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.losses.perceptual import LPIPS, SCALE, SHIFT, STAGES, PerceptualConfig, laplacian_distance, load_lpips
from jvgen.losses.reconstruction import absolute_error, gaussian_kl, negative_log_likelihood, squared_error
from jvgen.nn.network import Network


def test_errors_are_means_of_each_sample():
    prediction = jnp.asarray([[1.0, -3.0], [2.0, 2.0]])
    np.testing.assert_allclose(absolute_error(prediction, jnp.zeros((2, 2))), [2.0, 2.0])
    np.testing.assert_allclose(squared_error(prediction, jnp.zeros((2, 2))), [5.0, 4.0])
    assert absolute_error(prediction.astype(jnp.bfloat16), jnp.zeros((2, 2))).dtype == jnp.float32


def test_kl_is_the_integral():
    mean, log_variance = 0.7, -0.9
    x = np.linspace(-12, 12, 200001)
    density = np.exp(-((x - mean) ** 2) / (2 * np.exp(log_variance))) / np.sqrt(2 * np.pi * np.exp(log_variance))
    ratio = -((x - mean) ** 2) / (2 * np.exp(log_variance)) - log_variance / 2 + x**2 / 2
    integral = np.sum(density * ratio) * (x[1] - x[0])
    kl = gaussian_kl(jnp.full((2, 3, 4), mean), jnp.full((2, 3, 4), log_variance))
    np.testing.assert_allclose(kl, 12 * integral, rtol=1e-5)


def test_kl_clamps_as_the_published_posterior():
    np.testing.assert_allclose(gaussian_kl(jnp.zeros((1, 1)), jnp.full((1, 1), -100.0)), 0.5 * (-1 + 30), rtol=1e-6)
    assert np.isfinite(gaussian_kl(jnp.zeros((1, 1)), jnp.full((1, 1), 1000.0))).all()


def test_likelihood_loss_is_minimal_at_the_mean_error():
    errors = jnp.asarray([[0.5, 1.5, 1.0]])
    np.testing.assert_allclose(negative_log_likelihood(errors, jnp.float32(0.0)), [3.0])
    slope = jax.grad(lambda s: negative_log_likelihood(errors, s)[0])
    assert float(slope(jnp.float32(0.0))) == pytest.approx(0.0, abs=1e-6)
    assert float(slope(jnp.float32(-1.0))) < 0 < float(slope(jnp.float32(1.0)))


def test_laplacian_distance_penalizes_blur_more_than_a_constant_offset():
    image = jnp.asarray(np.indices((32, 32)).sum(0) // 4 % 2, jnp.float32)[None, :, :, None] * jnp.ones((1, 1, 1, 3))
    blurred = jax.image.resize(jax.image.resize(image, (1, 8, 8, 3), "linear"), (1, 32, 32, 3), "linear")
    shade = image + jnp.mean(jnp.abs(blurred - image))
    assert float(laplacian_distance(image, image)[0]) == 0.0
    np.testing.assert_allclose(absolute_error(blurred, image), absolute_error(shade, image), rtol=1e-3)

    def detail(other):
        """The finest level alone: the distance without its coarse part."""
        return float(laplacian_distance(other, image, levels=1)[0] - 2 * absolute_error(pool(other), pool(image))[0])

    assert detail(blurred) > 0.05 and detail(shade) == pytest.approx(0.0, abs=1e-5)


def pool(image):
    return jnp.mean(image.reshape(1, 16, 2, 16, 2, 3), axis=(2, 4))


def test_laplacian_distance_takes_odd_and_tiny_images():
    first, second = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9, 7, 3)), jnp.float32)
    total = jax.jit(jax.value_and_grad(lambda x: laplacian_distance(x, second, levels=6).sum()))
    distance, gradient = total(first)
    assert np.isfinite(distance) and np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0


def torch_lpips(torch, tensors, first, second):
    """The arithmetic of the lpips package in torch."""

    def features(x):
        x = (x - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
        kept = []
        for stage, layers in enumerate(STAGES):
            x = torch.nn.functional.max_pool2d(x, 2) if stage else x
            for index, _, _ in layers:
                weight, bias = (tensors[f"net.slice{stage + 1}.{index}.{name}"] for name in ("weight", "bias"))
                x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
            kept.append(x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True) + 1e-10) + 1e-10))
        return kept

    total = 0.0
    for stage, (a, b) in enumerate(zip(features(first), features(second), strict=True)):
        scored = torch.nn.functional.conv2d((a - b) ** 2, tensors[f"lin{stage}.model.1.weight"])
        total = total + scored.mean(dim=(2, 3), keepdim=True)
    return total.reshape(-1)


def random_tensors(torch):
    generator = torch.Generator().manual_seed(0)
    tensors = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for stage, layers in enumerate(STAGES):
        for index, features_in, features_out in layers:
            weight = torch.randn(features_out, features_in, 3, 3, generator=generator) * (2 / (9 * features_in)) ** 0.5
            tensors[f"net.slice{stage + 1}.{index}.weight"] = weight
            tensors[f"net.slice{stage + 1}.{index}.bias"] = torch.randn(features_out, generator=generator) * 0.1
        tensors[f"lin{stage}.model.1.weight"] = torch.rand(1, layers[-1][2], 1, 1, generator=generator)
    return tensors


@pytest.mark.torch
def test_lpips_equals_torch_forward_and_gradient(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = random_tensors(torch)
    save_file(tensors, tmp_path / "lpips.safetensors")
    network = Network.of(lambda rngs: LPIPS(rngs=rngs))
    parameters = jax.tree.map(jnp.asarray, load_lpips(tmp_path / "lpips.safetensors"))
    same = jax.tree.map(lambda array, shape: array.shape == shape.shape, parameters, network.shapes)
    assert all(jax.tree.leaves(same))

    first, second = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 2, 19, 16, 3)), jnp.float32)

    def total(image, parameters):
        distance = network.apply(parameters, image, second)
        return distance.sum(), distance

    (_, distance), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(first, parameters)
    theirs_first = torch.tensor(np.array(first)).permute(0, 3, 1, 2).requires_grad_()
    expected = torch_lpips(torch, tensors, theirs_first, torch.tensor(np.array(second)).permute(0, 3, 1, 2))
    expected.sum().backward()
    np.testing.assert_allclose(distance, expected.detach().numpy(), rtol=1e-4)
    expected_gradient = theirs_first.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-3 * np.abs(expected_gradient).max())


def test_all_missing_or_misshapen_lpips_tensors_are_listed(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "half.safetensors"
    save_file(
        {"features.0.weight": np.zeros((64, 3, 5, 5), np.float32), "lin0.model.1.weight": np.zeros((1, 64, 1, 1))}, path
    )
    with pytest.raises(ValueError, match=r"missing 0.bias.*missing lin4.*0.weight has shape \(64, 3, 5, 5\)"):
        load_lpips(path)
    with pytest.raises(ValueError, match="no such file"):
        load_lpips(tmp_path / "nothing.safetensors")


def test_distance_and_weights_must_match():
    with pytest.raises(ConfigError, match="laplacian"):
        validate_tree(PerceptualConfig(kind="lpips"))
    with pytest.raises(ConfigError, match="reads no weights"):
        validate_tree(PerceptualConfig(kind="laplacian", weights="lpips.safetensors"))
