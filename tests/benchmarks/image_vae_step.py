"""Training step of a small image VAE (convolutions): ours against diffusers' AutoencoderKL and torch's AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange

from jvgen.models.image_vae import flops, posterior
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.models.image_vae.torch_map import to_diffusers_config, weight_map
from jvgen.nn.network import Network, Parameters
from jvgen.tasks.task import Batch
from tests.benchmarks import step_timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result
from tests.benchmarks.step_timing import Case

KL_WEIGHT = 1e-6


@dataclasses.dataclass(frozen=True)
class Size:
    """An autoencoder and a batch of square images."""

    batch: int
    side: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    attention: bool = True
    dtype: str = "float32"


QUICK = {"tiny": Size(2, 8, (8,), layers=1, groups=4, attention=False)}
CPU = {
    # The demo's network (without attention), and Stable Diffusion's shape at a quarter of its width.
    "demo": Size(16, 64, (16, 32, 64, 64), layers=1, groups=8, attention=False),
    "sd_quarter": Size(2, 128, (32, 64, 128, 128), layers=2, groups=32),
}
GPU = {"sd": Size(8, 256, (128, 256, 512, 512), layers=2, groups=32, dtype="bfloat16")}


def case_of(name: str, size: Size) -> Case:
    """Both sides of a size."""
    config = ImageVAEConfig(
        block_channels=size.channels, layers_per_block=size.layers, groups=size.groups, mid_attention=size.attention
    )
    rng = np.random.default_rng(0)
    latent = (size.batch, *config.latent_size(size.side, size.side), config.latent_channels)
    return Case(
        name=name,
        network=lambda: Network.of(lambda rngs: ImageVAE(config, rngs=rngs)),
        arrays={
            "images": rng.uniform(-1, 1, (size.batch, size.side, size.side, 3)).astype(np.float32),
            "noise": rng.standard_normal(latent, np.float32),
        },
        loss=_loss,
        module=lambda: AutoencoderKL.from_config(to_diffusers_config(config)),
        weights=weight_map(config),
        torch_loss=_torch_loss,
        flops=size.batch * sum(flops.reconstruct(config, size.side, size.side).values()),
        dtype=size.dtype,
    )


def _loss(network: Network, parameters: Parameters, batch: Batch, dtype: jnp.dtype) -> jax.Array:
    moments = network.apply(parameters, batch["images"].astype(dtype), method="encode")
    latents = posterior.sample(moments, batch["noise"])
    made = network.apply(parameters, latents, method="decode").astype(jnp.float32)
    divergence = jnp.mean(posterior.kl_divergence(moments))
    return jnp.mean(jnp.square(made - batch["images"])) + KL_WEIGHT * divergence


def _torch_loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    images = rearrange(batch["images"], "b h w c -> b c h w")
    distribution = module.encode(images).latent_dist
    latents = distribution.mean + distribution.std * rearrange(batch["noise"], "b h w c -> b c h w")
    made = module.decode(latents).sample.float()
    return (made - images).square().mean() + KL_WEIGHT * distribution.kl().mean()


def run(settings: Settings) -> Result:
    """All cases of this backend."""
    sizes = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    rows, samples = [], {}
    for name, size in sizes.items():
        row, samples[name] = step_timing.compare(case_of(name, size), settings.cores, settings.repeats)
        rows.append(row)
    return Result(
        title="forward + backward + clipping + AdamW; ratio = ours / PyTorch, below 1 is faster",
        settings={name: dataclasses.asdict(size) for name, size in sizes.items()},
        rows=rows,
        shown=step_timing.SHOWN,
        samples=samples,
        notes=(*step_timing.NOTES, "PyTorch in its default layout (NCHW)."),
    )
