"""The optional splash attention of tokamax against the reference, where it is installed; what is said where not."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError
from jvgen.kernels.attention import reference, tokamax_splash
from jvgen.nn import attention as front
from jvgen.nn.attention import AttentionKernel, attention

installed = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="the optional package tokamax is not installed"
)
KERNELS = (AttentionKernel.TOKAMAX, AttentionKernel.TOKAMAX_FIXED)


def arrays(queries: int, keys: int, heads: int = 2, width: int = 64) -> list[jax.Array]:
    drawn = jax.random.split(jax.random.key(0), 4)
    lengths = (queries, keys, keys, queries)
    return [jax.random.normal(k, (1, n, heads, width)) for k, n in zip(drawn, lengths, strict=True)]


def value_and_gradients(function, query, key, value, gradient):
    output, pull = jax.vjp(function, query, key, value)
    return output, *pull(gradient)


@installed
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries,keys,options", [(130, 256, {"valid_length": 200}), (256, 256, {"causal": True})])
def test_it_equals_the_reference(kernel, queries, keys, options):
    inputs = arrays(queries, keys)
    with jax.numpy_dtype_promotion("standard"):
        attend = functools.partial(attention, kernel=kernel, **options)
        got = jax.jit(functools.partial(value_and_gradients, attend))(*inputs)
    attend = functools.partial(reference.attention, scale=0.125, **options)
    want = jax.jit(functools.partial(value_and_gradients, attend))(*inputs)
    for name, a, b in zip(("output", "d query", "d key", "d value"), got, want, strict=True):
        assert a.dtype == b.dtype and np.abs(a - b).max() < 1e-5 * np.abs(b).max(), name


@installed
def test_a_fixed_maximum_holds_for_long_vectors():
    """Norms whose product is far above any score: the bound is cut, and weights neither overflow nor vanish."""
    query, key, value, _ = arrays(128, 128)
    with jax.numpy_dtype_promotion("standard"):
        got = attention(8 * query, 2 * key, value, kernel=AttentionKernel.TOKAMAX_FIXED)
    want = reference.attention(8 * query, 2 * key, value, scale=0.125)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_the_package_the_config_is_refused(monkeypatch, kernel):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokamax_splash.importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="attention = tokamax: the package tokamax is not installed; install jvgen"):
        attention(*arrays(8, 8)[:3], kernel=kernel)


def test_another_version_without_the_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(tokamax_splash.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(tokamax_splash, "_FOLDER", "tokamax.moved")
    with pytest.raises(ConfigError, match="attention = tokamax: tokamax 9.9 has no splash attention"):
        attention(*arrays(8, 8)[:3], kernel=AttentionKernel.TOKAMAX)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_never_chosen(platform, dtype):
    choice = front.choose(platform, dtype=jnp.dtype(dtype), query_length=17920, key_length=17920)
    assert choice.kernel not in KERNELS
