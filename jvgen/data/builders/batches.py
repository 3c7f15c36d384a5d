"""Results of many jobs through an accelerator in batches: in order, while the next ones are decoded.

Which clips share a batch depends on the jobs of their unit alone: units made by any process, after any number of
interruptions, have the same bytes.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jvgen.data.builders.jobs import Made

# Batches that devices work on while others are collected and decoded.
_IN_FLIGHT = 2
# Bytes of decoded clips that wait for others of their size.
_MOST_WAITING = 4 << 30


class BatchEncoder(Protocol):
    """What encodes clips `F H W 3`, or captions as tokens `L`."""

    def batch(self, shape: tuple[int, ...]) -> tuple[Hashable, int]:
        """What an array of this shape shares with the others of its batch, and their number."""

    def begin(self, clips: Sequence[np.ndarray]) -> Any:
        """Begin to encode up to one batch, and return at once."""

    def end(self, begun: Any) -> list[np.ndarray]:
        """Wait for what `begin` returned: an array for each."""


class Separately:
    """A `BatchEncoder` that calls a function for each clip."""

    def __init__(self, encode: Callable[[np.ndarray], np.ndarray]):
        self._encode = encode

    def batch(self, shape: tuple[int, ...]) -> tuple[Hashable, int]:
        """Every clip is a batch."""
        return shape, 1

    def begin(self, clips: Sequence[np.ndarray]) -> Any:
        """Encode the clip."""
        return [self._encode(clip) for clip in clips]

    def end(self, begun: Any) -> list[np.ndarray]:
        """The clip's array."""
        return begun


@dataclasses.dataclass(frozen=True)
class ToEncode:
    """What a function makes of a payload, up to the work of the accelerator.

    Attributes:
      clips: arrays that the encoder takes.
      made: takes the encoded arrays, in order.
    """

    clips: tuple[np.ndarray, ...]
    made: Callable[[list[np.ndarray]], Made]

    @property
    def nbytes(self) -> int:
        """Bytes of the clips."""
        return sum(clip.nbytes for clip in self.clips)


class _Waiting:
    """A result whose clips are being encoded."""

    def __init__(self, result: Any):
        self._result = result
        self._arrays: dict[int, np.ndarray] = {}
        self._count = len(result.clips) if isinstance(result, ToEncode) else 0

    @property
    def done(self) -> bool:
        return len(self._arrays) == self._count

    def put(self, number: int, array: np.ndarray) -> None:
        self._arrays[number] = array

    def value(self) -> Any:
        if not self._count:
            return self._result
        return self._result.made([self._arrays[number] for number in range(self._count)])

    def release(self) -> None:
        """Forget the pixels."""
        if self._count:
            self._result = dataclasses.replace(self._result, clips=())


def encoded(results: Iterable[tuple[int, Any]], encoder: BatchEncoder) -> Iterator[Any]:
    """The results in order, with `ToEncode` replaced by what it makes; others (`Corrupt`, records) pass.

    Args:
      results: each with the number of its unit.
      encoder: of the clips.
    """
    pipeline = _Pipeline(encoder)
    unit = None
    for number, result in results:
        if number != unit:
            pipeline.flush()
            unit = number
        pipeline.add(result)
        yield from pipeline.finished()
    pipeline.flush()
    yield from pipeline.finished(wait=True)


class _Pipeline:
    def __init__(self, encoder: BatchEncoder):
        self._encoder = encoder
        self._order: collections.deque[_Waiting] = collections.deque()
        self._open: dict[Hashable, list[tuple[_Waiting, int, np.ndarray]]] = {}
        self._running: collections.deque[tuple[Any, list[tuple[_Waiting, int]]]] = collections.deque()
        self._bytes = 0

    def add(self, result: Any) -> None:
        waiting = _Waiting(result)
        self._order.append(waiting)
        if not isinstance(result, ToEncode):
            return
        for number, clip in enumerate(result.clips):
            key, size = self._encoder.batch(clip.shape)
            members = self._open.setdefault(key, [])
            members.append((waiting, number, clip))
            self._bytes += clip.nbytes
            if len(members) == size:
                self._begin(key)
        waiting.release()
        while self._bytes > _MOST_WAITING:
            # Those that wait longest.
            self._begin(next(iter(self._open)))

    def flush(self) -> None:
        """Begin all batches, full or not."""
        for key in list(self._open):
            self._begin(key)

    def finished(self, wait: bool = False) -> Iterator[Any]:
        """Results that are complete, from the first; with `wait`, all."""
        while self._order:
            if not self._order[0].done:
                if not (wait and self._running):
                    return
                self._end()
            else:
                yield self._order.popleft().value()

    def _begin(self, key: Hashable) -> None:
        members = self._open.pop(key)
        clips = [clip for _, _, clip in members]
        self._bytes -= sum(clip.nbytes for clip in clips)
        self._running.append((self._encoder.begin(clips), [(waiting, number) for waiting, number, _ in members]))
        while len(self._running) > _IN_FLIGHT:
            self._end()

    def _end(self) -> None:
        begun, members = self._running.popleft()
        for (waiting, number), array in zip(members, self._encoder.end(begun), strict=True):
            waiting.put(number, array)
