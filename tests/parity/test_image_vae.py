"""The image VAE against diffusers' AutoencoderKL with random weights: outputs, gradients, both ways of the map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.image_vae import flops, posterior
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.models.image_vae.torch_map import from_diffusers_config, to_diffusers_config, weight_map
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

SMALL = ImageVAEConfig(block_channels=(8, 12), layers_per_block=1, groups=4)
CONFIGS = {
    "z4": SMALL.replace(remat=Remat.FULL),
    "z16": SMALL.replace(
        block_channels=(4, 8, 8),
        latent_channels=16,
        quant_convolutions=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
    "no_attention": SMALL.replace(mid_attention=False, layers_per_block=2, remat=Remat.SAVE_ATTENTION),
}
SIZES = {"z4": (19, 22), "z16": (16, 24), "no_attention": (9, 7)}


@dataclasses.dataclass(frozen=True)
class Pair:
    config: ImageVAEConfig
    size: tuple[int, int]
    network: Network
    parameters: dict
    reference: "torch.nn.Module"


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request) -> Pair:
    config = CONFIGS[request.param]
    torch.manual_seed(1)
    reference = diffusers.AutoencoderKL.from_config(to_diffusers_config(config)).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            # Random norms and biases too: their defaults hide mistakes.
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    network = Network.of(lambda rngs: ImageVAE(config, rngs=rngs))
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return Pair(config, SIZES[request.param], network, weight_map(config).from_torch(state, network.shapes), reference)


def random_array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(images: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_ours(images: "torch.Tensor") -> np.ndarray:
    return images.detach().numpy().transpose(0, 2, 3, 1)


def test_moments_decoding_and_forward(pair):
    size = pair.size
    images = random_array(0, 2, *size, 3)
    latents = random_array(1, 2, *pair.config.latent_size(*size), pair.config.latent_channels)

    @jax.jit
    def run(parameters, images, latents):
        apply = pair.network.apply
        return (
            apply(parameters, images, method="encode"),
            apply(parameters, latents, method="decode"),
            apply(parameters, images),
        )

    moments, decoded, reconstructed = run(pair.parameters, images, latents)
    with torch.no_grad():
        distribution = pair.reference.encode(to_torch(images)).latent_dist
        reference_image = pair.reference.decode(to_torch(latents)).sample
        reference_forward = pair.reference(to_torch(images)).sample
    assert moments.shape[1:3] == pair.config.latent_size(*size)
    np.testing.assert_allclose(moments, to_ours(distribution.parameters), atol=2e-5, rtol=0)
    np.testing.assert_allclose(posterior.mode(moments), to_ours(distribution.mode()), atol=2e-5, rtol=0)
    np.testing.assert_allclose(posterior.split_moments(moments)[1], to_ours(distribution.logvar), atol=2e-5, rtol=0)
    np.testing.assert_allclose(posterior.kl_divergence(moments), distribution.kl().numpy(), rtol=1e-4)
    np.testing.assert_allclose(decoded, to_ours(reference_image), atol=2e-5, rtol=0)
    np.testing.assert_allclose(reconstructed, to_ours(reference_forward), atol=5e-5, rtol=0)


@pytest.mark.parametrize("pair", ["z4", "z16"], indirect=True)
def test_gradients_of_all_parameters(pair):
    apply = pair.network.apply
    images, weights = random_array(0, 2, 12, 16, 3), random_array(1, 2, 12, 16, 3)
    noise = random_array(2, 2, *pair.config.latent_size(12, 16), pair.config.latent_channels)

    def loss(parameters, images, noise, weights):
        moments = apply(parameters, images, method="encode")
        decoded = apply(parameters, posterior.sample(moments, noise), method="decode")
        return jnp.sum(weights * decoded) + 0.1 * jnp.sum(posterior.kl_divergence(moments))

    value, gradients = jax.jit(jax.value_and_grad(loss))(pair.parameters, images, noise, weights)
    pair.reference.zero_grad()
    distribution = pair.reference.encode(to_torch(images)).latent_dist
    sampled = distribution.mean + distribution.std * to_torch(noise)
    decoded = pair.reference.decode(sampled).sample
    reference = (to_torch(weights) * decoded).sum() + 0.1 * distribution.kl().sum()
    reference.backward()
    # The terms of the sum cancel: rounding is relative to what was added up, not to what is left.
    size = (to_torch(weights) * decoded).abs().sum().item()
    np.testing.assert_allclose(value, reference.item(), atol=2e-7 * size, rtol=0)
    theirs = dict(pair.reference.named_parameters())
    ours = dict(weight_map(pair.config).to_torch(gradients))
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        expected = theirs[name].grad.numpy()
        # Before a norm a bias has no gradient: terms as large as those of its layer's kernel cancel.
        added_up = theirs[name.removesuffix("bias") + "weight"].grad if name.endswith(".bias") else theirs[name].grad
        atol = 1e-5 * max(1.0, np.abs(expected).max(), added_up.abs().max().item())
        np.testing.assert_allclose(gradient, expected, atol=atol, rtol=0, err_msg=name)


def test_weights_load_strictly_and_round_trip_bitwise(pair):
    leaves, structure = jax.tree.flatten(pair.network.shapes)
    parameters = structure.unflatten([0.3 * random_array(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])
    state = {name: torch.from_numpy(np.array(array)) for name, array in weight_map(pair.config).to_torch(parameters)}
    model = diffusers.AutoencoderKL.from_config(to_diffusers_config(pair.config)).eval()
    model.load_state_dict(state, strict=True)
    images = random_array(3, 1, *pair.size, 3)
    with torch.no_grad():
        expected = to_ours(model(to_torch(images)).sample)
    np.testing.assert_allclose(jax.jit(pair.network.apply)(parameters, images), expected, atol=2e-5, rtol=0)
    loaded = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    again = weight_map(pair.config).from_torch(loaded, pair.network.shapes)
    before, after = flatten(parameters), flatten(again)
    assert all(np.array_equal(before[path], after[path]) for path in before) and list(before) == list(after)


def test_configuration_round_trip_through_diffusers(pair):
    assert from_diffusers_config(pair.reference.config) == pair.config.replace(remat=Remat.NONE)


@pytest.mark.parametrize(("preset", "entries", "count"), [("sd15", 248, 83_653_863), ("sd3", 244, 83_819_683)])
def test_published_sizes(preset, entries, count):
    config = getattr(ImageVAEConfig, preset)()
    network = Network.of(lambda rngs: ImageVAE(config, rngs=rngs))
    shapes = weight_map(config).torch_shapes(network.shapes)
    assert len(shapes) == entries and sum(int(np.prod(shape)) for shape in shapes.values()) == count
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL.from_config(to_diffusers_config(config))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


def test_flops_equal_those_that_torch_counts(pair):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    height, width = 19, 32
    # The fused attention kernel of the CPU is not counted; its parts are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.reference(torch.zeros(1, 3, height, width))
    counted = {name: float(value) for name, value in counter.get_flop_counts()["Global"].items()}
    ours = flops.reconstruct(pair.config, height, width)
    assert sum(ours.values()) == sum(counted.values()) > 0


@pytest.mark.parametrize("pair", ["z4"], indirect=True)
def test_bfloat16_output_for_bfloat16_input(pair):
    images = random_array(0, 1, 8, 8, 3)
    encode = jax.jit(lambda parameters, images: pair.network.apply(parameters, images, method="encode"))
    exact, rough = encode(pair.parameters, images), encode(pair.parameters, images.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    assert np.abs(rough.astype(jnp.float32) - exact).max() < 0.1 * np.abs(exact).max()
