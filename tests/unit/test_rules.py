"""Sharding rules: which dimension a mesh axis goes to, what happens where it does not divide, and gradients."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jvgen.parallel import axes
from jvgen.parallel.axes import BATCH, CONV_IN, CONV_OUT, EMBED, HEADS, LAYERS, LENGTH, MLP
from jvgen.parallel.mesh import MeshConfig, make_mesh, single_device_mesh
from jvgen.parallel.rules import STORAGE as STORAGE_RULES
from jvgen.parallel.rules import Sharding, ShardingConfig


def sharding(replicate_below=0, **mesh):
    return Sharding(make_mesh(MeshConfig(**mesh)), ShardingConfig(replicate_below=replicate_below))


STORAGE = [
    # fsdp goes to embed, tensor to heads and hidden units.
    ((EMBED, HEADS), (64, 32), P("fsdp", "tensor")),
    ((LAYERS, MLP, EMBED), (3, 64, 32), P(None, "tensor", "fsdp")),
    # A mesh axis is used once: the second embed stays whole.
    ((EMBED, EMBED), (64, 32), P("fsdp", None)),
    # No embed, or one that fsdp does not divide: the largest dimension that it divides, after tensor; never layers.
    ((None, None), (8, 16), P(None, "fsdp")),
    ((EMBED, None), (6, 16), P(None, "fsdp")),
    ((EMBED, HEADS), (7, 64), P(None, ("tensor", "fsdp"))),
    ((LAYERS, EMBED), (8, 5), P(None, None)),
    # It divides none: each by the largest factor that divides it.
    ((LAYERS, EMBED), (8, 6), P(None, "fsdp_0")),
    ((EMBED, HEADS), (6, 4), P("fsdp_0", ("tensor", "fsdp_1"))),
    ((None, None, CONV_IN, CONV_OUT), (3, 3, 8, 64), P(None, None, None, "fsdp")),
    # Neither divides: replicated.
    ((EMBED, HEADS), (7, 5), P(None, None)),
    ((), (), P()),
]


def test_on_one_device_parameters_stay_the_same_arrays():
    """Constraints would make them others, of which a scan over layers keeps a copy of each for its backward pass."""
    one = Sharding(single_device_mesh(), ShardingConfig())
    parameters = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    gathered = one.fsdp_all_gather(parameters, {"kernel": (EMBED, MLP), "bias": (MLP,)})
    assert all(gathered[name] is array for name, array in parameters.items())


@pytest.mark.parametrize("names,shape,spec", STORAGE)
def test_storage(names, shape, spec):
    assert sharding(fsdp=4, tensor=2).storage_of(names, shape).spec == spec


STATE = [
    # embed takes fsdp and seq; what it cannot take goes to the largest dimension that seq divides.
    ({"fsdp": 4, "seq": 2}, (EMBED, HEADS), (64, 32), (8, 32)),
    ({"fsdp": 4, "seq": 2}, (LAYERS, EMBED, HEADS), (8, 12, 64), (8, 3, 32)),
    ({"fsdp": 4, "seq": 2}, (EMBED, HEADS), (7, 64), (7, 8)),
    # Either may be split over several dimensions.
    ({"fsdp": 2, "seq": 4}, (EMBED, MLP), (20, 6), (5, 3)),
    ({"fsdp": 4, "seq": 2}, (EMBED, HEADS), (10, 12), (5, 3)),
    # What is left then are copies.
    ({"fsdp": 4, "seq": 2}, (EMBED, HEADS), (6, 6), (3, 3)),
]


@pytest.mark.parametrize("mesh,names,shape,shard", STATE)
def test_state_is_split_over_fsdp_and_seq(mesh, names, shape, shard):
    rules = sharding(**mesh)
    assert rules.storage_of(names, shape).shard_shape(shape) == shard
    assert rules.replicas_of(names, shape) == 8 * math.prod(shard) // math.prod(shape)
    # As before 0.2: over fsdp only.
    tables = {name: tuple(axis for axis in rule if axis != "seq") for name, rule in STORAGE_RULES.items()}
    old = Sharding(rules.mesh, ShardingConfig(replicate_below=0, storage=tables))
    assert old.state_axes == ("fsdp",) and "seq" not in str(old.storage_of(names, shape).spec)


def test_a_parameter_that_fsdp_does_not_divide_is_split_over_several_dimensions():
    rules = sharding(fsdp=8)
    names, shape = (LAYERS, EMBED, MLP), (3, 12, 20)
    assert rules.storage_of(names, shape).shard_shape(shape) == (3, 6, 5)
    assert rules.replicas_of(names, shape) == 1
    # The factors that are left are copies, and are counted.
    assert [rules.replicas_of((EMBED, None), shape) for shape in ((16, 3), (12, 3), (4, 2), (7, 3))] == [1, 2, 1, 8]


def test_small_parameters_stay_whole_in_every_layer():
    rules = sharding(replicate_below=1000, fsdp=4, tensor=2)
    assert rules.storage_of((EMBED,), (64,)).spec == P(None)
    assert rules.storage_of((LAYERS, EMBED), (500, 64)).spec == P(None, None)
    assert rules.storage_of((HEADS,), (64,)).spec == P("tensor")
    assert rules.storage_of((EMBED,), (1000,)).spec == P("fsdp")


def test_compute_has_no_fsdp_on_parameters():
    rules = sharding(fsdp=4, tensor=2)
    shapes = {"a": jax.ShapeDtypeStruct((64, 32), jnp.float32), "b": jax.ShapeDtypeStruct((5, 32), jnp.float32)}
    names = {"a": (EMBED, HEADS), "b": (HEADS, EMBED)}
    places = rules.compute(names, shapes)
    assert places["a"].spec == P(None, "tensor") and places["b"].spec == P(None, None)


@pytest.mark.parametrize(
    "shape,spec", [((8, 6), P(("data", "fsdp"), None)), ((2, 6), P("data", None)), ((3, 6), P(None, None))]
)
def test_batches_that_do_not_divide(shape, spec):
    rules = sharding(data=2, fsdp=4)
    assert rules.batch(jax.ShapeDtypeStruct(shape, jnp.float32)).spec == spec


def test_activations():
    rules = sharding(data=2, fsdp=1, seq=2, tensor=2)
    names = (BATCH, LENGTH, axes.ACTIVATION_HEADS, None)
    assert rules.activation(names, (2, 6, 4, 5)).spec == P(("data", "fsdp"), "seq", "tensor", None)
    assert rules.activation(names, (2, 7, 3, 5)).spec == P(("data", "fsdp"), None, None, None)


def test_constraints_are_real():
    rules = sharding(fsdp=2, seq=4)
    with axes.partitioned(rules):
        x = jax.jit(lambda x: axes.constrain(x * 2, BATCH, LENGTH))(jnp.ones((4, 8)))
    assert x.addressable_shards[0].data.shape == (2, 2)


@pytest.mark.parametrize(
    "mesh,shape",
    [({"fsdp": 8}, (64, 32)), ({"fsdp": 8}, (12, 20)), ({"fsdp": 2, "seq": 4}, (64, 32))],
    ids=["one_dimension", "two_dimensions", "two_axes"],
)
def test_gathered_parameters_give_scattered_gradients(mesh, shape):
    rules = sharding(**mesh)
    place = rules.storage_of((EMBED, HEADS), shape)
    kernel = jax.device_put(jax.random.normal(jax.random.key(0), shape), place)
    x = jnp.ones((8, shape[0]))
    x = jax.device_put(x, rules.batch(x))

    def loss(kernel, x):
        return jnp.sum((x @ rules.fsdp_all_gather({"k": kernel}, {"k": (EMBED, HEADS)})["k"]) ** 2)

    # Only a mesh axis as a whole is a sharding that JAX finds for an output by itself.
    step = jax.jit(jax.grad(loss), out_shardings=place if shape == (12, 20) else None)
    gradient = step(kernel, x)
    assert gradient.sharding.is_equivalent_to(place, 2)
    assert jnp.allclose(gradient, jax.grad(lambda k, x: jnp.sum((x @ k) ** 2))(*jax.device_get((kernel, x))), rtol=1e-5)
    program = step.lower(kernel, x).compile().as_text()
    rows, columns = place.shard_shape(shape)
    assert "all-gather" in program and ("reduce-scatter" in program or f"f32[{rows},{columns}]" in program)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"storage": {"embedd": ("fsdp",)}}, "storage: 'embedd' is not a logical axis"),
        ({"compute": {"embed": ("model",)}}, "compute.embed: 'model' is not a mesh axis"),
        ({"storage": {"layers": ("fsdp",)}}, "layers are scanned over"),
        ({"replicate_below": -1}, "replicate_below = -1"),
    ],
)
def test_tables_with_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        ShardingConfig(**change).validate()
