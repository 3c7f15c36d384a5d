"""Time and memory of a residual block of a VAE on one TPU device, with norms of what the compiler takes, or of rounded
inputs (`GroupNorm.rounded`), estimated from the compiled program.

    python -m tests.benchmarks group_norm_tpu
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ResidualBlock
from jvgen.nn.stacked import Remat, run_block
from jvgen.parallel.chips import chip_of
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.preflight import hlo, program_cost, topology
from jvgen.preflight.ahead_of_time import without_cache
from jvgen.preflight.time_estimate import TimeEstimate, estimate
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Images:
    """What one device has: images of a side with as many channels."""

    topology: str
    count: int
    side: int
    width: int


CASES = (Images("v5e:2x2", 6, 256, 128), Images("v5e:2x2", 8, 256, 128), Images("v5e:2x2", 24, 64, 128))


def run(settings: Settings) -> Result:
    """Compile forward and backward pass of the block for each number of images."""
    rows = []
    for images in (Images("v5e:2x2", 2, 16, 128),) if settings.quick else CASES:
        for rounded in (False, True):
            time, temporary = _compiled(images, rounded)
            norms = sum(part.likely for name, part in time.parts.items() if name.startswith("elementwise"))
            rows.append(
                {
                    **dataclasses.asdict(images),
                    "rounded": rounded,
                    "ms": round(time.seconds.likely * 1e3, 2),
                    "norms_ms": round(norms * 1e3, 2),
                    "temporary_GiB": round(temporary / GIB, 2),
                }
            )
    return Result(
        title="A residual block of 3x3 convolutions in bfloat16, forward, recomputed and backward",
        settings={"remat": "full"},
        rows=rows,
        notes=("norms_ms: elementwise operations and norms, of ms",),
    )


def _compiled(images: Images, rounded: bool) -> tuple[TimeEstimate, int]:
    """Estimate and bytes of temporaries."""
    mesh = make_mesh(MeshConfig(), topology.describe(images.topology).devices[:1])
    place = NamedSharding(mesh, PartitionSpec())
    block = nnx.eval_shape(lambda: ResidualBlock(images.width, images.width, ImageVAEConfig(), rngs=nnx.Rngs(0)))
    block.norm1.rounded = block.norm2.rounded = rounded
    graph, state = nnx.split(block)

    def described(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def loss(state: Any, x: jax.Array) -> jax.Array:
        x = run_block(nnx.merge(graph, state), Remat.FULL, x)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    state = jax.tree.map(lambda leaf: described(leaf.shape), state)
    x = described((images.count, images.side, images.side, images.width))
    with without_cache():
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x).compile()
    operations = program_cost.operations(hlo.parse(compiled.as_text()))
    time = estimate(operations, {}, chip_of(mesh.devices.flat[0]), mesh, useful_flops=1.0)
    return time, compiled.memory_analysis().temp_size_in_bytes
