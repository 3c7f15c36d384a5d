"""Dispatcher of attention along epipolar lines: chooses a kernel, and runs it on each device of a mesh."""

import enum
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jvgen.config import ConfigError
from jvgen.geometry.epipolar import Band
from jvgen.kernels.attention import gpu as gpu_attention
from jvgen.kernels.epipolar_attention import chunked, gpu, reference, tpu
from jvgen.nn import kernel_report
from jvgen.nn.attention import check_platform
from jvgen.nn.kernel_report import Call
from jvgen.nn.stacked import ATTENTION_OUTPUT
from jvgen.parallel import axes


class EpipolarKernel(enum.Enum):
    """Implementations of epipolar attention; all give the same numbers up to rounding."""

    AUTO = "auto"  # chosen by backend, size and dtype: see `choose`
    REFERENCE = "reference"  # all scores and the whole bias at once, float32: the oracle
    CHUNKED = "chunked"  # a block of queries at a time, on any backend
    GPU = "gpu"  # cuDNN, with the bias of some frames at a time
    TPU = "tpu"  # Pallas


# Up to this many scores per device, all are in memory at once.
MAX_REFERENCE_SCORES = 2**24


def choose(
    platform: str, *, dtype: jnp.dtype, scores: int, keys: int, gpu_refusal: str = ""
) -> tuple[EpipolarKernel, str]:
    """The kernel that AUTO stands for, and why.

    Args:
      platform: "cpu", "gpu" or "tpu": of the devices that run the program.
      dtype: of query, key and value.
      scores: number of scores of all heads and frames on one device.
      keys: tokens per frame.
      gpu_refusal: why the GPUs' own kernel cannot take these arrays, see `jvgen.kernels.attention.gpu.refusal`.
    """
    refused = ""
    if platform == "tpu":
        if jnp.dtype(dtype).name == "bfloat16" and keys >= 128:
            return EpipolarKernel.TPU, "TPU devices"
        refused = f"; tpu refused: {jnp.dtype(dtype).name}, {keys} keys, it takes bfloat16 and 128 keys or more"
    elif platform != "cpu":
        if not gpu_refusal:
            return EpipolarKernel.GPU, "CUDA devices"
        refused = f"; gpu refused: {gpu_refusal}"
    if scores <= MAX_REFERENCE_SCORES:
        return EpipolarKernel.REFERENCE, f"{platform} devices, at most {MAX_REFERENCE_SCORES} scores{refused}"
    return EpipolarKernel.CHUNKED, f"{platform} devices{refused}"


def epipolar_attention(
    query: Float[Array, "B L N D"],
    key: Float[Array, "B K N D"],
    value: Float[Array, "B K N D"],
    band: Band,
    *,
    kernel: EpipolarKernel = EpipolarKernel.AUTO,
) -> Float[Array, "B L N D"]:
    """softmax(query key^T / sqrt(D) + bias) value, where the bias keeps each query near its line.

    On a mesh, each device processes its own frames and heads; devices that share a sequence's tokens share its heads.

    Args:
      query, key, value: tokens of one frame in two views.
      band: lines `B L 3`, points `K 3`, width and slope `B`, float32; treated as constants by differentiation.
      kernel: the implementation; AUTO chooses one. The choice is in the report of `jvgen.nn.kernel_report`.

    Raises:
      ConfigError: the kernel does not run on these devices or for these arrays.
    """
    partitioner = axes.current()
    devices = 1 if partitioner is None else partitioner.mesh.size
    scores = math.prod(query.shape[:3]) * key.shape[1] // devices
    kernel, reason = _choice(kernel, query, key, scores)
    scale = query.shape[-1] ** -0.5
    length, keys = query.shape[1], key.shape[1]
    call = Call("epipolar attention", kernel.value, query.dtype.name, query.shape[-1], length, keys, keys, scale)
    kernel_report.note(query.shape, f"{keys} keys", reason, call)
    run = bound(kernel, scale, axes.platform())
    lines, points, width, slope = (jax.lax.stop_gradient(jnp.asarray(part)) for part in band)
    if partitioner is not None and devices > 1:
        run = _sharded(run, partitioner, query.shape)
    output = run(query, key, value, lines, points, width, slope)
    # What these kernels' own backward passes need is known to remat policies: a name would store a second copy.
    named = kernel is EpipolarKernel.TPU or (kernel is EpipolarKernel.GPU and axes.platform() != "cpu")
    return output if named else checkpoint_name(output, ATTENTION_OUTPUT)


def _choice(kernel: EpipolarKernel, query: jax.Array, key: jax.Array, scores: int) -> tuple[EpipolarKernel, str]:
    """The kernel that runs, and why."""
    platform, refused = axes.platform(), ""
    if kernel in (EpipolarKernel.GPU, EpipolarKernel.TPU):
        check_platform("sync.kernel", kernel.value, kernel.value, platform)
    if platform not in ("cpu", "tpu") and kernel in (EpipolarKernel.AUTO, EpipolarKernel.GPU):
        refused = gpu_attention.refusal(axes.device(), query.shape, key.shape[1], query.dtype, bias=True)
    if kernel is EpipolarKernel.AUTO:
        return choose(platform, dtype=query.dtype, scores=scores, keys=key.shape[1], gpu_refusal=refused)
    if kernel is EpipolarKernel.GPU and refused:
        raise ConfigError(f"sync.kernel = gpu: {refused}; use auto or chunked.")
    return kernel, "as configured"


def bound(kernel: EpipolarKernel, scale: float, platform: str) -> Callable[..., jax.Array]:
    """The kernel as a function of queries, keys, values and the arrays of a band."""
    if kernel is EpipolarKernel.TPU:
        options = {"residual_name": ATTENTION_OUTPUT, "interpret": platform != "tpu"}
        return functools.partial(tpu.attention, scale=scale, **options)
    if kernel is EpipolarKernel.GPU:
        return functools.partial(gpu.attention, scale=scale, implementation="xla" if platform == "cpu" else "cudnn")
    module = chunked if kernel is EpipolarKernel.CHUNKED else reference
    return functools.partial(module.attention, scale=scale)


def _sharded(run, partitioner: axes.Partitioner, shape: tuple[int, ...]):
    """`run` with frames over the axes of the batch, and heads over those of the heads and of a sequence's tokens.

    Tokens of a frame are not split: lines cross the whole frame, and one device can skip what no line of a tile meets.
    Heads that the devices do not divide are padded with heads of zeros, as in `jvgen.nn.sequence_parallel`.
    """
    mesh = partitioner.mesh
    # Of as many tokens as devices, which any mesh axis divides; no axis is in two places.
    placed = (shape[0], mesh.size, *shape[2:])
    frames, of_tokens, heads, _ = partitioner.activation(
        (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None), placed
    ).spec
    names = tuple(n for part in (heads, of_tokens) for n in ((part,) if isinstance(part, str) else part or ()))
    added = -shape[2] % math.prod(mesh.shape[name] for name in names)
    tokens = PartitionSpec(frames, None, names or None, None)
    lines, number = PartitionSpec(frames, None, None), PartitionSpec(frames)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, lines, PartitionSpec(), number, number),
        out_specs=tokens,
        check_vma=False,
    )

    def padded(query: jax.Array, key: jax.Array, value: jax.Array, *band: jax.Array) -> jax.Array:
        arrays = (jnp.pad(array, ((0, 0), (0, 0), (0, added), (0, 0))) for array in (query, key, value))
        return mapped(*arrays, *band)[:, :, : shape[2]]

    return padded
