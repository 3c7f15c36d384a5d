"""Weights in files of `torch.save`, read only by torch's restricted unpickler (`weights_only`)."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


class PickleFile(Mapping[str, np.ndarray]):
    """A state dict of torch tensors as numpy arrays, converted one at a time."""

    def __init__(self, state: Mapping[str, Any]):
        self._state = state

    def __getitem__(self, name: str) -> np.ndarray:
        import torch

        tensor = self._state[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._state[name].shape)


def open_pickle(path: Path) -> PickleFile:
    """The state dict in a file of `torch.save`. A pickle can run any code, so only tensors are allowed.

    Raises:
      ValueError: torch is not installed, or the file holds more than tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read, so only torch's weights_only loader reads it, "
            "and torch is not installed. Install jvgen[torch], or convert the file to .safetensors."
        ) from error
    try:
        # Mapped files are read page by page; the older format cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} was refused: it is corrupt, or it holds Python objects besides tensors, which could run code. "
            "Convert it to .safetensors in an environment where you trust it."
        ) from error
    # Lightning stores the tensors as "state_dict", DeepSpeed and SAT as "module".
    for name in ("state_dict", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a state dict: names to tensors.")
    return PickleFile(state)
