"""Every attention kernel against the reference: forward, gradient, padding, precision, and the choice of AUTO."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.kernels.attention import chunked, cpu, gpu, reference, tpu
from jvgen.nn import attention as dispatcher
from jvgen.nn.attention import AttentionKernel, attention, choose
from jvgen.nn.stacked import Remat, checkpointed
from jvgen.preflight import topology


def arrays(key, length=40, keys=56, heads=3, width=16, batch=2, dtype=jnp.float32):
    names = {"query": length, "key": keys, "value": keys, "gradient": length}
    drawn = jax.random.split(key, len(names))
    return [jax.random.normal(k, (batch, n, heads, width), dtype) for k, n in zip(drawn, names.values(), strict=True)]


def value_and_gradients(function, *inputs):
    def run(query, key, value, gradient):
        output, pull = jax.vjp(function, query, key, value)
        return output, *pull(gradient)

    return jax.jit(run)(*inputs)


def assert_same(actual, expected, tolerance):
    for name, a, b in zip(("output", "d query", "d key", "d value"), actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (name, np.abs(a - b).max())


def numpy_attention(query, key, value, scale, valid):
    """Float64, one row at a time."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key[:, :valid], value[:, :valid]))
    output = np.zeros_like(query)
    for b, i, n in np.ndindex(query.shape[:3]):
        scores = np.exp(scale * key[b, :, n] @ query[b, i, n])
        output[b, i, n] = scores @ value[b, :, n] / scores.sum()
    return output


@pytest.mark.parametrize("valid", [None, 33])
def test_reference_is_softmax_in_float64(key, valid):
    query, keys, value, _ = arrays(key, length=9, keys=40)
    got = reference.attention(query, keys, value, scale=0.3, valid_length=valid)
    np.testing.assert_allclose(got, numpy_attention(query, keys, value, 0.3, valid), atol=2e-6)


KERNELS = {
    "chunked": lambda *a, **k: chunked.attention(*a, block=16, **k),
    "chunked-one-block": chunked.attention,
    "cpu": cpu.attention,
    "gpu": lambda *a, **k: gpu.attention(*a, implementation="xla", **k),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("valid", [None, 41])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_reference(key, name, valid, dtype):
    inputs = arrays(key, dtype=dtype)
    options = {"scale": 0.2, "valid_length": valid}
    # JAX's own attention mixes dtypes.
    with jax.numpy_dtype_promotion("standard" if name == "gpu" else "strict"):
        got = value_and_gradients(lambda *a: KERNELS[name](*a, **options), *inputs)
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *(a.astype(jnp.float32) for a in inputs))
    want = [a.astype(dtype) for a in want]
    assert_same(got, want, 2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("name", ["chunked", "cpu", "gpu"])
def test_causal_kernels_equal_the_reference(key, name, monkeypatch):
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 16)
    monkeypatch.setattr(cpu, "KEY_BLOCK", 12)
    inputs = arrays(key, length=40, keys=40)
    with jax.numpy_dtype_promotion("standard" if name == "gpu" else "strict"):
        got = value_and_gradients(lambda *a: KERNELS[name](*a, scale=0.2, causal=True), *inputs)
    want = value_and_gradients(lambda *a: reference.attention(*a, scale=0.2, causal=True), *inputs)
    assert_same(got, want, 3e-6)
    # The last query sees everything; the first only itself.
    query, keys, value, _ = inputs
    plain = reference.attention(query, keys, value, scale=0.2)
    np.testing.assert_allclose(want[0][:, -1], plain[:, -1], atol=1e-6)
    np.testing.assert_allclose(want[0][:, 0], value[:, 0], atol=1e-6)


def test_causal_attention_needs_a_query_for_every_key(key):
    query, keys, value, _ = arrays(key, length=8, keys=9)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(query, keys, value, causal=True)


@pytest.mark.parametrize("keys", [40, 512, 600])
def test_cpu_kernel_blocks(key, monkeypatch, keys):
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 128)
    inputs = arrays(key, length=300, keys=keys, heads=2, width=8, batch=1)
    options = {"scale": 0.35, "valid_length": keys - 3}
    got = value_and_gradients(lambda *a: cpu.attention(*a, **options), *inputs)
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *inputs)
    assert_same(got, want, 3e-6)


@pytest.mark.parametrize("name", ["chunked", "cpu"])
def test_very_negative_scores_stay_finite(key, name):
    query, keys, value, gradient = arrays(key)
    inputs = (jnp.abs(query) * 50, -jnp.abs(keys) * 50, value, gradient)
    options = {"scale": 1.0, "valid_length": 41}
    got = value_and_gradients(lambda *a: KERNELS[name](*a, **options), *inputs)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in got)


@pytest.mark.parametrize(
    "valid,width", [(200, 64)] + [pytest.param(*case, marks=pytest.mark.slow) for case in ((None, 64), (200, 128))]
)
def test_splash_kernel_equals_reference(key, valid, width):
    inputs = arrays(key, length=130, keys=256, heads=2, width=width, batch=1)
    options = {"scale": 0.125, "valid_length": valid}
    got = value_and_gradients(lambda *a: tpu.attention(*a, interpret=True, **options), *inputs)
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *inputs)
    assert_same(got, want, 5e-6)


def test_splash_mask_is_made_in_blocks():
    mask = tpu.ValidKeys((2**20, 2**20), 1000)
    block = mask[slice(512, 1024), slice(896, 1024)]
    assert block.shape == (512, 128) and block.sum() == 512 * 104


@pytest.mark.parametrize("length,block", [(17920, 896), (4480, 896), (17776, 896), (130, 256), (64, 128), (2048, 1024)])
def test_splash_blocks_pad_least(length, block):
    assert tpu.block_size(length) == block


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("width", [128, 512])
def test_splash_blocks_fit_into_vmem(width):
    """Stable Diffusion's autoencoders attend with one head of 512 channels."""
    device = topology.describe("v5e:2x2").devices[0]
    tokens = jax.ShapeDtypeStruct((2, 1024, 1, width), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))

    def loss(*arrays):
        return jnp.sum(tpu.attention(*arrays, scale=width**-0.5).astype(jnp.float32))

    with jax.default_matmul_precision("default"):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(tokens, tokens, tokens).compile()
    # What all scores of both batches would take in float32: they are never there.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 1024 * 1024


@pytest.mark.parametrize("kernel", [AttentionKernel.REFERENCE, AttentionKernel.GPU])
@pytest.mark.parametrize("shape", [(1, 3, 40, 56), (2, 1, 1, 56), (1, 3, 40, 1)])
def test_bias(key, kernel, shape):
    query, keys, value, _ = arrays(key)
    bias = jax.random.normal(key, shape)
    got = attention(query, keys, value, bias=bias, valid_length=50, kernel=kernel)
    scores = jnp.einsum("blnd,bknd->bnlk", query, keys) / 4 + bias
    want = jnp.einsum("bnlk,bknd->blnd", jax.nn.softmax(scores[..., :50], -1), value[:, :50])
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_bias_with_a_kernel_that_has_none(key):
    query, keys, value, _ = arrays(key)
    with pytest.raises(ValueError, match="kernel = cpu: does not support a bias"):
        attention(query, keys, value, bias=jnp.zeros((1, 1, 1, 56)), kernel=AttentionKernel.CPU)


@pytest.mark.parametrize("valid", [0, 57])
def test_valid_length_out_of_range(key, valid):
    query, keys, value, _ = arrays(key)
    with pytest.raises(ValueError, match=f"valid_length = {valid}: must lie in 1..56"):
        attention(query, keys, value, valid_length=valid)


CHOICES = [
    ("cpu", "float32", 1024, False, AttentionKernel.CPU),
    ("cpu", "bfloat16", 16, False, AttentionKernel.CPU),
    ("cpu", "float32", 64, True, AttentionKernel.REFERENCE),
    ("tpu", "bfloat16", 17920, False, AttentionKernel.TPU),
    ("tpu", "bfloat16", 226, False, AttentionKernel.REFERENCE),
    ("tpu", "float32", 17920, False, AttentionKernel.CHUNKED),
    ("gpu", "bfloat16", 17920, False, AttentionKernel.GPU),
    ("cuda", "float16", 64, False, AttentionKernel.GPU),
    ("gpu", "float32", 17920, False, AttentionKernel.CHUNKED),
    ("gpu", "float32", 64, False, AttentionKernel.REFERENCE),
    ("rocm", "bfloat16", 4096, False, AttentionKernel.CHUNKED),
]


@pytest.mark.parametrize("platform,dtype,length,bias,kernel", CHOICES)
def test_automatic_choice(platform, dtype, length, bias, kernel):
    choice = choose(platform, dtype=jnp.dtype(dtype), query_length=length, key_length=length, head_width=64, bias=bias)
    assert choice.kernel is kernel and choice.reason


def test_wide_heads_are_not_for_cudnn():
    choice = choose("gpu", dtype=jnp.dtype("bfloat16"), query_length=4096, key_length=4096, head_width=256)
    assert choice.kernel is AttentionKernel.CHUNKED


def test_automatic_choice_is_logged(key, caplog):
    dispatcher._log_choice.cache_clear()
    query, keys, value, _ = arrays(key)
    with caplog.at_level(logging.INFO):
        attention(query, keys, value)
    assert "56 keys: kernel cpu (CPU devices)" in caplog.text


@pytest.mark.parametrize("kernel", [AttentionKernel.CPU, AttentionKernel.CHUNKED])
def test_remat_stores_the_output_of_attention(key, kernel):
    """Under Remat.SAVE_ATTENTION the backward pass holds no second forward pass of attention."""
    query, keys, value, _ = arrays(key)

    def exponentials(remat):
        layer = checkpointed(lambda *a: attention(*a, kernel=kernel), remat, in_scan=True)
        jaxpr = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(layer(*a) ** 2), argnums=(0, 1, 2)))(query, keys, value)
        return str(jaxpr).count("= exp ")

    assert exponentials(Remat.SAVE_ATTENTION) == exponentials(Remat.NONE)
    assert exponentials(Remat.FULL) > exponentials(Remat.SAVE_ATTENTION)


@pytest.mark.parametrize("kernel", [AttentionKernel.CPU, AttentionKernel.CHUNKED])
def test_no_array_of_all_scores(key, kernel):
    """Nothing in the forward and backward program has queries x keys elements a head."""
    inputs = arrays(key, length=2048, keys=1536, heads=2, width=8, batch=1)
    program = jax.jit(lambda *a: value_and_gradients(lambda *x: attention(*x, kernel=kernel), *a)).lower(*inputs)
    shapes = re.findall(r"tensor<([\dx]+)xf32>", program.as_text())
    assert max(int(np.prod([int(n) for n in shape.split("x")])) for shape in shapes) < 2048 * 1536
