"""What RepVideo's aggregation adds to a training step, and Enhance-A-Video to a sampling step: ours against ours."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.models.video_dit.config import AggregationConfig
from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.models.video_dit.model import TokenLayout
from jvgen.nn.embeddings import token_grid
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat
from jvgen.preflight.report import Memory
from tests.benchmarks import timing
from tests.benchmarks.dit_step import Size, case_of, config_of
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_timing import OurStep

QUICK = {"tiny": Size(2, (2, 4, 4), layers=3, heads=1, text=8, text_width=16, condition=32)}
CPU = {
    "demo": Size(16, (8, 8, 8), layers=6, heads=2, text=48, text_width=128, condition=128),
    "deep": Size(2, (4, 16, 16), layers=13, heads=6, text=32, text_width=128),
    "long": Size(1, (7, 32, 32), layers=7, heads=6, text=64, text_width=256),
    # The tokens of 49x480x720, with fewer heads; only sampled, as one layer has nothing to average.
    "49x480x720": Size(1, (13, 60, 90), layers=1, heads=4, text=226, text_width=256),
}
GPU = {"2b_width": Size(1, (13, 60, 90), layers=8, heads=30, text=226, text_width=4096, dtype="bfloat16")}
SHOWN = (
    "case", "what", "without_s", "with_s", "ratio_of_medians", "middle_half", "ratio_of_minima",
    "ratio_of_processor_time", "share_alone", "without_MiB", "with_MiB", "ratio_of_MiB",
)  # fmt: skip
ENHANCED = {
    "enhanced": EnhanceConfig(),
    "enhanced, adaptive": EnhanceConfig(share="head", gain=1.15),
}


def run(settings: Settings) -> Result:
    """Training steps with and without aggregation, and steps of a sampler with and without enhanced attention."""
    sizes: dict[str, Size] = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    for name, size in sizes.items():
        training = {"training": _training(name, size)} if size.layers > 1 else {}
        for what, sides in {**training, **_sampling(size)}.items():
            row, samples[f"{name} {what}"] = _compare(sides, settings.repeats, size.layers)
            rows.append({"case": name, "what": what, **row})
    return Result(
        title="ratio = with / without",
        settings={name: dataclasses.asdict(size) for name, size in sizes.items()},
        rows=rows,
        shown=SHOWN,
        samples=samples,
        notes=(
            "training: forward, backward, AdamW, remat save_attention, period 6; MiB: arguments + outputs - donated +",
            "temporary + code of the compiled step. enhanced: one step of a sampler with guidance, both halves in one",
            "batch. share_alone: factors and scaling of all layers, as a program by itself, over the step without.",
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Side:
    """Something to time, and the memory of its program in bytes."""

    run: Callable[[], object]
    memory: float


def _training(name: str, size: Size) -> dict[str, _Side]:
    config = config_of(size).replace(remat=Remat.SAVE_ATTENTION)
    sides = {}
    for side, aggregation in {"without": None, "with": AggregationConfig()}.items():
        step = OurStep(case_of(name, size, config.replace(aggregation=aggregation)))
        sides[side] = _Side(step, Memory.of(step.compiled).total)
    return sides


def _sampling(size: Size) -> dict[str, dict[str, _Side]]:
    case = case_of("sampling", size)
    network, dtype = case.network(), jnp.dtype(size.dtype)
    parameters = jax.jit(network.init)(jax.random.key(0))
    parameters = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 2 else leaf, parameters)
    # Twice the batch: with and without the caption.
    doubled = {name: jnp.asarray(np.repeat(array, 2, axis=0)) for name, array in case.arrays.items()}
    inputs = (doubled["noisy"].astype(dtype), doubled["text"].astype(dtype), doubled["timesteps"])
    plain = _denoiser(network, parameters, inputs, None)
    return {
        name: {
            "without": plain,
            "with": _denoiser(network, parameters, inputs, config),
            "alone": _alone(size, 2 * size.batch, config),
        }
        for name, config in ENHANCED.items()
    }


def _denoiser(network: Network, parameters: Any, inputs: tuple, config: EnhanceConfig | None) -> _Side:
    layers = parameters["blocks"]["layers"]["attention"]["query"]["kernel"].shape[0]
    strengths = None if config is None else jnp.asarray(config.strengths(layers))

    @jax.jit
    def denoise(parameters: Any, strengths: Any, *inputs: jax.Array) -> jax.Array:
        hook = None if config is None else Enhancement(config, strengths, clip_size=2)
        return network.apply(parameters, *inputs, attention_scale=hook)

    compiled = denoise.lower(parameters, strengths, *inputs).compile()
    return _Side(lambda: jax.block_until_ready(compiled(parameters, strengths, *inputs)), Memory.of(compiled).total)


def _alone(size: Size, batch: int, config: EnhanceConfig) -> _Side:
    """What one layer computes more, of queries and keys and of what attention returned."""
    denoiser = config_of(size)
    layout = TokenLayout(text=size.text, grid=token_grid(size.clip, denoiser.patch_shape))
    shape, dtype = (batch, layout.length, size.heads, denoiser.head_width), jnp.dtype(size.dtype)
    query, key, mixed = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in range(3))
    hook = Enhancement(config, jnp.asarray(config.strengths(1)), clip_size=2)

    @jax.jit
    def scaled(query: jax.Array, key: jax.Array, mixed: jax.Array) -> jax.Array:
        factor = hook(query, key, layout, jnp.int32(0))[:, None, :, None]
        is_video = (jnp.arange(layout.length) >= layout.text)[:, None, None]
        return jnp.where(is_video, mixed * factor.astype(dtype), mixed)

    compiled = scaled.lower(query, key, mixed).compile()
    return _Side(lambda: jax.block_until_ready(compiled(query, key, mixed)), Memory.of(compiled).total)


def _compare(sides: dict[str, _Side], repeats: int, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    began = time.perf_counter()
    for side in sides.values():
        side.run()
    samples = timing.in_turns({name: side.run for name, side in sides.items()}, repeats)
    mib = 2**20
    row = {
        "without_s": samples["without"].median,
        "with_s": samples["with"].median,
        **timing.ratio(samples["with"], samples["without"]),
        "without_MiB": sides["without"].memory / mib,
        "with_MiB": sides["with"].memory / mib,
        "ratio_of_MiB": sides["with"].memory / sides["without"].memory,
        "seconds": time.perf_counter() - began,
    }
    if "alone" in sides:
        row["share_alone"] = samples["alone"].median * layers / samples["without"].median
    return row, {name: dataclasses.asdict(sample) for name, sample in samples.items()}
