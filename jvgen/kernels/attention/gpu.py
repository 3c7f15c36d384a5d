"""Attention for NVIDIA GPUs: cuDNN's fused kernel through `jax.nn.dot_product_attention`."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Compute capabilities (major, minor). The kernel runs from Ampere on, with wide heads from Hopper on.
AMPERE, HOPPER = (8, 0), (9, 0)
WIDTH, HOPPER_WIDTH = 128, 256

# Weights of keys with this bias are zero beside others. Finite in float16.
LOWEST_BIAS = -3e4
# The primitive's name starts so. Its results are what remat policies save: the softmax statistics carry no other name.
FORWARD = "dot_product_attention_fwd"


def is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy: saves the results of cuDNN's forward kernel, which its backward kernel needs."""
    return primitive.name.startswith(FORWARD)


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, (9, 0) for an H100; None for all other devices, those of ROCm included."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return None if found is None else (int(found[1]), int(found[2]))


def refusal(
    device: jax.Device, shape: tuple[int, ...], keys: int, dtype: DTypeLike, *, causal: bool = False, bias: bool = False
) -> str:
    """Why cuDNN's fused kernel cannot take such arrays on this machine, forward and backward; empty if it can.

    Args:
      device: one of those that run the program.
      shape: of the queries, `B L N D`.
      keys: number of keys.
      dtype: of query, key and value.
      causal, bias: whether there is a causal mask, a bias `B 1 L K`.
    """
    return hardware_refusal(dtype, shape[-1], compute_capability(device)) or _installation_refusal(
        shape, keys, dtype, causal, bias
    )


def hardware_refusal(dtype: DTypeLike, head_width: int, capability: tuple[int, int] | None) -> str:
    """Why cuDNN's fused kernel has no such arrays on devices of a compute capability; empty if it has."""
    name = jnp.dtype(dtype).name
    if capability is None:
        return "not CUDA devices"
    shown = ".".join(map(str, capability))
    if capability < AMPERE:
        return f"compute capability {shown}, cuDNN's kernel needs 8.0 or more"
    if name not in ("bfloat16", "float16"):
        return f"{name}, cuDNN's kernel takes bfloat16 and float16"
    widest = HOPPER_WIDTH if capability >= HOPPER else WIDTH
    if head_width % 8 or head_width > widest:
        return f"heads of {head_width}, cuDNN's kernel takes multiples of 8 up to {widest} on {shown}"
    return ""


def _installation_refusal(shape: tuple[int, ...], keys: int, dtype: DTypeLike, causal: bool, bias: bool) -> str:
    """What JAX says against such arrays when it traces them, which is when it looks for cuDNN and its version."""

    def run(*arrays: jax.Array) -> jax.Array:
        options = {"is_causal": causal, "implementation": "cudnn"}
        added = arrays[3] if bias else None
        return jax.vjp(lambda *qkv: jax.nn.dot_product_attention(*qkv, bias=added, **options), *arrays[:3])[0]

    batch, heads, width = shape[0], *shape[2:]
    length, keys = _even(shape[1]), _even(keys)
    shapes = [(batch, length, heads, width), *[(batch, keys, heads, width)] * 2, (batch, 1, length, keys)][: 3 + bias]
    try:
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(each, dtype) for each in shapes))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"cuDNN attention: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    valid_length: int | None = None,
    causal: bool = False,
    bias: jax.Array | None = None,
    implementation: str = "cudnn",
) -> jax.Array:
    """softmax(scale * query key^T + bias) value; shapes and dtypes as in `reference.attention`.

    Which arrays cuDNN takes is what `refusal` says.

    Args:
      implementation: "cudnn", or "xla" for the same call on any backend.
    """
    length, keys = query.shape[1], key.shape[1]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], length, keys))[..., :valid_length].astype(query.dtype)
    # Slicing the keys costs less than a mask, and allows the kernel without one.
    key, value = key[:, :valid_length], value[:, :valid_length]
    keys = key.shape[1]
    lengths = None
    if length % 2 or keys % 2:
        # JAX refuses odd lengths in training. Causal masks hide the key that is added, as the last one.
        query, key, value = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (query, key, value))
        if bias is not None:
            rows = jnp.pad(bias, ((0, 0), (0, 0), (0, length % 2), (0, 0)))
            bias = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, keys % 2)), constant_values=LOWEST_BIAS)
        elif keys % 2 and not causal:
            lengths = jnp.full(query.shape[:1], keys, jnp.int32)
    output = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return output[:, :length]


def _even(length: int) -> int:
    return length + length % 2
