"""Retries with exponential back-off, counted per process."""

import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from jvgen.storage.errors import explain, is_transient
from jvgen.storage.paths import Path

T = TypeVar("T")
_lock = threading.Lock()
_retries = 0
_sleep = time.sleep


@dataclasses.dataclass(frozen=True)
class Retries:
    """How often a failing read or write is tried again; the libraries' own retries are inside of each attempt.

    Attributes:
      attempts: number of attempts.
      delay: seconds before the second attempt; doubled from one to the next, up to `longest`, and drawn from half of
        that to all of it, so that the processes of a pod do not come back together.
    """

    attempts: int = 5
    delay: float = 1.0
    longest: float = 30.0

    def call(self, action: Callable[[], T], path: Path, verb: str) -> T:
        """The result of `action`.

        Args:
          path, verb: for messages: "cannot VERB PATH".

        Raises:
          FileNotFoundError: no such file.
          StorageError: no credentials, no access, no bucket, or still failing at the last attempt.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except Exception as error:
                if attempt < self.attempts and is_transient(error):
                    _count()
                    _sleep(min(self.longest, self.delay * 2 ** (attempt - 1)) * random.uniform(0.5, 1))
                    continue
                raise explain(error, path, verb, attempt) from error
        raise AssertionError("unreachable: attempts is at least 1")


def count_of_retries() -> int:
    """Number of retries in this process so far."""
    return _retries


def _count() -> None:
    global _retries
    with _lock:
        _retries += 1
