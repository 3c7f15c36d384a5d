"""Training step of a CogVideoX-style DiT: ours against diffusers' CogVideoXTransformer3DModel and torch's AdamW."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from einops import rearrange

from jvgen.models.video_dit.config import Positions, VideoDiTConfig
from jvgen.models.video_dit.flops import forward_flops
from jvgen.models.video_dit.model import VideoDiT
from jvgen.models.video_dit.torch_map import to_diffusers_config, weight_map
from jvgen.nn.network import Network, Parameters
from jvgen.tasks.task import Batch
from tests.benchmarks import step_timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_timing import Case


@dataclasses.dataclass(frozen=True)
class Size:
    """A network and a batch of latent clips (frames, height, width)."""

    batch: int
    clip: tuple[int, int, int]
    layers: int
    heads: int
    text: int
    text_width: int
    condition: int = 512
    dtype: str = "float32"


QUICK = {"tiny": Size(2, (2, 4, 4), layers=2, heads=1, text=8, text_width=16, condition=32)}
CPU = {
    # The demo's network; a batch of short clips; one longer clip, where attention weighs more; a wider network.
    "demo": Size(16, (8, 8, 8), layers=6, heads=3, text=48, text_width=128, condition=128),
    "short": Size(4, (4, 16, 16), layers=6, heads=6, text=32, text_width=128),
    "long": Size(1, (5, 32, 32), layers=4, heads=6, text=64, text_width=256),
    "wide": Size(1, (4, 16, 16), layers=3, heads=16, text=64, text_width=512),
}
GPU = {
    "2b_width": Size(2, (7, 30, 46), layers=8, heads=30, text=226, text_width=4096, dtype="bfloat16"),
    "2b_width_long": Size(1, (13, 60, 90), layers=4, heads=30, text=226, text_width=4096, dtype="bfloat16"),
}


def config_of(size: Size) -> VideoDiTConfig:
    """The network of a size: sin-cos positions, as CogVideoX-2B, without zero-initialized layers."""
    return VideoDiTConfig(
        layers=size.layers,
        heads=size.heads,
        text_width=size.text_width,
        text_length=size.text,
        condition_width=size.condition,
        sample_frames=size.clip[0],
        sample_height=size.clip[1],
        sample_width=size.clip[2],
        positions=Positions.SINCOS,
        zero_init=False,
    )


def case_of(name: str, size: Size, config: VideoDiTConfig | None = None) -> Case:
    """Both sides of a size; `config` for another form of the same network."""
    config = config_of(size) if config is None else config
    rng = np.random.default_rng(0)
    clip = (size.batch, *size.clip, config.in_channels)
    return Case(
        name=name,
        network=lambda: Network.of(lambda rngs: VideoDiT(config, rngs=rngs)),
        arrays={
            "noisy": rng.standard_normal(clip, np.float32),
            "target": rng.standard_normal(clip, np.float32),
            "text": rng.standard_normal((size.batch, size.text, size.text_width), np.float32),
            "timesteps": np.linspace(20, 980, size.batch, dtype=np.float32),
        },
        loss=_loss,
        module=lambda: _module(config),
        weights=weight_map(config),
        torch_loss=_torch_loss,
        flops=size.batch * sum(forward_flops(config, size.clip, size.text).values()),
        dtype=size.dtype,
    )


def _loss(network: Network, parameters: Parameters, batch: Batch, dtype: jnp.dtype) -> jax.Array:
    predicted = network.apply(parameters, batch["noisy"].astype(dtype), batch["text"].astype(dtype), batch["timesteps"])
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - batch["target"]))


def _module(config: VideoDiTConfig) -> torch.nn.Module:
    values = {name: value for name, value in to_diffusers_config(config).items() if not name.startswith("_")}
    return CogVideoXTransformer3DModel(**values)


def _torch_loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    predicted = module(
        hidden_states=rearrange(batch["noisy"], "b f h w c -> b f c h w"),
        encoder_hidden_states=batch["text"],
        timestep=batch["timesteps"],
        return_dict=False,
    )[0]
    return (rearrange(predicted, "b f c h w -> b f h w c").float() - batch["target"]).square().mean()


def run(settings: Settings) -> Result:
    """All cases of this backend."""
    sizes: dict[str, Size] = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    rows: list[dict[str, Any]] = []
    samples = {}
    for name, size in sizes.items():
        row, samples[name] = step_timing.compare(case_of(name, size), settings.cores, settings.repeats)
        rows.append(row)
    return Result(
        title="forward + backward + clipping + AdamW; ratio = ours / PyTorch, below 1 is faster",
        settings={name: dataclasses.asdict(size) for name, size in sizes.items()},
        rows=rows,
        shown=step_timing.SHOWN,
        samples=samples,
        notes=step_timing.NOTES,
    )
