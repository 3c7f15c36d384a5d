"""Every kernel of epipolar attention against the one with the whole bias in memory, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.geometry.epipolar import Band, EpipolarBias, band, epipolar_bias, token_points, unit_lines
from jvgen.kernels.epipolar_attention import chunked, reference, tpu
from jvgen.nn.epipolar_attention import EpipolarKernel, choose, epipolar_attention
from jvgen.preflight import topology

GRID, SIZE = (9, 17), (90, 160)  # 153 tokens: no multiple of any block
KERNELS = {
    "chunked": functools.partial(chunked.attention, block=64),
    "tpu": functools.partial(tpu.attention, interpret=True, largest_block=128),
}


def inputs(batch: int = 2, heads: int = 2, width: int = 16, dtype=jnp.float32) -> tuple:
    rng = np.random.default_rng(0)
    length = GRID[0] * GRID[1]
    return tuple(jnp.asarray(rng.standard_normal((batch, length, heads, width)), dtype) for _ in range(3))


def some_band(form: EpipolarBias, batch: int = 2) -> Band:
    """Lines of random matrices; one query of each frame has none, and looks everywhere."""
    rng = np.random.default_rng(1)
    matrices = rng.standard_normal((batch, 3, 3)) * [[1, 1, 100], [1, 1, 100], [100, 100, 10_000]]
    lines = token_points(GRID, SIZE) @ np.swapaxes(matrices, -1, -2)
    lines[:, 5] = 0.0
    return band(unit_lines(jnp.float32(lines)), GRID, SIZE, form=form, width=6.0)


@functools.cache
def program_of(attend):
    """One for all forms of the bias: they are other numbers."""

    @jax.jit
    def run(query, key, value, made):
        def loss(*arrays):
            output = attend(*arrays, *made, scale=0.3).astype(jnp.float32)
            return jnp.sum(jnp.sin(output)), output

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    return run


def output_and_gradients(attend, arrays, made: Band):
    (_, output), gradients = program_of(attend)(*arrays, made)
    return [np.asarray(part, np.float32) for part in (output, *gradients)]


@pytest.fixture(scope="module")
def expected():
    return {form: output_and_gradients(reference.attention, inputs(), some_band(form)) for form in EpipolarBias}


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("form", list(EpipolarBias))
def test_kernels_agree_with_the_reference(name, form, expected):
    made = output_and_gradients(KERNELS[name], inputs(), some_band(form))
    for what, ours, theirs in zip(("output", "query", "key", "value"), made, expected[form], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max() + 1e-7, rtol=0, err_msg=what)


def test_the_reference_adds_the_bias_of_the_geometry():
    query, key, value = inputs()
    made = some_band(EpipolarBias.SOFT)
    scores = 0.3 * jnp.einsum("blnd,bknd->bnlk", query, key) + epipolar_bias(made)[:, None]
    plain = jnp.einsum("bnlk,bknd->blnd", jax.nn.softmax(scores, axis=-1), value)
    np.testing.assert_allclose(reference.attention(query, key, value, *made, scale=0.3), plain, atol=1e-5)


@pytest.mark.parametrize("name", list(KERNELS))
def test_bfloat16_stays_near_float32(name, expected):
    arrays = inputs(dtype=jnp.bfloat16)
    made = output_and_gradients(KERNELS[name], arrays, some_band(EpipolarBias.SOFT))
    exact = output_and_gradients(
        reference.attention, [a.astype(jnp.float32) for a in arrays], some_band(EpipolarBias.SOFT)
    )
    for ours, theirs in zip(made, exact, strict=True):
        assert np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max()


def test_tiles_outside_all_bands_are_skipped():
    """Horizontal lines: a hard band of one row of tokens leaves few tiles, and skipping them changes nothing."""
    grid, size = (32, 16), (320, 160)
    points = token_points(grid, size)
    lines = np.stack([0 * points[:, 0], 0 * points[:, 0] + 1, -points[:, 1]], axis=-1)[None]
    made = band(jnp.float32(lines), grid, size, form=EpipolarBias.HARD)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.float32(rng.standard_normal((1, 512, 1, 8))) for _ in range(3))
    static = tpu.Static(512, 128, 128, None, True)
    rows = jnp.concatenate([lines[0].T * made.slope[0], jnp.full((1, 512), made.slope[0] * made.width[0])])[None]
    seen = jax.jit(tpu.visible, static_argnums=2)(jnp.float32(rows), jnp.asarray(points), static)
    np.testing.assert_array_equal(seen[0], np.eye(4))
    every = np.asarray(epipolar_bias(made))[0].reshape(4, 128, 4, 128)
    np.testing.assert_array_equal((every == 0).any(axis=(1, 3)), np.eye(4))
    ours, exact = (
        jax.jit(functools.partial(attend, scale=0.3))(query, key, value, *made)
        for attend in (KERNELS["tpu"], reference.attention)
    )
    np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_the_dispatcher_chooses():
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert choose("tpu", dtype=bfloat16, scores=10**9, keys=1350)[0] is EpipolarKernel.TPU
    assert choose("tpu", dtype=float32, scores=10**9, keys=1350)[0] is EpipolarKernel.CHUNKED
    assert choose("gpu", dtype=bfloat16, scores=10**9, keys=1350)[0] is EpipolarKernel.CHUNKED
    assert choose("cpu", dtype=float32, scores=10**5, keys=64)[0] is EpipolarKernel.REFERENCE
    arrays, made = inputs(), some_band(EpipolarBias.SOFT)
    exact = jax.jit(epipolar_attention)(*arrays, made)
    for kernel in (EpipolarKernel.CHUNKED, EpipolarKernel.TPU):
        ours = jax.jit(functools.partial(epipolar_attention, kernel=kernel))(*arrays, made)
        np.testing.assert_allclose(ours, exact, atol=1e-5)


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")
def test_it_compiles_for_tpus():
    """At 480x720, one frame of two views: what Mosaic takes, forward and backward, and how little memory it needs."""
    devices = topology.describe("v5e:2x2").devices[:1]
    placed = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), ("one",)), jax.sharding.PartitionSpec())

    def spec(*shape: int, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    tokens = spec(2, 1350, 4, 64, dtype=jnp.bfloat16)
    arrays = (tokens, tokens, tokens, spec(2, 1350, 3), spec(1350, 3), spec(2), spec(2))

    def loss(*arrays):
        return jnp.sum(tpu.attention(*arrays, scale=0.125).astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    scores = 4 * 2 * 4 * 1350 * 1350
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * scores
