"""The discriminator with its parameters split over eight CPU devices: every kernel is gathered once."""

import jax
import jax.numpy as jnp

from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.models.clip_discriminator.model import ClipDiscriminator
from jvgen.nn.network import Network
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig
from jvgen.preflight import collectives


def test_kernels_are_gathered_once():
    sharding = Sharding(make_mesh(MeshConfig(fsdp=8)), ShardingConfig(replicate_below=0))
    network = Network.of(lambda rngs: ClipDiscriminator(ClipDiscriminatorConfig(width=8, groups=4), rngs=rngs))
    stored = sharding.storage(network.axes, network.shapes)
    shape = (16, 5, 16, 16, 3)
    clips = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch(jax.ShapeDtypeStruct(shape, jnp.float32)))

    def run(parameters, clips):
        with axes.partitioned(sharding):
            return jax.grad(lambda tree: jnp.sum(jnp.square(network.apply(tree, clips))))(parameters)

    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), network.shapes, stored
    )
    moved = collectives.read(jax.jit(run, out_shardings=stored).lower(placed, clips).compile().as_text())
    gathered = sum(one.total for one in moved if one.kind == "all-gather")
    assert gathered <= 1.05 * sum(4 * leaf.size for leaf in jax.tree.leaves(network.shapes))
