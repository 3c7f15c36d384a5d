"""Attention for NVIDIA GPUs: cuDNN's fused kernel through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp


def supports(dtype: jnp.dtype, head_width: int) -> bool:
    """Whether cuDNN's fused kernel supports these arrays: half precision, head widths of a multiple of 8 up to 128."""
    return jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)) and (
        head_width % 8 == 0 and head_width <= 128
    )


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

    Args:
      implementation: "cudnn", or "xla" for the same call on any backend.

    Raises:
      ValueError: cuDNN does not support this dtype or head width (see `supports`).
    """
    if implementation == "cudnn" and not supports(query.dtype, query.shape[-1]):
        raise ValueError(
            "kernel = gpu: cuDNN attention supports float16 and bfloat16, and head widths in multiples of 8 up to "
            f"128, not {query.dtype} and {query.shape[-1]}; use kernel = chunked."
        )
    keys = key.shape[1]
    # Slicing the keys costs less than a mask, and allows the kernel without one.
    key, value = key[:, :valid_length], value[:, :valid_length]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], keys)).astype(query.dtype)[..., :valid_length]
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, scale=scale, is_causal=causal, implementation=implementation
    )
