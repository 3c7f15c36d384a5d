"""Weights in files of `torch.save`, read only by torch's restricted unpickler (`weights_only`)."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jvgen.storage import UnreadableFile, reading

# Names of torch's dtypes that NumPy does not have.
_WITHOUT_NUMPY = {
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


class PickleFile(Mapping[str, np.ndarray]):
    """A state dict of torch tensors as numpy arrays, converted one at a time."""

    def __init__(self, state: Mapping[str, Any]):
        self._state = state

    def __getitem__(self, name: str) -> np.ndarray:
        import torch

        tensor = self._state[name].detach()
        dtype = _WITHOUT_NUMPY.get(str(tensor.dtype))
        if dtype is None:
            return tensor.numpy()
        words = torch.uint16 if dtype.itemsize == 2 else torch.uint8
        return tensor.view(words).numpy().view(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""
        import torch

        dtype = self._state[name].dtype
        return _WITHOUT_NUMPY.get(str(dtype)) or torch.empty(0, dtype=dtype).numpy().dtype


def open_pickle(path: Path) -> PickleFile:
    """The state dict in a file of `torch.save`. A pickle can run any code, so only tensors are allowed.

    Raises:
      ValueError: torch is not installed.
      UnreadableFile: the file is corrupt, or holds more than plain tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read, so only torch's weights_only loader reads it, "
            "and torch is not installed. Install jvgen[torch], or convert the file to .safetensors."
        ) from error
    with reading(
        path,
        "was refused: it is corrupt, or it holds Python objects besides tensors, which could run code",
        "Get the file again, or convert it to .safetensors in an environment where you trust it.",
    ):
        # Mapped files are read page by page; the older format cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # Lightning stores the tensors as "state_dict", DeepSpeed and SAT as "module".
    for name in ("state_dict", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UnreadableFile(f"{path} does not hold a state dict: names to tensors.")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UnreadableFile(f"{path}: {name} is a sparse or quantized tensor; dequantize the weights first.")
    return PickleFile(state)
