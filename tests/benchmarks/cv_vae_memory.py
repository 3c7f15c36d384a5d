"""Memory that coding a 720p video part by part takes, whatever its length: the causal CV-VAE at full width."""

from typing import Any

import jax
import jax.numpy as jnp

from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.model import CVVAE
from jvgen.nn.network import Network
from jvgen.preflight.report import GIB, Memory
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

SHOWN = ("what", "part_frames", "in_all_GiB", "remembered_GiB", "temporary_GiB")


def run(settings: Settings) -> Result:
    """Compile encoding and decoding of a part in the middle of a video, parts of 4 and of 16 frames; run nothing."""
    height, width = (32, 48) if settings.quick else (720, 1280)
    config = CVVAEConfig.causal()
    if settings.quick:
        config = config.replace(block_channels=(4, 4, 4, 4), groups=2, layers_per_block=1)
    network = Network.of(lambda rngs: CVVAE(config, rngs=rngs))
    latent, group = config.latent_size(height, width), config.temporal_downsampling
    rows: list[dict[str, Any]] = []
    for frames in (group, 4 * group):
        sizes = {"encode_chunk": (frames, height, width, config.channels)}
        sizes["decode_chunk"] = (frames // group, *latent, config.latent_channels)
        for method, (count, *rest) in sizes.items():

            def step(parameters: Any, part: jax.Array, past: Any, method: str = method) -> Any:
                return network.apply(parameters, part, past, method=method)

            first, part = (jax.ShapeDtypeStruct((1, n, *rest), jnp.float32) for n in (count + 1, count))
            past = jax.eval_shape(lambda p, x, step=step: step(p, x, None)[1], network.shapes, first)
            memory = Memory.of(jax.jit(step, donate_argnums=2).lower(network.shapes, part, past).compile())
            kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(past))
            rows.append(
                {
                    "what": method.removesuffix("_part"), "part_frames": frames, "in_all_GiB": memory.total / GIB,
                    "remembered_GiB": kept / GIB, "temporary_GiB": memory.temporaries / GIB,
                }
            )  # fmt: skip
    return Result(
        title="memory of coding a part of a long video",
        settings={"height": height, "width": width, "channels": config.block_channels},
        rows=rows,
        shown=SHOWN,
        notes=("compiled for this backend in float32, not run; what is remembered is donated from part to part.",),
    )
