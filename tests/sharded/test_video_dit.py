"""RepVideo and enhanced attention on eight host devices: the results of one device on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.video_dit.config import AggregationConfig, VideoDiTConfig
from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.models.video_dit.model import VideoDiT
from jvgen.nested import flatten, unflatten
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig

pytestmark = pytest.mark.usefixtures("quick_compilations")

REPVIDEO = VideoDiTConfig(
    layers=4, heads=4, head_width=16, in_channels=4, out_channels=4, text_width=16, text_length=7, condition_width=16,
    remat=Remat.SAVE_ATTENTION, token_multiple=8, aggregation=AggregationConfig(period=3),
)  # fmt: skip
MESHES = {
    "fsdp-seq-tensor": {"fsdp": 2, "seq": 2, "tensor": 2},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "seq": {"data": 2, "fsdp": 1, "seq": 4},
}


def sharding_of(mesh: dict[str, int] | None) -> Sharding | None:
    return None if mesh is None else Sharding(make_mesh(MeshConfig(**mesh)), ShardingConfig(replicate_below=0))


def inputs_of() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((8, 2, 8, 8, 4)).astype(np.float32)
    return latents, rng.standard_normal((8, 7, 16)).astype(np.float32), np.linspace(3, 990, 8, dtype=np.float32)


def random_parameters(network: Network) -> dict:
    rng, flat = np.random.default_rng(0), {}
    for path, shape in sorted(flatten(network.shapes).items()):
        start = 1.0 if path.endswith("norm/scale") else 0.4 if path.endswith("gates") else 0.0
        flat[path] = (start + 0.2 * rng.standard_normal(shape.shape)).astype(np.float32)
    return unflatten(flat)


def loss_and_gradients(mesh: dict[str, int] | None) -> tuple[jax.Array, dict]:
    network, sharding = Network.of(lambda rngs: VideoDiT(REPVIDEO, rngs=rngs)), sharding_of(mesh)

    def loss(parameters: dict, inputs: tuple) -> jax.Array:
        with axes.partitioned(sharding):
            return jnp.mean(jnp.square(network.apply(parameters, *inputs)))

    parameters, inputs = random_parameters(network), inputs_of()
    if sharding is None:
        return jax.jit(jax.value_and_grad(loss))(parameters, inputs)
    storage = sharding.storage(network.axes, network.shapes)
    places = {"in_shardings": (storage, sharding.batch(inputs)), "out_shardings": (sharding.replicated, storage)}
    return jax.jit(jax.value_and_grad(loss), **places)(parameters, inputs)


@pytest.fixture(scope="module")
def on_one_device() -> tuple[jax.Array, dict]:
    return loss_and_gradients(None)


@pytest.mark.parametrize(
    "mesh", ["fsdp-seq-tensor", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MESHES)[1:])]
)
def test_aggregated_layers_have_the_loss_and_gradients_of_one_device(mesh, on_one_device):
    loss, gradients = loss_and_gradients(MESHES[mesh])
    np.testing.assert_allclose(loss, on_one_device[0], rtol=1e-5)
    ours, expected = flatten(gradients), flatten(on_one_device[1])
    largest = max(float(jnp.abs(value).max()) for value in expected.values())
    assert float(jnp.abs(expected["aggregation/gates"]).max()) > 1e-3 * largest
    for path, value in expected.items():
        atol = max(1e-5 * float(jnp.abs(value).max()), 1e-6 * largest)
        np.testing.assert_allclose(ours[path], value, rtol=0, atol=atol, err_msg=path)


def enhanced_output(mesh: dict[str, int] | None, share: str) -> np.ndarray:
    network, sharding = Network.of(lambda rngs: VideoDiT(REPVIDEO, rngs=rngs)), sharding_of(mesh)
    hook = Enhancement(EnhanceConfig(share=share), jnp.full((REPVIDEO.layers,), 6.0), clip_size=2)

    def denoise(parameters: dict, inputs: tuple) -> jax.Array:
        with axes.partitioned(sharding):
            return network.apply(parameters, *inputs, attention_scale=hook)

    parameters, inputs = random_parameters(network), inputs_of()
    if sharding is None:
        return np.asarray(jax.jit(denoise)(parameters, inputs))
    places = (sharding.storage(network.axes, network.shapes), sharding.batch(inputs))
    return np.asarray(jax.jit(denoise, in_shardings=places)(parameters, inputs))


@pytest.mark.parametrize("share", ["batch", "head", pytest.param("clip", marks=pytest.mark.slow)])
def test_enhanced_attention_is_that_of_one_device(share):
    expected = enhanced_output(None, share)
    found = enhanced_output(MESHES["fsdp-seq-tensor"], share)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
