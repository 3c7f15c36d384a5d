"""Small safetensors files read whole, such as the weights of a perceptual distance."""

from collections.abc import Iterable

import numpy as np
from safetensors import safe_open

from jvgen.storage.file_kinds import UnreadableFile, reading
from jvgen.storage.paths import Path


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a local safetensors file by name.

    Raises:
      UnreadableFile: a file of another kind, or a corrupt one.
    """
    with reading(path, "is not a valid safetensors file"), safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def check_weights(tensors: Iterable[tuple[str, np.ndarray]], source: str) -> None:
    """Raise `UnreadableFile` unless all tensors, `(name, array)` pairs, are finite floating-point numbers."""
    for name, array in tensors:
        # Dtypes of ml_dtypes (bfloat16, float8) are of kind "V".
        if array.dtype.kind in "biuc":
            raise UnreadableFile(
                f"{source}: {name} is {array.dtype}, expected floating-point weights; dequantize them."
            )
        if not np.isfinite(array).all():
            raise UnreadableFile(f"{source}: {name} holds NaN or infinity. Get the file again.")
