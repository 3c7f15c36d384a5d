"""Kernels run on a device before a run's first step: right ones pass, wrong ones end it. Here they are interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import exit_codes
from jvgen.kernels.attention import flash_tpu, flash_tpu_kernels
from jvgen.nn import attention, kernel_check, kernel_report, sequence_parallel
from jvgen.nn.kernel_check import BOUND, TOKEN_BOUND, Difference, KernelDiffers, differences, judge, verify
from jvgen.nn.kernel_report import Call, KernelReport, collecting
from jvgen.parallel import axes
from jvgen.preflight import page

CALL = Call("attention", "flash_tpu", "bfloat16", 64, 256, 384, 300, 0.125)
CALLS = {
    "padding": CALL,
    "causal": Call("attention", "flash_tpu", "bfloat16", 64, 256, 256, 256, 0.125, causal=True),
    "ring": Call("attention", "flash_tpu", "bfloat16", 64, 256, 256, 130, 0.125, ring=2),
    "splash": Call("attention", "tpu", "bfloat16", 128, 256, 256, 200, 0.09),
    "epipolar": Call("epipolar attention", "tpu", "bfloat16", 64, 240, 240, 240, 0.125),
}
CPU = jax.local_devices(backend="cpu")[0]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash_tpu, "DEFAULT_BLOCKS", (128, 128, 128))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("causal", "splash") else n for n in CALLS]
)
def test_right_kernels_are_within_half_of_the_bounds(name):
    for found in differences(CALLS[name], CPU):
        assert found.overall < BOUND / 2 and found.token < TOKEN_BOUND / 2, found
    judge(CALLS[name], "TPU v5", [found])


def test_one_key_has_gradients_of_zero():
    call = Call("attention", "gpu", "bfloat16", 8, 4, 1, 1, 8**-0.5)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own implementation, which CPUs run
        assert all(found.fine for found in differences(call, CPU))


@pytest.mark.parametrize("length,width", [(768, 128), (2048, 64)])
def test_rounding_of_early_causal_queries_is_within_the_bounds(length, width):
    """What bfloat16 kernels round, in NumPy: gradients of queries that see few keys cancel out."""
    seen, call = 64, Call("attention", "flash_tpu", "bfloat16", width, length, length, length, width**-0.5, causal=True)
    arrays = [array.astype(jnp.bfloat16).astype(np.float32)[0, :seen] for array in kernel_check._arrays(call)]

    def gradient_of_queries(rounded):
        found = []
        for query, key, value, gradient in zip(*(np.moveaxis(array, 1, 0) for array in arrays), strict=True):
            scores = np.where(np.tri(seen, dtype=bool), call.scale * query @ key.T, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            shared = np.sum(rounded(weights @ value) * gradient, axis=1, keepdims=True)
            found.append(call.scale * rounded(weights * (gradient @ value.T - shared)) @ key)
        return jnp.asarray(np.stack(found, axis=1)[None])

    def rounded(array):
        return array.astype(jnp.bfloat16).astype(np.float32)

    found = kernel_check._difference("", gradient_of_queries(rounded), gradient_of_queries(np.asarray), seen)
    assert found.overall < BOUND / 2 and found.token < TOKEN_BOUND / 2, found


def without_mask(monkeypatch):
    scores = flash_tpu_kernels._scores
    monkeypatch.setattr(flash_tpu_kernels, "_scores", lambda static, masked, *rest: scores(static, False, *rest))


def with_wrong_scale(monkeypatch):
    power = flash_tpu._factors
    monkeypatch.setattr(flash_tpu, "_factors", lambda scale: (power(scale)[0], power(scale)[1] * 1.1))


def with_overflow(monkeypatch):
    monkeypatch.setattr(flash_tpu_kernels, "bounded", lambda query, key, factor: jnp.ones(query.shape[0], jnp.int32))
    monkeypatch.setattr(flash_tpu_kernels, "LN_2", jnp.nan)


def with_a_wrong_gradient(monkeypatch):
    def nothing(output, gradient):
        return jnp.zeros_like(output[:, :1], jnp.float32)

    monkeypatch.setattr(flash_tpu_kernels, "shared_term", nothing)


@pytest.mark.parametrize(
    "break_it,arrays",
    [
        (without_mask, {"output", "gradient of queries"}),
        (with_wrong_scale, {"output"}),
        (with_overflow, {"gradient of queries", "gradient of keys"}),
        (with_a_wrong_gradient, {"gradient of queries", "gradient of keys"}),
    ],
)
def test_wrong_kernels_are_found(monkeypatch, break_it, arrays):
    break_it(monkeypatch)
    found = differences(CALL, CPU)
    assert arrays <= {one.name for one in found if not one.fine}
    with pytest.raises(KernelDiffers, match=r"kernel flash_tpu .* on TPU v5.*No step has run.*attention=tpu") as error:
        judge(CALL, "TPU v5", found)
    assert exit_codes.of_error(error.value) == exit_codes.USER_ERROR


def test_a_hop_that_loses_keys_is_found(monkeypatch):
    """Keys go around as many devices as the ring and this process have."""
    assert len(kernel_check._ring_devices(CALLS["ring"], CPU)) == 2
    monkeypatch.setattr(sequence_parallel, "_next", lambda arrays, mesh_axis: arrays)
    found = differences(CALLS["ring"], CPU)
    assert {one.name for one in found if not one.fine} >= {"output", "gradient of queries"}


def test_not_finite_is_not_fine():
    assert not Difference("output", np.inf, np.inf).fine and not Difference("output", np.nan, 0.0).fine


def test_each_kind_of_call_is_verified_once_while_tracing(monkeypatch):
    """On a thread of its own: what it runs is not part of the program that is traced."""
    monkeypatch.setattr(kernel_check, "is_checked", lambda call, platform: True)
    monkeypatch.setattr(kernel_check, "_verified", set())
    lines = []

    def traced(length):
        def program(tokens):
            return attention.attention(tokens, tokens, tokens, kernel=attention.AttentionKernel.FLASH_TPU)

        with collecting(KernelReport(on_call=lambda call: verify(call, lines.append))) as report:
            jax.eval_shape(program, jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16))
        return report

    report = traced(256)
    assert report.calls == traced(256).calls == [Call("attention", "flash_tpu", "bfloat16", 64, 256, 256, 256, 0.125)]
    assert len(lines) == 1 and lines[0].startswith(f"{report.calls[0]} on cpu 0: off float32 by output 0.")


def test_a_kernel_that_cannot_run_alone_is_logged_and_ends_no_run(monkeypatch):
    def out_of_memory(call, device):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nand more")

    monkeypatch.setattr(kernel_check, "is_checked", lambda call, platform: True)
    monkeypatch.setattr(kernel_check, "_verified", set())
    monkeypatch.setattr(kernel_check, "differences", out_of_memory)
    lines = []
    for _ in range(2):
        verify(CALL, lines.append)
    said = f"{CALL} did not run alone on cpu 0: RuntimeError: RESOURCE_EXHAUSTED: 3 GiB"
    assert lines == [f"WARNING: not checked before the first step: {said}"]
    assert list(page._runs([CALL])) == [page.Row("kernels run", False, said)]  # what was asked for was not done


def test_plain_kernels_and_described_chips_run_nothing(monkeypatch):
    lines = []
    verify(CALL, lines.append)  # on CPUs
    with monkeypatch.context() as described:
        described.setattr(kernel_check, "is_checked", lambda call, platform: True)
        described.setattr(axes, "device", lambda: "a chip of a pod")
        verify(CALL, lines.append)
    assert not lines
    assert not kernel_check.is_checked(Call("attention", "chunked", "float32", 64, 8, 8, 8, 1.0), "tpu")
    assert kernel_check.is_checked(CALL, "tpu")
    with kernel_report.announced() as report:
        report.add_call(CALL)
