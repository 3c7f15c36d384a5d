"""Every attention kernel against the reference: forward, gradient, padding, precision, and the choice of AUTO."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError
from jvgen.geometry.epipolar import Band
from jvgen.kernels.attention import chunked, cpu, flash_tpu, flash_tpu_kernels, gpu, reference, tpu
from jvgen.nn import attention as dispatch
from jvgen.nn import kernel_report
from jvgen.nn.attention import AttentionKernel, attention, choose
from jvgen.nn.epipolar_attention import EpipolarKernel, epipolar_attention
from jvgen.nn.stacked import Remat, checkpointed
from jvgen.parallel import axes
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


@pytest.mark.parametrize("most", [tpu.MAX_PARTS_BYTES, 0], ids=["fused", "separate"])
@pytest.mark.parametrize(
    "queries,keys,options",
    [(128, 1024, {"valid_length": 1000}), (128, 1024, {"valid_length": 300}), (512, 512, {"causal": True})],
    ids=["padding", "blocks of padding", "causal"],
)
def test_backward_kernels_of_splash(key, monkeypatch, most, queries, keys, options):
    """The fused one rounds the queries' gradient of each part to bfloat16, which must not show in their sum.

    Parts of blocks that are masked as a whole must be zero.
    """
    monkeypatch.setattr(tpu, "MAX_BLOCK", 128)
    monkeypatch.setattr(tpu, "MAX_PARTS_BYTES", most)
    sizes = tpu.block_sizes((1, 2, 128, 64), 1024, jnp.bfloat16, 128, 128)
    assert sizes.use_fused_bwd_kernel == bool(most) and sizes.block_kv_dkv == (256 if most else 128)
    inputs = arrays(key, length=queries, keys=keys, heads=1, width=64, batch=1, dtype=jnp.bfloat16)
    options = {"scale": 0.125, **options}
    got = value_and_gradients(lambda *a: tpu.attention(*a, interpret=True, **options), *inputs)
    inputs = [a.astype(jnp.float32) for a in inputs]
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *inputs)
    for name, a, b in zip(("output", "d query", "d key", "d value"), got, want, strict=True):
        error = np.asarray(a, np.float32) - np.asarray(b)
        assert np.sqrt(np.mean(error**2)) < 4e-3 * np.sqrt(np.mean(np.square(b))), name


def test_splash_mask_is_made_in_blocks():
    mask = tpu.ValidKeys((2**20, 2**20), 1000)
    block = mask[slice(512, 1024), slice(896, 1024)]
    assert block.shape == (512, 128) and block.sum() == 512 * 104


FLASH_CASES = {
    "padding": (130, 256, 64, {"valid_length": 200}),
    "blocks of padding": (128, 512, 64, {"valid_length": 300}),
    "causal": (384, 384, 64, {"causal": True}),
    "wide": (128, 128, 128, {}),
}


@pytest.mark.parametrize(
    "case,factor",
    [("padding", 1), ("causal", 1), ("padding", 40)]
    + [pytest.param(name, 1, marks=pytest.mark.slow) for name in ("blocks of padding", "wide")],
)
def test_flash_kernel_equals_reference(key, monkeypatch, case, factor):
    """With scores that the norms bound, and with a running maximum; in several blocks, and calls, of each kind."""
    monkeypatch.setattr(flash_tpu, "DEFAULT_BLOCKS", (128, 256, 128))
    # One block of queries a call, or two and one.
    monkeypatch.setattr(flash_tpu_kernels, "MAX_QUERY_BYTES", 64 * 128 * 12 * (2 if case == "causal" else 1))
    queries, keys, width, options = FLASH_CASES[case]
    query, *others = arrays(key, length=queries, keys=keys, heads=2, width=width, batch=1)
    inputs = (factor * query, *others)
    options = {"scale": 0.125, **options}
    turned = (jnp.moveaxis(array[0], 0, -1) for array in inputs[:2])
    assert bool(jnp.all(flash_tpu_kernels.bounded(*turned, factor=0.125 * math.log2(math.e)))) == (factor == 1)
    got = value_and_gradients(lambda *a: flash_tpu.attention(*a, interpret=True, **options), *inputs)
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *inputs)
    assert_same(got, want, 5e-6 if factor == 1 else 5e-5)


@pytest.mark.parametrize(
    "blocks,itemsize,counts", [(27, 2, [27]), (28, 2, [14, 14]), (53, 2, [27, 26]), (27, 4, [14, 13]), (1, 2, [1])]
)
def test_calls_of_the_backward_kernel(blocks, itemsize, counts):
    """No more than fit: a ring's gradients are written in float32. Calls need not be alike."""
    assert flash_tpu_kernels._blocks_per_call(blocks, 128 * 896, itemsize) == counts


def test_heads_choose_for_themselves_whether_they_need_a_maximum(key):
    """Scores at the bound neither overflow nor vanish, on either side of it; the largest and the least at once."""
    width, keys = 16, 256
    ones = jnp.ones((1, keys, 1, width)) / 4
    sizes = jnp.asarray([63.9, -63.9, 64.1, 1000.0, -1000.0]) / math.log2(math.e)
    query = sizes[:, None] * ones[:, :128]
    key_signs = jnp.where(jnp.arange(keys) % 2, 1.0, -1.0)[:, None, None]
    value = jax.random.normal(key, (1, keys, 5, width)) + 1e3
    arrays_T = (jnp.moveaxis(a[0] * f, 0, -1) for a, f in ((query, math.log2(math.e)), (ones * jnp.ones((5, 1)), 1)))
    assert flash_tpu_kernels.bounded(*arrays_T).tolist() == [1, 1, 0, 0, 0]
    for signs in (key_signs, 1.0, -1.0):
        inputs = (query, ones * signs * jnp.ones((5, 1)), value)
        got = flash_tpu.attention(*inputs, scale=1.0, interpret=True)
        np.testing.assert_allclose(got, reference.attention(*inputs, scale=1.0), rtol=2e-5)


@pytest.mark.parametrize(
    "kind,refused",
    [(f"TPU v{kind}", True) for kind in ("3", "4", "4i", "4 lite")]
    + [(kind, False) for kind in ("TPU v5", "TPU v5 lite", "TPU7x", "cpu")],
)
def test_chips_with_little_vmem_are_refused(kind, refused):
    assert bool(flash_tpu.refusal(kind)) == refused


@pytest.mark.parametrize(
    "kind,width,better",
    [
        ("TPU v5", 512, False),
        ("TPU v5 lite", 128, False),
        ("TPU v5 lite", 256, True),
        ("TPU v6 lite", 256, False),
        ("TPU v6 lite", 512, True),
        ("TPU v6 lite", 64, False),
    ],
)
def test_where_splash_takes_fewer_cycles(kind, width, better):
    assert bool(flash_tpu.slower(kind, width)) == better


def test_flash_kernel_in_bfloat16(key):
    inputs = arrays(key, length=128, keys=1024, heads=1, width=64, batch=1, dtype=jnp.bfloat16)
    options = {"scale": 0.125, "valid_length": 1000}
    got = value_and_gradients(lambda *a: flash_tpu.attention(*a, interpret=True, **options), *inputs)
    inputs = [a.astype(jnp.float32) for a in inputs]
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *inputs)
    for name, a, b in zip(("output", "d query", "d key", "d value"), got, want, strict=True):
        error = np.asarray(a, np.float32) - np.asarray(b)
        assert np.sqrt(np.mean(error**2)) < 4e-3 * np.sqrt(np.mean(np.square(b))), name


@pytest.mark.parametrize("length,block", [(17920, 896), (4480, 896), (17776, 896), (130, 256), (64, 128), (2048, 1024)])
def test_splash_blocks_pad_least(length, block):
    assert tpu.block_size(length) == block


@pytest.mark.parametrize(
    "keys,width,block,product",
    [
        (17776, 64, 1792, 896),
        (4480, 64, 896, 896),
        (1536, 64, 1536, 768),
        # Blocks of 13 and 11 x 128 would have products of 128 keys: more padding takes fewer cycles.
        (1664, 64, 1792, 896),
        (1408, 128, 1536, 768),
        (3328, 64, 1152, 384),
        (768, 256, 256, 256),
        (100, 64, 128, 128),
    ],
)
def test_products_of_this_projects_kernels_are_long(keys, width, block, product):
    assert flash_tpu.blocks(4480, keys, width)[1:] == (block, product)


def rms_error(got, inputs, scale):
    return np.sqrt(np.mean(np.square(np.asarray(got, np.float64) - numpy_attention(*inputs, scale, None))))


# The last scale is as far from a bfloat16 as there is.
@pytest.mark.parametrize("width,scale", [(64, 64**-0.5), (96, 96**-0.5), (128, 128**-0.5), (64, 0.12548)])
@pytest.mark.parametrize("name", ["reference", "chunked", "cpu", "tpu", "flash_tpu"])
def test_the_scale_rounds_at_most_once(key, name, width, scale):
    """A scale rounded to bfloat16 before it multiplies the queries adds a second, systematic error."""
    query, keys, value, _ = arrays(key, length=128, keys=128, heads=2, width=width, batch=1, dtype=jnp.bfloat16)
    query, keys = 2 * query, 2 * keys
    inputs = (query, keys, value)
    interpreted = {"tpu": tpu.attention, "flash_tpu": flash_tpu.attention}
    interpreted = {name: functools.partial(run, interpret=True) for name, run in interpreted.items()}
    kernels = KERNELS | {"reference": reference.attention} | interpreted
    got = jax.jit(functools.partial(kernels[name], scale=scale))(*inputs)
    once = jnp.asarray(query.astype(jnp.float32) * scale, jnp.bfloat16)
    least = rms_error(reference.attention(*inputs, scale=scale), inputs, scale)
    one_rounding = rms_error(reference.attention(once, keys, value, scale=1.0), inputs, scale)
    assert least <= one_rounding
    if name == "flash_tpu":
        # It rounds no query, but weights, as TPUs do with float32 weights too.
        scores = scale * np.einsum("lnd,knd->nlk", *(np.asarray(a[0], np.float64) for a in (query, keys)))
        weights = np.exp(scores)
        rounded = jnp.asarray(weights).astype(jnp.bfloat16).astype(jnp.float32) / weights.sum(-1, keepdims=True)
        output = np.einsum("nlk,knd->lnd", rounded, np.asarray(value[0], np.float64))
        one_rounding = rms_error(jnp.asarray(output[None]).astype(jnp.bfloat16), inputs, scale)
    assert rms_error(got, inputs, scale) < 1.05 * one_rounding


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("module,width", [(tpu, 128), (tpu, 512), (flash_tpu, 64), (flash_tpu, 256), (flash_tpu, 512)])
def test_blocks_fit_into_vmem(module, width):
    """Stable Diffusion's autoencoders attend with one head of 512 channels."""
    device = topology.describe("v5e:2x2").devices[0]
    tokens = jax.ShapeDtypeStruct((2, 1024, 1, width), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))

    def loss(*arrays):
        return jnp.sum(module.attention(*arrays, scale=width**-0.5).astype(jnp.float32))

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
    ("cpu", "float32", 1024, False, "", AttentionKernel.CPU),
    ("cpu", "bfloat16", 16, False, "", AttentionKernel.CPU),
    ("cpu", "float32", 64, True, "", AttentionKernel.REFERENCE),
    ("tpu", "bfloat16", 17920, False, "", AttentionKernel.FLASH_TPU),
    ("tpu", "bfloat16", 17920, False, "16 MiB of VMEM", AttentionKernel.TPU),
    ("tpu", "bfloat16", 226, False, "", AttentionKernel.REFERENCE),
    ("tpu", "float32", 17920, False, "", AttentionKernel.CHUNKED),
    ("gpu", "bfloat16", 17920, False, "", AttentionKernel.GPU),
    ("gpu", "float16", 64, False, "", AttentionKernel.GPU),
    ("gpu", "float32", 17920, False, "float32", AttentionKernel.CHUNKED),
    ("gpu", "float32", 64, False, "float32", AttentionKernel.REFERENCE),
]


@pytest.mark.parametrize("platform,dtype,length,bias,refused,kernel", CHOICES)
def test_automatic_choice(platform, dtype, length, bias, refused, kernel):
    lengths = {"query_length": length, "key_length": length}
    refusals = {"flash_refusal" if platform == "tpu" else "gpu_refusal": refused}
    choice = choose(platform, dtype=jnp.dtype(dtype), **lengths, bias=bias, **refusals)
    assert choice.kernel is kernel and choice.reason and refused in choice.reason


@pytest.mark.parametrize(
    "platform,dtype,keys,bias,kernel",
    [
        ("tpu", "bfloat16", 1024, False, AttentionKernel.CHUNKED),
        ("tpu", "bfloat16", 64, False, AttentionKernel.REFERENCE),
        ("tpu", "bfloat16", 1024, True, AttentionKernel.REFERENCE),
        ("cpu", "float32", 1024, False, AttentionKernel.CPU),
    ],
)
def test_another_kernel_where_auto_takes_an_accelerators(monkeypatch, platform, dtype, keys, bias, kernel):
    """As a network without a field for it calls attention."""
    monkeypatch.setattr(axes, "platform", lambda: platform)
    tokens = jnp.zeros((1, keys, 2, 64), dtype)
    before = dispatch._choice(AttentionKernel.AUTO, tokens, tokens, bias, False)
    with dispatch.automatic(AttentionKernel.CHUNKED):
        choice = dispatch._choice(AttentionKernel.AUTO, tokens, tokens, bias, False)
        asked = dispatch._choice(AttentionKernel.REFERENCE, tokens, tokens, bias, False)
    assert choice.kernel is kernel and asked.kernel is AttentionKernel.REFERENCE
    changed = before.kernel is AttentionKernel.FLASH_TPU
    assert choice == (dispatch.Choice(kernel, "training.attention, not flash_tpu") if changed else before)
    assert dispatch._choice(AttentionKernel.AUTO, tokens, tokens, bias, False) == before


# dtype, head width, compute capability -> what the refusal says; None for no refusal.
HARDWARE = [
    ("bfloat16", 64, (9, 0), None),
    ("float16", 128, (8, 0), None),
    ("bfloat16", 256, (9, 0), None),
    ("bfloat16", 256, (12, 0), None),
    ("bfloat16", 256, (8, 9), "heads of 256, cuDNN's kernel takes multiples of 8 up to 128 on 8.9"),
    ("bfloat16", 264, (9, 0), "heads of 264"),
    ("bfloat16", 100, (9, 0), "heads of 100"),
    ("bfloat16", 64, (7, 5), "compute capability 7.5"),
    ("float32", 64, (9, 0), "float32"),
    ("bfloat16", 64, None, "not CUDA devices"),
]


@pytest.mark.parametrize("dtype,width,capability,said", HARDWARE)
def test_what_cudnn_has_no_kernel_for(dtype, width, capability, said):
    found = gpu.hardware_refusal(jnp.dtype(dtype), width, capability)
    assert said in found if said else not found


@pytest.mark.parametrize("reported,found", [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)])
def test_compute_capability_is_that_of_cuda_devices(reported, found):
    assert gpu.compute_capability(types.SimpleNamespace(compute_capability=reported)) == found


def wide(length=600, width=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, length, 2, width), dtype)


def report_of(function, *arrays):
    with kernel_report.collecting(kernel_report.KernelReport()) as report:
        # A function that was traced before would not be traced again.
        jax.eval_shape(lambda *arrays: function(*arrays), *arrays)
    return report.lines


def test_without_cudnn_the_chunked_kernel_runs_and_the_report_says_so(cuda_without_cudnn):
    assert report_of(attention, *[wide()] * 3) == [
        "attention of 1x600x2x64 over 600 keys in bfloat16: kernel chunked (gpu devices; gpu refused: cuDNN attention: "
        "cuDNN is not detected.)"
    ]
    with pytest.raises(ConfigError, match="attention = gpu: cuDNN attention: cuDNN is not detected"):
        report_of(functools.partial(attention, kernel=AttentionKernel.GPU), *[wide()] * 3)


@pytest.mark.parametrize(
    "platform,kernels", [("gpu", ["tpu", "flash_tpu", "tokamax", "tokamax_fixed"]), ("tpu", ["gpu"])]
)
def test_kernels_of_other_devices_are_refused(monkeypatch, platform, kernels):
    """On GPUs those of TPUs would be interpreted: right, and slower than anything else."""
    monkeypatch.setattr(axes, "platform", lambda: platform)
    for kernel in kernels:
        with pytest.raises(ConfigError, match=f"attention = {kernel}: it runs on .PUs, not on {platform.upper()}s"):
            report_of(functools.partial(attention, kernel=AttentionKernel(kernel)), *[wide()] * 3)
    band = Band(jnp.zeros((1, 600, 3)), jnp.zeros((600, 3)), jnp.ones(1), jnp.ones(1))
    kernel = EpipolarKernel("gpu" if platform == "tpu" else "tpu")
    with pytest.raises(ConfigError, match=f"sync.kernel = {kernel.value}: it runs on .PUs"):
        report_of(functools.partial(epipolar_attention, band=band, kernel=kernel), *[wide()] * 3)


@pytest.mark.parametrize("width,kernel", [(64, "gpu"), (256, "gpu"), (512, "chunked")])
def test_with_cudnn_its_kernel_runs(cuda, width, kernel):
    (line,) = report_of(attention, *[wide(width=width)] * 3)
    assert f"kernel {kernel} (" in line


def test_the_report_names_each_kind_of_call_once():
    def twice(query, key, value):
        first = attention(query, key, value, valid_length=500)
        return attention(first, key, value, valid_length=500) + attention(query, key, value, causal=True)

    assert report_of(twice, *[wide(dtype=jnp.float32)] * 3) == [
        "attention of 1x600x2x64 over 500 of 600 keys in float32: kernel cpu (CPU devices)",
        "attention of 1x600x2x64 over 600 keys before each query in float32: kernel cpu (CPU devices)",
    ]
    chosen = functools.partial(attention, kernel=AttentionKernel.CHUNKED)
    assert report_of(chosen, *[wide()] * 3)[0].endswith("kernel chunked (as configured)")


def test_announced_kernels_are_printed(capsys):
    with kernel_report.announced():
        for _ in range(2):
            jax.eval_shape(lambda *arrays: attention(*arrays), *[wide()] * 3)
    jax.eval_shape(lambda *arrays: attention(*arrays), *[wide(length=700)] * 3)
    said = "kernels: attention of 1x600x2x64 over 600 keys in bfloat16: kernel cpu (CPU devices)\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length,keys,valid", [(40, 56, 41), (39, 57, None), (41, 41, None)])
def test_odd_lengths_are_padded_for_cudnn(key, length, keys, valid, causal):
    """JAX refuses them in training."""
    if causal and length != keys:
        length = keys = valid or keys
        valid = None
    inputs = arrays(key, length=length, keys=keys)
    options = {"scale": 0.2, "valid_length": valid, "causal": causal}
    with jax.numpy_dtype_promotion("standard"):
        got = value_and_gradients(lambda *a: KERNELS["gpu"](*a, **options), *inputs)
    want = value_and_gradients(lambda *a: reference.attention(*a, **options), *inputs)
    assert_same(got, want, 3e-6)


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
