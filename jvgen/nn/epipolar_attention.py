"""Dispatcher of attention along epipolar lines: chooses a kernel, and runs it on each device of a mesh."""

import enum
import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jvgen.geometry.epipolar import Band
from jvgen.kernels.epipolar_attention import chunked, reference, tpu
from jvgen.nn.stacked import ATTENTION_OUTPUT
from jvgen.parallel import axes

logger = logging.getLogger(__name__)


class EpipolarKernel(enum.Enum):
    """Implementations of epipolar attention; all give the same numbers up to rounding."""

    AUTO = "auto"  # chosen by backend, size and dtype: see `choose`
    REFERENCE = "reference"  # all scores and the whole bias at once, float32: the oracle
    CHUNKED = "chunked"  # a block of queries at a time, on any backend
    TPU = "tpu"  # Pallas


# Up to this many scores per device, all are in memory at once.
MAX_REFERENCE_SCORES = 2**24


def choose(platform: str, *, dtype: jnp.dtype, scores: int, keys: int) -> tuple[EpipolarKernel, str]:
    """The kernel that AUTO stands for, and why.

    Args:
      platform: "cpu", "gpu" or "tpu": of the devices that run the program.
      dtype: of query, key and value.
      scores: number of scores of all heads and frames on one device.
      keys: tokens per frame.
    """
    if platform == "tpu" and jnp.dtype(dtype).name == "bfloat16" and keys >= 128:
        return EpipolarKernel.TPU, f"TPU devices, {keys} keys in bfloat16"
    if scores <= MAX_REFERENCE_SCORES:
        return EpipolarKernel.REFERENCE, f"{platform} devices, only {scores} scores"
    return EpipolarKernel.CHUNKED, f"{platform} devices, {scores} scores"


def epipolar_attention(
    query: Float[Array, "B L N D"],
    key: Float[Array, "B K N D"],
    value: Float[Array, "B K N D"],
    band: Band,
    *,
    kernel: EpipolarKernel = EpipolarKernel.AUTO,
) -> Float[Array, "B L N D"]:
    """softmax(query key^T / sqrt(D) + bias) value, where the bias keeps each query near its line.

    On a mesh, each device processes its own frames and heads.

    Args:
      query, key, value: tokens of one frame in two views.
      band: lines `B L 3`, points `K 3`, width and slope `B`, float32; treated as constants by differentiation.
      kernel: the implementation; AUTO chooses one and logs it.
    """
    partitioner = axes.current()
    devices = 1 if partitioner is None else partitioner.mesh.size
    if kernel is EpipolarKernel.AUTO:
        scores = math.prod(query.shape[:3]) * key.shape[1] // devices
        kernel, reason = choose(axes.platform(), dtype=query.dtype, scores=scores, keys=key.shape[1])
        _log_choice(kernel, reason, query.shape)
    run = _bound(kernel, query.shape[-1] ** -0.5, axes.platform())
    lines, points, width, slope = (jax.lax.stop_gradient(jnp.asarray(part)) for part in band)
    if partitioner is not None and devices > 1:
        run = _sharded(run, partitioner, query.shape)
    output = run(query, key, value, lines, points, width, slope)
    return output if kernel is EpipolarKernel.TPU else checkpoint_name(output, ATTENTION_OUTPUT)


def _bound(kernel: EpipolarKernel, scale: float, platform: str):
    if kernel is EpipolarKernel.TPU:
        options = {"residual_name": ATTENTION_OUTPUT, "interpret": platform != "tpu"}
        return functools.partial(tpu.attention, scale=scale, **options)
    module = chunked if kernel is EpipolarKernel.CHUNKED else reference
    return functools.partial(module.attention, scale=scale)


def _sharded(run, partitioner: axes.Partitioner, shape: tuple[int, ...]):
    tokens = partitioner.activation((axes.BATCH, None, axes.ACTIVATION_HEADS, None), shape).spec
    lines, number = PartitionSpec(tokens[0], None, None), PartitionSpec(tokens[0])
    return jax.shard_map(
        run,
        mesh=partitioner.mesh,
        in_specs=(tokens, tokens, tokens, lines, PartitionSpec(), number, number),
        out_specs=tokens,
        check_vma=False,
    )


@functools.lru_cache
def _log_choice(kernel: EpipolarKernel, reason: str, shape: tuple[int, ...]) -> None:
    logger.info("epipolar attention %s: kernel %s (%s)", shape, kernel.value, reason)
