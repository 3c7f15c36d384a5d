"""Tables of rows that worker processes map from a file instead of receiving a copy each."""

import contextlib
import os
import tempfile
import weakref
from typing import Any

import numpy as np

# Smaller tables are sent as they are.
SHARED_BYTES = 1 << 20


class SharedRows:
    """A read-only array. A large one is in a temporary file, which is removed with the object that made it.

    Attributes:
      array: the rows.
    """

    def __init__(self, array: np.ndarray, shared_bytes: int = SHARED_BYTES):
        self._path: str | None = None
        self.array = array
        if array.nbytes < shared_bytes:
            return
        descriptor, path = tempfile.mkstemp(prefix="jvgen-rows-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                array.tofile(file)
            self.array = self._mapped(path, array.dtype, len(array))
        except OSError:  # a full disk: the array is sent to workers
            _remove(path, os.getpid())
            return
        self._path = path
        weakref.finalize(self, _remove, path, os.getpid())

    def __len__(self) -> int:
        return len(self.array)

    def __getstate__(self) -> Any:
        return self.array if self._path is None else (self._path, self.array.dtype, len(self.array))

    def __setstate__(self, state: Any) -> None:
        self._path = None if isinstance(state, np.ndarray) else state[0]
        self.array = state if isinstance(state, np.ndarray) else self._mapped(*state)

    @staticmethod
    def _mapped(path: str, dtype: np.dtype, size: int) -> np.ndarray:
        return np.asarray(np.memmap(path, dtype, "r", shape=(size,)))


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            os.unlink(path)
