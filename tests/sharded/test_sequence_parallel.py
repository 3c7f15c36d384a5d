"""Every way in which devices attend to a sequence that they share gives the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jvgen.config import ConfigError
from jvgen.geometry.epipolar import Band
from jvgen.kernels.attention import reference
from jvgen.nn import kernel_report
from jvgen.nn.attention import AttentionKernel, attention
from jvgen.nn.epipolar_attention import epipolar_attention
from jvgen.nn.sequence_parallel import SequenceParallel, choose
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding, ShardingConfig

# Three heads on each half of `tensor`, which four devices along `seq` do not divide. Of the 64 tokens of these devices
# the last 16 are padding as a whole, and some of the third.
SHAPE, VALID = (2, 64, 6, 8), 40
MESH = {"fsdp": 1, "seq": 4, "tensor": 2}
OPTIONS = {"scale": 0.4, "valid_length": VALID}


def passes(attend, query, key, value, gradient):
    output, pull = jax.vjp(attend, query, key, value)
    # Rows of padded queries are meaningless.
    seen = (jnp.arange(SHAPE[1]) < VALID)[None, :, None, None]
    return jnp.where(seen, output, 0), *pull(jnp.where(seen, gradient, 0))


@pytest.fixture(scope="module")
def arrays():
    return jax.random.normal(jax.random.key(0), (4, *SHAPE))


@pytest.fixture(scope="module")
def expected(arrays):
    return jax.jit(functools.partial(passes, functools.partial(reference.attention, **OPTIONS)))(*arrays)


def sharding_of(mesh):
    return Sharding(make_mesh(MeshConfig(**mesh)), ShardingConfig())


CASES = [("gather", "chunked"), ("ulysses", "cpu"), ("ring", "chunked"), ("ring", "flash_tpu")]


@pytest.mark.parametrize("way,kernel", CASES)
def test_outputs_and_gradients_are_those_of_one_device(arrays, expected, way, kernel):
    sharding = sharding_of(MESH)
    place = NamedSharding(sharding.mesh, P(None, "seq", "tensor", None))
    choice = {"kernel": AttentionKernel(kernel), "sequence": SequenceParallel(way)}

    def run(*arrays):
        with axes.partitioned(sharding):
            return passes(functools.partial(attention, **OPTIONS, **choice), *arrays)

    with kernel_report.collecting(kernel_report.KernelReport()) as report:
        compiled = jax.jit(run, in_shardings=place).lower(*arrays).compile()
    assert report.lines[0].endswith(f"(as configured; tokens over seq=4: {way}, as configured)")
    sent = {"gather": "all-gather", "ulysses": "all-to-all", "ring": "collective-permute"}
    text = compiled.as_text()
    assert [name for name in sent.values() if f" {name}(" in text or f"{name}-start(" in text] == [sent[way]]
    made = compiled(*jax.device_put(tuple(arrays), place))
    for name, got, want in zip(("output", "query", "key", "value"), made, expected, strict=True):
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max(), name


@pytest.mark.parametrize(
    "platform,devices,tokens,heads,ring,way",
    [
        ("tpu", 4, 4480, 30, True, "ring"),
        ("tpu", 4, 4480, 30, False, "gather"),
        ("tpu", 4, 4480, 48, False, "ulysses"),
        ("tpu", 4, 1024, 48, True, "ulysses"),
        ("tpu", 2, 1024, 48, True, "gather"),  # as many bytes as by ulysses
        ("gpu", 4, 4480, 32, True, "ulysses"),
        ("cpu", 4, 4480, 32, True, "gather"),
    ],
)
def test_automatic_choice(platform, devices, tokens, heads, ring, way):
    found = choose(platform, devices=devices, tokens=tokens, heads=heads, ring=ring)
    assert found.way.value == way and found.reason


@pytest.mark.parametrize(
    "options,said",
    [
        ({"sequence": SequenceParallel.RING, "kernel": AttentionKernel.CPU}, "ring: not with kernel cpu"),
        ({"sequence": SequenceParallel.RING, "bias": jnp.zeros((1, 1, 1, 64))}, "ring: not with a bias"),
        ({"sequence": SequenceParallel.ULYSSES, "bias": jnp.zeros((1, 1, 1, 64))}, "ulysses: not with a bias"),
    ],
)
def test_what_a_way_does_not_take(arrays, options, said):
    with axes.partitioned(sharding_of(MESH)), pytest.raises(ConfigError, match=said):
        jax.eval_shape(functools.partial(attention, **options), *arrays[:3])


def test_devices_of_a_sequence_share_the_heads_of_epipolar_attention():
    """Six heads on eight devices: one each, two of them padding. Without that each device would compute three."""
    query, key, value, gradient = jax.random.normal(jax.random.key(1), (4, 4, 24, 6, 8))
    lines = jax.random.normal(jax.random.key(2), (4, 24, 3))
    points = jnp.concatenate([jax.random.normal(jax.random.key(3), (24, 2)), jnp.ones((24, 1))], axis=-1)
    band = Band(lines, points, jnp.full((4,), 0.1), jnp.full((4,), 2.0))

    def run(sharding, *arrays):
        with axes.partitioned(sharding):
            output, pull = jax.vjp(lambda *a: epipolar_attention(*a, band), *arrays)
            return output, *pull(gradient)

    expected = jax.jit(functools.partial(run, None))(query, key, value)
    program = jax.jit(functools.partial(run, sharding_of(MESH))).lower(query, key, value).compile()
    assert "f32[4,1,24,24]" in program.as_text() and "f32[4,3,24,24]" not in program.as_text()
    for got, want in zip(program(query, key, value), expected, strict=True):
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
