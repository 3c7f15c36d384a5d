"""Convolutions sharded over eight host devices: outputs and gradients of one device, with little communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.nn import halo
from jvgen.nn.conv import convolve
from jvgen.parallel import axes
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import SPATIAL_SHARDING, TEMPORAL_SHARDING, Sharding, ShardingConfig
from jvgen.preflight import collectives

SPACE, TIME = ShardingConfig(compute=SPATIAL_SHARDING), ShardingConfig(compute=TEMPORAL_SHARDING)
ROWS = MeshConfig(fsdp=1, seq=8)
BOTH = MeshConfig(fsdp=2, seq=2, tensor=2)
SAME = ((1, 1), (1, 1), (1, 1))
ZEROS, REPEAT = ("zeros",) * 3, ("repeat",) * 3
CASES = {
    # name: (rules, mesh, size, strides, padding, borders, axes that are split)
    "rows": (SPACE, ROWS, (3, 16, 8), (1, 1, 1), SAME, ZEROS, (1,)),
    "rows of two": (SPACE, ROWS, (3, 16, 8), (1, 2, 2), ((1, 1), (0, 1), (0, 1)), ZEROS, (1,)),
    "rows and columns": (SPACE, BOTH, (3, 8, 4), (1, 1, 1), ((2, 0), (1, 1), (1, 1)), REPEAT, (1, 2)),
    "strides between both": (SPACE, BOTH, (5, 8, 4), (2, 2, 2), ((2, 0), (1, 1), (1, 1)), REPEAT, (1, 2)),
    "time": (TIME, BOTH, (8, 8, 4), (1, 1, 1), ((2, 0), (1, 1), (1, 1)), ("repeat", "zeros", "zeros"), (0, 1)),
    "strides in time": (
        TIME,
        BOTH,
        (8, 8, 4),
        (2, 2, 2),
        ((1, 0), (0, 1), (0, 1)),
        ("repeat", "zeros", "zeros"),
        (0, 1),
    ),
    "odd frames stay whole": (TIME, BOTH, (5, 8, 4), (1, 1, 1), SAME, REPEAT, (1,)),
}


@pytest.mark.parametrize("name", CASES)
def test_convolution_equals_that_of_one_device(name):
    rules, mesh, size, strides, padding, borders, split = CASES[name]
    sharding = Sharding(make_mesh(mesh), rules)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, *size, 3)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 3, 3, 8)).astype(np.float32)
    places = (axes.BATCH, axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
    found = halo.splits(sharding, places, inputs.shape, kernel.shape, strides, padding)
    assert tuple(axis for axis, one in enumerate(found) if one) == split

    def run(partitioner):
        def loss(inputs, kernel):
            with axes.partitioned(partitioner):
                output = convolve(inputs, kernel, strides=strides, padding=padding, borders=borders)
                return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    places = (sharding.activation(places, inputs.shape), sharding.replicated)
    (_, whole), expected = run(None)(inputs, kernel)
    (_, parts), gradients = run(sharding)(*jax.device_put((inputs, kernel), places))
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_only_halos_are_communicated():
    sharding = Sharding(make_mesh(ROWS), SPACE)
    places = (axes.BATCH, axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
    shape = jax.ShapeDtypeStruct((1, 3, 16, 8, 3), jnp.float32, sharding=sharding.activation(places, (1, 3, 16, 8, 3)))

    def run(inputs, kernel):
        with axes.partitioned(sharding):
            return convolve(inputs, kernel, strides=(1, 1, 1), padding=SAME)

    text = jax.jit(run).lower(shape, jnp.zeros((3, 3, 3, 3, 8))).compile().as_text()
    assert text.count("collective-permute(") + text.count("collective-permute-start(") == 2
    assert "all-gather" not in text and "all-reduce" not in text


def test_gradients_of_repeated_borders_stay_with_their_clip():
    sharding = Sharding(make_mesh(MeshConfig(fsdp=8)), ShardingConfig())
    shape = (16, 5, 8, 8, 4)
    places = sharding.activation((axes.BATCH, None, None, None, None), shape)
    clips = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places)

    def loss(clips, kernel):
        for _ in range(2):
            clips = convolve(jnp.sin(clips), kernel, strides=(1, 1, 1), padding=SAME, borders=REPEAT)
        return jnp.sum(jnp.square(clips))

    def run(clips, kernel):
        with axes.partitioned(sharding):
            return jax.grad(loss, argnums=(0, 1))(clips, kernel)

    compiled = jax.jit(run, out_shardings=(places, None)).lower(clips, jnp.zeros((3, 3, 3, 4, 4))).compile()
    assert {one.kind for one in collectives.read(compiled.as_text())} == {"all-reduce"}  # of the kernel's gradient
