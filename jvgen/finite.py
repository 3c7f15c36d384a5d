"""Numbers on their way to a file must be finite: checks on the devices, casts to narrower dtypes, and the error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jvgen import exit_codes


class NotFinite(ValueError):
    """Numbers that were to be written hold NaN or infinity, or would in the dtype of the file; they are not written."""

    exit_code = exit_codes.DIVERGED


class Finite(NamedTuple):
    """How far the numbers of B generated clips were finite; made on the devices by the program that makes the clips.

    Attributes:
      text: the embeddings of the caption are, `B`.
      steps: sampler steps, from the first, whose result is, `B`.
      pixels: the decoded pixels are, `B`.
      total: steps of the sampler, a scalar.
    """

    text: Bool[Array, "B"]
    steps: Int[Array, "B"]
    pixels: Bool[Array, "B"]
    total: Int[Array, ""]

    def all(self) -> Bool[Array, "B"]:
        """Whether everything of a clip is finite."""
        return self.text & (self.steps == self.total) & self.pixels

    def fault(self, row: int) -> tuple[str, str] | None:
        """What of a clip is the first that is not finite, and the network that it comes from; None if nothing is."""
        if not self.text[row]:
            return "the embeddings of its caption", "text encoder"
        if self.steps[row] < self.total:
            return f"the latents after denoising step {int(self.steps[row]) + 1} of {int(self.total)}", "denoiser"
        return None if self.pixels[row] else ("the decoded pixels", "VAE")


class Clips(NamedTuple):
    """Clips as pixels `B F H W 3`, and whether the numbers that they were rounded from are finite, `B`."""

    pixels: UInt8[Array, "B F H W C"]
    finite: Bool[Array, "B"]


def rows_are_finite(values: Float[Array, "B ..."]) -> Bool[Array, "B"]:
    """Whether all numbers of each row are finite: one reduction, for tracing into the program that makes them."""
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))


def clips_of(values: Float[Array, "B F H W C"], convert: Callable[[jax.Array], jax.Array]) -> Clips:
    """Clips of floats, which `convert` rounds to uint8: a NaN would become black."""
    return Clips(convert(values), rows_are_finite(values))


def not_finite(what: str, network: str, dtype: Any, option: str | None = None) -> NotFinite:
    """The error about numbers that a network made.

    Args:
      what: the numbers ("frames 0 to 15 of film.npy").
      network: that they come from.
      dtype: that it computes in.
      option: of the command for another dtype ("--dtype"), if there is one.
    """
    return NotFinite(f"{what}: NaN or infinity from the {network} in {np.dtype(dtype).name}. {advice(dtype, option)}")


def advice(dtype: Any, option: str | None = None) -> str:
    """What to do about a network whose results are not finite in a dtype."""
    name = np.dtype(dtype).name
    if name == "float16":
        return f"float16 ends at 65504: take {option or 'the dtype'} bfloat16, or float32."
    damaged = "the weights are damaged (`jvgen verify`, or another checkpoint), or what they were given is"
    if name == "bfloat16" and option is not None:
        return f"Take {option} float32; if it is the same there, {damaged}."
    return f"{damaged[0].upper()}{damaged[1:]}."


def narrowed(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """An array in the dtype of a file.

    Args:
      name: of the array, for the message.
      array: of floats; other dtypes are returned as they are cast.
      dtype: of the file.

    Raises:
      NotFinite: it holds NaN or infinity, or would in that dtype; names the array, its largest value and the limit.
    """
    dtype = np.dtype(dtype)
    if array.size and _is_float(array.dtype) and _is_float(dtype):
        # The two reductions keep NaN and take no memory.
        with np.errstate(invalid="ignore"):
            largest = np.maximum(array.max(), -array.min())
        if not np.isfinite(float(largest)):
            raise NotFinite(f"{name} holds NaN or infinity; nothing was written. Is what it was made with damaged?")
        # Rounding keeps order, so the largest value tells for all.
        with np.errstate(over="ignore"):
            fits = np.isfinite(float(largest.astype(dtype)))
        if not fits:
            limit = float(ml_dtypes.finfo(dtype).max)
            raise NotFinite(
                f"{name} reaches {float(largest):.6g}, but {dtype.name} ends at {limit:.6g}: it would become infinite. "
                "Nothing was written; take float32" + (" or bfloat16." if dtype == np.float16 else ".")
            )
    return array.astype(dtype, copy=False)


def _is_float(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype in (np.dtype(ml_dtypes.bfloat16),)
