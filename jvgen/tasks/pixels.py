"""Conversion of pixels: uint8 in files and batches, floats in [-1, 1] in networks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def from_uint8(pixels: UInt8[Array, "*shape"], dtype: jnp.dtype = jnp.float32) -> Float[Array, "*shape"]:
    """0..255 to -1..1: `(x - 127.5) / 127.5`, computed in float32."""
    return ((pixels.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def to_uint8(values: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """-1..1 to 0..255, clipped and rounded to nearest."""
    scaled = jnp.clip(values.astype(jnp.float32), -1.0, 1.0) * 127.5 + 127.5
    return jax.lax.round(scaled, jax.lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint8)
