"""Ranges of pixels: uint8 in files and batches, "signed" floats in [-1, 1] in VAEs, "unit" floats in [0, 1] in
iVideoGPT's tokenizer and in metrics. Every conversion between them is here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jvgen.finite import Clips, clips_of


def check_channels(name: str, channels: int) -> None:
    """Raise `ValueError` for a network that does not take RGB frames, which all data sets have."""
    if channels != 3:
        raise ValueError(f"{name} = {channels}: the frames of data sets are RGB; set it to 3.")


def from_uint8(pixels: UInt8[Array, "*shape"], dtype: jnp.dtype = jnp.float32) -> Float[Array, "*shape"]:
    """0..255 to -1..1: `(x - 127.5) / 127.5`, computed in float32."""
    return ((pixels.astype(jnp.float32) - 127.5) / 127.5).astype(dtype)


def to_uint8(values: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """-1..1 to 0..255, clipped and rounded to nearest."""
    scaled = jnp.clip(values.astype(jnp.float32), -1.0, 1.0) * 127.5 + 127.5
    return jax.lax.round(scaled, jax.lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint8)


def unit_from_uint8(pixels: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0..255 to 0..1, float32."""
    return pixels.astype(jnp.float32) / 255.0


def unit_to_uint8(values: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """0..1 to 0..255, clipped and rounded to nearest."""
    return jnp.rint(jnp.clip(values.astype(jnp.float32), 0.0, 1.0) * 255.0).astype(jnp.uint8)


def unit_from_signed(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """-1..1 to 0..1, clipped, float32: the range of metrics. SSIM has another value on [-1, 1], a wrong one."""
    return (jnp.clip(values.astype(jnp.float32), -1.0, 1.0) + 1.0) / 2.0


def signed_from_unit(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0..1 to -1..1, not clipped, in the dtype of the values."""
    return 2.0 * values - 1.0


def to_clips(values: Float[Array, "B F H W C"]) -> Clips:
    """`to_uint8`, and which clips hold numbers that are not finite and so are no pixels."""
    return clips_of(values, to_uint8)


def unit_to_clips(values: Float[Array, "B F H W C"]) -> Clips:
    """`to_clips` of values in 0..1."""
    return clips_of(values, unit_to_uint8)
