"""GroupNorm: statistics of groups, and in bfloat16 those of the rounded input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.nn.network import Network
from jvgen.nn.norm import GroupNorm
from jvgen.parallel import axes, rules
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.preflight import topology


def norm(leading: int = 1, rounded: bool | None = True) -> Network:
    return Network.of(lambda rngs: GroupNorm(8, groups=4, epsilon=1e-6, leading=leading, rounded=rounded))


def inputs(dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return (3.0 + jax.random.normal(jax.random.key(0), (2, 3, 5, 8))).astype(dtype)


@pytest.mark.parametrize("leading", [1, 2])
def test_groups_of_channels_have_mean_zero_and_variance_one(leading):
    network = norm(leading)
    found = network.apply(network.init(jax.random.key(0)), inputs())
    over = (*range(leading, 3), 4)
    grouped = np.asarray(found).reshape(2, 3, 5, 4, 2)
    np.testing.assert_allclose(grouped.mean(over), 0.0, atol=1e-6)
    np.testing.assert_allclose(grouped.var(over), 1.0, atol=1e-5)


def test_a_rounded_input_is_normalized_as_it_was_rounded():
    """Compiled with the product before it: the compiler must not take the product's float32 sums instead."""
    network = norm()
    parameters = network.init(jax.random.key(0))
    kernel = jax.random.normal(jax.random.key(1), (8, 8), jnp.bfloat16)

    def product(x: jax.Array) -> jax.Array:
        return x @ kernel

    def normalized(x: jax.Array) -> jax.Array:
        return network.apply(parameters, x)

    x = inputs(jnp.bfloat16)
    together, apart = jax.jit(lambda x: normalized(product(x)))(x), jax.jit(normalized)(jax.jit(product)(x))
    assert together.dtype == jnp.bfloat16
    np.testing.assert_array_equal(together.astype(jnp.float32), apart.astype(jnp.float32))


@pytest.mark.parametrize(
    ("dtype", "rounded", "barriers"), [(jnp.float32, True, 0), (jnp.bfloat16, True, 1), (jnp.bfloat16, False, 0)]
)
def test_only_rounded_inputs_are_kept_from_fusion(dtype, rounded, barriers):
    network = norm(rounded=rounded)
    traced = jax.make_jaxpr(network.apply)(network.init(jax.random.key(0)), inputs(dtype))
    assert str(traced).count("optimization_barrier") == barriers


def test_a_rounded_input_has_a_gradient_and_can_be_mapped_over():
    network = norm()
    parameters = network.init(jax.random.key(0))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(network.apply(parameters, x).astype(jnp.float32))[..., 0])

    rounded = jax.grad(loss)(inputs(jnp.bfloat16)).astype(jnp.float32)
    exact = jax.grad(loss)(inputs(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(rounded, exact, atol=0.02 * float(jnp.abs(exact).max()))
    mapped = jax.vmap(lambda x: network.apply(parameters, x[None])[0])(inputs(jnp.bfloat16))
    np.testing.assert_array_equal(
        mapped.astype(jnp.float32), network.apply(parameters, inputs(jnp.bfloat16)).astype(jnp.float32)
    )


@pytest.mark.skipif(not topology.has_compiler(), reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize(
    ("shape", "barriers"),
    [
        ((32, 4, 4, 8), 0),  # eight images on each of four chips
        ((24, 4, 4, 8), 1),  # six
        ((4, 16, 4, 4, 8), 1),  # one clip
        ((32, 5, 4, 4, 8), 0),
        ((24, 4, 8), 0),  # no images
    ],
)
def test_inputs_are_rounded_where_a_tpu_has_no_multiple_of_eight_images_or_clips(shape, barriers):
    mesh = make_mesh(MeshConfig(fsdp=4), topology.describe("v5e:2x2").devices)
    network = norm(rounded=None)

    def count() -> int:
        traced = jax.make_jaxpr(network.apply)(network.init(jax.random.key(0)), jnp.zeros(shape, jnp.bfloat16))
        return str(traced).count("optimization_barrier")

    with axes.partitioned(rules.Sharding(mesh, rules.ShardingConfig())):
        assert count() == barriers
    assert count() == 0, "on a CPU"
