"""Causal and published CV-VAEs with clips split over eight CPU devices: outputs and gradients equal those of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.model import CVVAE
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import SPATIAL_SHARDING, Sharding, ShardingConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilations")]

SMALL = {"block_channels": (4, 8), "layers_per_block": 1, "groups": 2, "time_levels_down": (0,), "time_levels_up": (0,)}
CONFIGS = {
    "causal": CVVAEConfig.causal().replace(**SMALL, quant_convolutions=False, remat=Remat.FULL),
    "sd3": CVVAEConfig.sd3().replace(**SMALL, latent_channels=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_clips_split_by_rows_and_columns(name):
    config = CONFIGS[name]
    network = Network.of(lambda rngs: CVVAE(config, rngs=rngs))
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(network.shapes)
    parameters = structure.unflatten([(0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) for leaf in leaves])
    clip = rng.uniform(-1, 1, (2, 3, 8, 8, 3)).astype(np.float32)
    sharding = Sharding(
        make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2)), ShardingConfig(compute=SPATIAL_SHARDING, replicate_below=64)
    )

    def run(partitioner):
        def loss(parameters, clip):
            with axes.partitioned(partitioner):
                moments = network.apply(parameters, clip, method="encode")
                made = network.apply(parameters, moments[..., :4], method="decode")
                return jnp.sum(jnp.sin(made)) + jnp.sum(jnp.cos(moments)), made

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, whole), expected = run(None)(jax.device_put(parameters), clip)
    stored = jax.device_put(parameters, sharding.storage(network.axes, network.shapes))
    names = (axes.BATCH, axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
    place = sharding.activation(names, clip.shape)
    assert tuple(place.spec)[2:] == ("seq", "tensor", None)
    (_, parts), gradient = run(sharding)(stored, jax.device_put(clip, place))
    np.testing.assert_allclose(parts, whole, atol=2e-5 * float(jnp.abs(whole).max()), rtol=0)
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True))
    largest = max(float(jnp.abs(want).max()) for _, want in pairs)
    for got, want in pairs:
        # Gradients that are zero but for rounding (biases before a norm, of keys) need a floor.
        atol = max(2e-5 * float(jnp.abs(want).max()), 1e-6 * largest)
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)
