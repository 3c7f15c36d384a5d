"""Sections of `tests.device.gpu`: each measures or checks one thing and writes a row as soon as it has one."""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.kernels.attention import chunked, gpu, reference
from jvgen.kernels.epipolar_attention import chunked as epipolar_chunked
from jvgen.kernels.epipolar_attention import gpu as epipolar_gpu
from jvgen.kernels.epipolar_attention import reference as epipolar_reference
from jvgen.models.video_dit.config import AggregationConfig
from jvgen.nn import kernel_report
from jvgen.nn.stacked import Remat
from jvgen.parallel import chips
from jvgen.preflight.report import Memory
from tests.benchmarks import dit_step, epipolar
from tests.benchmarks.dit_step import Size
from tests.benchmarks.machine import Settings

Row = dict[str, Any]
# RepVideo-2B: 17x256x256 and 49x480x720 are 5 and 13 latent frames of 32x32 and 60x90.
STEPS = {
    "256": Size(16, (5, 32, 32), layers=30, heads=30, text=226, text_width=4096, dtype="bfloat16"),
    "480": Size(1, (13, 60, 90), layers=30, heads=30, text=226, text_width=4096, dtype="bfloat16"),
}
TINY = Size(2, (3, 4, 4), layers=2, heads=2, text=8, text_width=16, condition=32, dtype="bfloat16")
WARM, TIMED = 2, 8
# Largest difference over the largest number. In float32 products may be rounded to TF32 where nobody asked for more.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
# Bytes per parameter of a training step: parameter, gradient and two moments in float32.
STATE_BYTES, HEADROOM = 16, 0.55


def run(name: str, out: Path, *, tiny: bool) -> None:
    """Run one section; each row is appended to `out` as a line of JSON."""
    for row in SECTIONS[name](tiny):
        # JSON has no NaN: what a backend does not tell is null.
        told = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        with out.open("a") as file:
            file.write(json.dumps(told) + "\n")


def parity(tiny: bool) -> Iterator[Row]:
    """Every kernel against the reference, forward and gradients; then three training steps against PyTorch's."""
    # Queries, keys, valid keys, width of heads: of a published model, odd, and wider.
    shapes = [(24, 24, None, 8), (17, 19, 15, 8)]
    if not tiny:
        shapes = [(1506, 1506, None, 64), (1025, 1027, 1001, 64), (1506, 1506, None, 128), (1506, 1506, None, 256)]
    on_gpu = jax.default_backend() == "gpu"
    cudnn = functools.partial(gpu.attention, implementation="cudnn" if on_gpu else "xla")
    kernels = {("cudnn", "bfloat16"): cudnn, ("chunked", "bfloat16"): chunked.attention}
    kernels |= {("chunked", "float32"): chunked.attention, ("reference", "float32"): reference.attention}
    for (kernel, dtype), attend in kernels.items():
        for shape in shapes:
            queries, keys, valid, width = shape
            case = f"{kernel}, {queries} queries, {valid or keys} of {keys} keys, heads of {width}"
            yield _guarded(case, lambda a=attend, s=shape, d=dtype: _attention(a, *s, d))
    shape = epipolar.QUICK["tiny"] if tiny else epipolar.Shape(2, 5, (16, 16), heads=4)
    fused = functools.partial(epipolar_gpu.attention, implementation="cudnn" if on_gpu else "xla")
    for kernel, dtype, attend in (
        ("epipolar cudnn", "bfloat16", fused),
        ("epipolar chunked", "bfloat16", epipolar_chunked.attention),
        ("epipolar chunked", "float32", epipolar_chunked.attention),
    ):
        yield _guarded(kernel, lambda a=attend, d=dtype: _epipolar(a, shape._replace(dtype=d)))
    for dtype in ("float32", "bfloat16"):
        small = Size(2, (3, 16, 16), layers=2, heads=4, text=226, text_width=64, condition=64, dtype=dtype)
        size = dataclasses.replace(TINY, dtype=dtype) if tiny else small
        yield _guarded(f"three steps of the DiT beside diffusers', {dtype}", lambda s=size: _losses(s))


def _guarded(case: str, check: Callable[[], Row]) -> Row:
    """A row of a check; one that fails says so in its row and ends nothing else."""
    try:
        return {"case": case, **check(), "failed": ""}
    except Exception as error:
        return {"case": case, "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def _attention(attend: Callable, queries: int, keys: int, valid: int | None, width: int, dtype: str) -> Row:
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 4, width), *[(2, keys, 4, width)] * 2]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    options = {"scale": width**-0.5, "valid_length": valid}
    oracle = functools.partial(reference.attention, **options)
    return _difference(functools.partial(attend, **options), oracle, arrays, dtype)


def _epipolar(attend: Callable, shape: epipolar.Shape) -> Row:
    query, key, value, *band = epipolar.values_of(shape)
    scale = shape.head_width**-0.5
    return _difference(
        lambda q, k, v: attend(q, k, v, *band, scale=scale),
        lambda q, k, v: epipolar_reference.attention(q, k, v, *band, scale=scale),
        [query, key, value],
        shape.dtype,
    )


def _difference(attend: Callable, oracle: Callable, arrays: list[jax.Array], dtype: str) -> Row:
    """Largest differences from the reference in float32 of the same numbers, over the largest number of each array."""

    def results(function: Callable, arrays: list[jax.Array]) -> list[jax.Array]:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = function(*arrays).astype(jnp.float32)
            return jnp.sum(jnp.sin(output)), output

        gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(array, np.float32) for array in (output, *gradients)]

    with jax.default_matmul_precision("highest"):
        expected = results(oracle, [array.astype(jnp.float32) for array in arrays])
    found = results(attend, arrays)
    differences = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)]
    worst = max(differences) if all(map(np.isfinite, differences)) else float("inf")
    if not worst < TOLERANCES[dtype]:
        raise AssertionError(
            f"output and gradients differ by {differences} of the largest, allowed {TOLERANCES[dtype]}"
        )
    return {"dtype": dtype, "output": differences[0], "gradients": max(differences[1:])}


def _losses(size: Size) -> Row:
    from tests.benchmarks import step_timing

    case = dit_step.case_of("parity", size)
    ours = step_timing.OurStep(case)
    theirs = step_timing.TorchStep(case, ours.parameters(), threads=1)
    difference = step_timing.check_equal(case, [ours() for _ in range(3)], [theirs() for _ in range(3)])
    return {"dtype": size.dtype, "output": difference}


def step_ours(name: str, tiny: bool) -> Iterator[Row]:
    """Our training step: CogVideoX's layout, which diffusers has too, and RepVideo's; under two remat policies."""
    from tests.benchmarks.step_timing import OurStep

    size = _fitted(TINY if tiny else STEPS[name], device_bytes())
    plain = dit_step.config_of(size)
    forms = {
        "CogVideoX-2B": plain,
        "RepVideo-2B": plain.replace(aggregation=AggregationConfig(period=min(6, size.layers))),
    }
    for what, config in forms.items():
        for remat in (Remat.FULL, Remat.SAVE_ATTENTION):
            case = dit_step.case_of(what, size, config.replace(remat=remat))
            report = kernel_report.KernelReport()
            with kernel_report.collecting(report):
                step = OurStep(case)
            seconds = _timed(step)
            yield {
                "case": what,
                "side": "ours",
                # The process's own peak is that of all cases so far.
                **_step_row(
                    size, remat, seconds, 3 * case.flops, step.compile_seconds, Memory.of(step.compiled).total / 2**30
                ),
                "process_peak_GiB": _peak_ours(),
                "kernels": "; ".join(report.lines),
            }
            # Two states do not fit beside each other.
            del step
            jax.clear_caches()


def step_theirs(name: str, tiny: bool) -> Iterator[Row]:
    """Diffusers' transformer of the same size: torch.compile by block, flash attention, fused AdamW, the same remat."""
    import torch

    from tests.benchmarks.step_timing import TorchStep

    cuda = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 2**40
    size = _fitted(TINY if tiny else STEPS[name], memory)
    case = dit_step.case_of("CogVideoX-2B", size)
    for remat in (Remat.FULL, Remat.SAVE_ATTENTION):
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step = TorchStep(case, None, threads=1)
        _remat(step.module, remat, "inductor" if cuda else "aot_eager")
        with _flash(cuda):
            step()
            started = time.perf_counter() - began
            seconds = _timed(step)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        yield {"case": "CogVideoX-2B", "side": "diffusers, torch.compile",
               **_step_row(size, remat, seconds, 3 * case.flops, started, peak)}  # fmt: skip
        del step
        torch._dynamo.reset()


def _remat(module: Any, remat: Remat, backend: str) -> None:
    """Checkpoint and compile every block, keeping what flash attention returned or nothing."""
    import torch
    from torch.utils import checkpoint

    kept = {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, list(kept))
    more = {"context_fn": context} if remat is Remat.SAVE_ATTENTION else {}

    def call(block: Any, *arguments: Any) -> Any:
        return checkpoint.checkpoint(block, *arguments, use_reentrant=False, **more)

    # Compiled with the block inside: a policy does not see the operations of a block that is compiled alone.
    module.enable_gradient_checkpointing(torch.compile(call, backend=backend))


def _flash(cuda: bool) -> Any:
    import contextlib

    from torch.nn import attention

    return attention.sdpa_kernel([attention.SDPBackend.FLASH_ATTENTION]) if cuda else contextlib.nullcontext()


def _fitted(size: Size, memory: float) -> Size:
    """With as many layers as leave room for activations; the rows say how many ran."""
    width = 64 * size.heads
    # Attention, feed-forward network and modulation of a layer.
    parameters = 12 * width**2 + 2 * 6 * width * size.condition
    layers = int(HEADROOM * memory / (STATE_BYTES * parameters))
    return dataclasses.replace(size, layers=max(1, min(size.layers, layers)))


def _step_row(size: Size, remat: Remat, seconds: list[float], flops: float, compiled: float, peak: float) -> Row:
    median = statistics.median(seconds)
    peak_flops = _peak_flops()
    return {
        "clips": f"{size.batch} of {'x'.join(map(str, size.clip))} latents",
        "layers": size.layers,
        "remat": remat.value,
        "dtype": size.dtype,
        "step_s": median,
        "fastest_s": min(seconds),
        "TFLOP_s": flops / median / 1e12,
        "MFU": flops / median / peak_flops if peak_flops else float("nan"),
        "peak_GiB": peak,
        "compile_s": compiled,
    }


def _timed(step: Callable[[], object]) -> list[float]:
    """Seconds of steps after the warm ones; each waits for the device."""
    seconds = []
    for _ in range(WARM + TIMED):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM:]


def device_bytes() -> float:
    """Memory of the first device; unlimited on a CPU."""
    statistics_of = jax.devices()[0].memory_stats() or {}
    chip = chips.chip_of(jax.devices()[0])
    return chip.hbm_bytes if chip is not None else statistics_of.get("bytes_limit", 2**40)


def _peak_flops() -> float | None:
    chip = chips.chip_of(jax.devices()[0])
    return None if chip is None else chip.device_peak_flops


def _peak_ours() -> float:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30


def vae(tiny: bool) -> Iterator[Row]:
    """CV-VAE: a clip encoded and decoded, beside diffusers' CogVideoX VAE of the same widths."""
    from tests.benchmarks import cv_vae

    size = cv_vae.QUICK["tiny"] if tiny else cv_vae.GPU["published"]
    for name in ("causal", "sd3"):
        rows, _ = cv_vae.compare("17x256x256", name, size, _settings())
        yield from ({name: row[name] for name in cv_vae.SHOWN if name in row} for row in rows)


def rollout(tiny: bool) -> Iterator[Row]:
    """A world model's rollout, beside transformers' generate."""
    from tests.benchmarks import world_rollout

    sizes = world_rollout.QUICK if tiny else {name: world_rollout.GPU[name] for name in ("small_64", "small")}
    for name, size in sizes.items():
        row, _ = world_rollout.compare(name, size, _settings())
        yield {column: row[column] for column in world_rollout.SHOWN}


def sampling(tiny: bool) -> Iterator[Row]:
    """One step of a sampler with guidance at 49x480x720, parameters in bfloat16; diffusers' with torch.compile."""
    import torch

    size = dataclasses.replace(TINY if tiny else STEPS["480"], batch=1 if not tiny else 2)
    config = dit_step.config_of(size)
    case = dit_step.case_of("sampling", size, config)
    flops = 2 * case.flops
    network = case.network()

    @jax.jit
    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(size.dtype), network.init(key))

    @jax.jit
    def guided(parameters: Any, noisy: jax.Array, text: jax.Array, timesteps: jax.Array) -> jax.Array:
        doubled = [jnp.concatenate([array, array]) for array in (noisy, text, timesteps)]
        with_text, without = jnp.split(network.apply(parameters, *doubled), 2)
        return without + 6.0 * (with_text - without)

    parameters = init(jax.random.key(0))
    inputs = [jnp.asarray(case.arrays[name], size.dtype) for name in ("noisy", "text")]
    inputs.append(jnp.asarray(case.arrays["timesteps"]))
    began = time.perf_counter()
    jax.block_until_ready(guided(parameters, *inputs))
    compiled = time.perf_counter() - began
    seconds = _timed(lambda: jax.block_until_ready(guided(parameters, *inputs)))
    yield {
        "case": "sampling step",
        "side": "ours",
        **_step_row(size, Remat.NONE, seconds, flops, compiled, _peak_ours()),
    }
    del parameters

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    with torch.device(device):
        module = case.module().to(torch.bfloat16).eval()
    for block in module.transformer_blocks:
        block.compile(backend="inductor" if cuda else "eager")
    arrays = {name: torch.from_numpy(array).to(device) for name, array in case.arrays.items()}
    noisy = arrays["noisy"].movedim(-1, 2).to(torch.bfloat16)

    @torch.no_grad()
    def theirs() -> None:
        predicted = module(
            hidden_states=torch.cat([noisy, noisy]),
            encoder_hidden_states=torch.cat([arrays["text"]] * 2).to(torch.bfloat16),
            timestep=torch.cat([arrays["timesteps"]] * 2),
            return_dict=False,
        )[0]
        with_text, without = predicted.chunk(2)
        float((without + 6.0 * (with_text - without)).flatten()[0])

    began = time.perf_counter()
    with _flash(cuda):
        theirs()
        compiled = time.perf_counter() - began
        seconds = _timed(theirs)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    yield {"case": "sampling step", "side": "diffusers, torch.compile",
           **_step_row(size, Remat.NONE, seconds, flops, compiled, peak)}  # fmt: skip


def _settings() -> Settings:
    return Settings(cores=1, quick=False, repeats=3, topology="")


SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "parity": parity,
    **{f"step_{name}_ours": functools.partial(step_ours, name) for name in STEPS},
    **{f"step_{name}_theirs": functools.partial(step_theirs, name) for name in STEPS},
    "vae": vae,
    "rollout": rollout,
    "sampling": sampling,
}
