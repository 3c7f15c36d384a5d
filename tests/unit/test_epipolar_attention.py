"""Every kernel of epipolar attention against the one with the whole bias in memory, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError
from jvgen.geometry.cameras import Cameras
from jvgen.geometry.epipolar import (
    Band,
    EpipolarBias,
    band,
    epipolar_bias,
    epipolar_lines,
    fundamental_matrices,
    token_points,
    unit_lines,
)
from jvgen.kernels.epipolar_attention import chunked, gpu, reference, tpu
from jvgen.nn import kernel_report
from jvgen.nn.epipolar_attention import EpipolarKernel, choose, epipolar_attention
from jvgen.preflight import topology

GRID, SIZE = (9, 17), (90, 160)  # 153 tokens: no multiple of any block
KERNELS = {
    "chunked": functools.partial(chunked.attention, block=64),
    "gpu": functools.partial(gpu.attention, implementation="xla"),
    "gpu-by-frame": functools.partial(gpu.attention, implementation="xla", max_bias_bytes=1),
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
    # JAX's own attention mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
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
    with jax.numpy_dtype_promotion("standard"):
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


def camera_lines(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Lines of 4 pairs of random cameras, unit normals."""
    rng = np.random.default_rng(0)
    rotations = np.linalg.qr(rng.standard_normal((2, 4, 3, 3)))[0]
    rotations *= np.linalg.det(rotations)[..., None, None]
    places = rng.standard_normal((2, 4, 3, 1))
    focal = np.broadcast_to(np.float32([0.8, 1.2, 0.5, 0.5]), (4, 4))
    pair = [
        Cameras(jnp.asarray(focal), jnp.float32(np.concatenate(rt, -1))) for rt in zip(rotations, places, strict=True)
    ]
    return np.asarray(unit_lines(epipolar_lines(fundamental_matrices(*pair, size), token_points(grid, size))))


def far_lines(kind: str) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """Lines of which some, or all, are farther from the image than a bias of -1e4; the grid and size of the image."""
    grid, size = (12, 32), (480, 720)
    if kind == "cameras":
        return camera_lines(grid, size), grid, size
    rng = np.random.default_rng(2)
    angles = rng.uniform(0, np.pi, (2, 384))
    places = rng.uniform(-400, 400, (2, 384))
    far = {"a block": slice(128, 256), "some of a block": slice(100, 150), "all": slice(None)}[kind]
    places[:, far] = rng.choice([-1, 1], places[:, far].shape) * rng.uniform(1.5e5, 4e5, places[:, far].shape)
    # Nearly upright lines on one side: all tiles, which are rows of the image, are about as far.
    angles[:, far], places[1, far] = 0.005, np.abs(places[1, far])
    return np.stack([np.cos(angles), np.sin(angles), places], axis=-1).astype(np.float32), grid, size


@pytest.mark.parametrize("kind", ["cameras", "a block", "some of a block", "all"])
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_lines_far_outside_the_image_attend_to_the_nearest_keys(name, kind):
    lines, grid, size = far_lines(kind)
    made = band(jnp.float32(lines), grid, size, form=EpipolarBias.ABSOLUTE, width=6.0)
    assert kind == "cameras" or np.asarray(epipolar_bias(made)).max(axis=-1).min() < -1e4
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.float32(rng.standard_normal((len(lines), 384, 1, 8))) for _ in range(3))
    with jax.numpy_dtype_promotion("standard"):
        ours = output_and_gradients(KERNELS[name], arrays, made)
    exact = output_and_gradients(reference.attention, arrays, made)
    # A distance of 4e5 pixels is known to 0.03 of them.
    tolerance = 1e-4 if kind == "cameras" else 5e-3
    for mine, theirs in zip(ours, exact, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


def test_the_scale_is_exact_on_tpus():
    """Of head width 96, 1 / sqrt(96) times a bfloat16 is none."""
    arrays = inputs(width=96, dtype=jnp.bfloat16)
    query, key, value = (a.astype(jnp.float32) for a in arrays)
    made = some_band(EpipolarBias.ABSOLUTE)
    attend = functools.partial(tpu.attention, interpret=True, largest_block=128)

    def gap(query, key, value, scale):
        exact = reference.attention(*(a.astype(jnp.float32) for a in (query, key, value)), *made, scale=96**-0.5)
        ours = jax.jit(functools.partial(attend, scale=scale))(query, key, value, *made).astype(jnp.float32)
        return float(jnp.sqrt(jnp.mean((ours - exact) ** 2)))

    rounded = (query * 96**-0.5).astype(jnp.bfloat16)
    ours = gap(*arrays, 96**-0.5)
    exact = reference.attention(query, key, value, *made, scale=96**-0.5)
    of_rounded = jax.jit(functools.partial(attend, scale=1.0))(rounded, *arrays[1:], *made).astype(jnp.float32)
    assert ours < 0.9 * float(jnp.sqrt(jnp.mean((of_rounded - exact) ** 2)))


CHOICES = [
    ("tpu", "bfloat16", 10**9, 1350, "", EpipolarKernel.TPU),
    ("tpu", "float32", 10**9, 1350, "", EpipolarKernel.CHUNKED),
    ("tpu", "bfloat16", 10**5, 64, "", EpipolarKernel.REFERENCE),
    ("gpu", "bfloat16", 10**9, 1350, "", EpipolarKernel.GPU),
    ("gpu", "float32", 10**9, 1350, "float32", EpipolarKernel.CHUNKED),
    ("gpu", "bfloat16", 10**5, 64, "cuDNN is not detected", EpipolarKernel.REFERENCE),
    ("cpu", "float32", 10**5, 64, "", EpipolarKernel.REFERENCE),
]


@pytest.mark.parametrize("platform,dtype,scores,keys,refused,kernel", CHOICES)
def test_automatic_choice(platform, dtype, scores, keys, refused, kernel):
    chosen, reason = choose(platform, dtype=jnp.dtype(dtype), scores=scores, keys=keys, gpu_refusal=refused)
    assert chosen is kernel and reason and refused in reason


@pytest.mark.parametrize("kernel", [EpipolarKernel.CHUNKED, EpipolarKernel.GPU, EpipolarKernel.TPU])
def test_the_dispatcher_runs_the_kernel(kernel):
    arrays, made = inputs(), some_band(EpipolarBias.SOFT)
    exact = jax.jit(lambda *a: epipolar_attention(*a))(*arrays, made)
    with kernel_report.collecting(kernel_report.KernelReport()) as report, jax.numpy_dtype_promotion("standard"):
        ours = jax.jit(functools.partial(epipolar_attention, kernel=kernel))(*arrays, made)
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert report.lines == [
        f"epipolar attention of 2x153x2x16 over 153 keys in float32: kernel {kernel.value} (as configured)"
    ]


def test_without_cudnn_the_report_says_what_runs(cuda_without_cudnn):
    arrays, made = inputs(dtype=jnp.bfloat16), some_band(EpipolarBias.SOFT)
    with kernel_report.collecting(kernel_report.KernelReport()) as report:
        jax.eval_shape(lambda *a: epipolar_attention(*a), *arrays, made)
    assert "kernel reference" in report.lines[0] and "cuDNN is not detected" in report.lines[0]
    with pytest.raises(ConfigError, match="sync.kernel = gpu: cuDNN attention: cuDNN is not detected"):
        jax.eval_shape(functools.partial(epipolar_attention, kernel=EpipolarKernel.GPU), *arrays, made)


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
