"""Attention along epipolar lines: one front door, several kernels."""

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
    """Which implementation computes attention along lines; all give the same numbers up to rounding."""

    AUTO = "auto"  # chosen by backend, size and dtype: see `choose`
    REFERENCE = "reference"  # all scores and the whole bias at once, float32: the oracle
    CHUNKED = "chunked"  # a block of queries at a time, on any backend
    TPU = "tpu"  # Pallas


# Scores of fewer elements than this on one device are made at once.
FEW = 2**24


def choose(platform: str, *, dtype: jnp.dtype, scores: int, keys: int) -> tuple[EpipolarKernel, str]:
    """The kernel that AUTO stands for, and why.

    Args:
      platform: "cpu", "gpu" or "tpu", of the devices that will run the program.
      dtype: of query, key and value.
      scores: elements of the scores of all heads and frames on one device.
      keys: tokens of a frame.
    """
    if platform == "tpu" and jnp.dtype(dtype).name == "bfloat16" and keys >= 128:
        return EpipolarKernel.TPU, f"TPU devices, {keys} keys in bfloat16"
    if scores <= FEW:
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

    With a mesh, each device does this for its own frames and heads.

    Args:
      query, key, value: tokens of one frame in two views.
      band: lines `B L 3`, points `K 3`, width and slope `B`, float32; no gradient goes to them.
      kernel: the implementation; AUTO picks one and logs its choice.
    """
    partitioner = axes.current()
    devices = 1 if partitioner is None else partitioner.mesh.size
    if kernel is EpipolarKernel.AUTO:
        scores = math.prod(query.shape[:3]) * key.shape[1] // devices
        kernel, reason = choose(axes.platform(), dtype=query.dtype, scores=scores, keys=key.shape[1])
        _say(kernel, reason, query.shape)
    run = _bound(kernel, query.shape[-1] ** -0.5, axes.platform())
    lines, points, width, slope = (jax.lax.stop_gradient(jnp.asarray(part)) for part in band)
    if partitioner is not None and devices > 1:
        run = _over_the_mesh(run, partitioner, query.shape)
    output = run(query, key, value, lines, points, width, slope)
    return output if kernel is EpipolarKernel.TPU else checkpoint_name(output, ATTENTION_OUTPUT)


def _bound(kernel: EpipolarKernel, scale: float, platform: str):
    if kernel is EpipolarKernel.TPU:
        options = {"residual_name": ATTENTION_OUTPUT, "interpret": platform != "tpu"}
        return functools.partial(tpu.attention, scale=scale, **options)
    module = chunked if kernel is EpipolarKernel.CHUNKED else reference
    return functools.partial(module.attention, scale=scale)


def _over_the_mesh(run, partitioner: axes.Partitioner, shape: tuple[int, ...]):
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
def _say(kernel: EpipolarKernel, reason: str, shape: tuple[int, ...]) -> None:
    logger.info("epipolar attention %s: kernel %s (%s)", shape, kernel.value, reason)
