"""LPIPS of images split over eight CPU devices: equal to one device, and no features are sent."""

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.losses.perceptual import LPIPS
from jvgen.nn.network import Network
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.preflight import collectives


def test_only_weights_move():
    sharding = Sharding(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), ShardingConfig())
    network = Network.of(lambda rngs: LPIPS(rngs=rngs))
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * np.prod(leaf.shape[:-1]) ** -0.5,
        network.shapes,
    )
    images = rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)

    def run(partitioner):
        def loss(made, target, parameters):
            with axes.partitioned(partitioner):
                distances = network.apply(parameters, made, target)
                return jnp.sum(distances), distances

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    place = sharding.activation((axes.BATCH, None, None, None), images.shape[1:])
    stored = jax.tree.map(lambda leaf: sharding.storage_of((None,) * leaf.ndim, leaf.shape), parameters)
    placed = (*jax.device_put((images[0], images[1]), place), jax.device_put(parameters, stored))
    compiled = run(sharding).lower(*placed).compile()
    (_, expected), gradient = run(None)(*images, parameters)
    (_, found), split_gradient = compiled(*placed)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(split_gradient, gradient, atol=1e-4 * float(jnp.abs(gradient).max()))
    moved = collectives.read(compiled.as_text())
    # A kernel has a window of 3 by 3; features of pairs have 2 * 2 images.
    assert {one.shape.partition("[")[2].split(",")[0] for one in moved if one.bytes > 64} <= {"3"}
