"""Columns of strings as bytes and offsets, which can be mapped into memory and shared by processes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

# Rows of which hashes are computed at a time, so that the numbers of their characters fit in some tens of megabytes.
_CHUNK = 100_000
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Strings(Sequence[str]):
    """Strings as UTF-8 bytes, each followed by a zero byte.

    Attributes:
      content: uint8, all bytes.
      starts: int64 (n + 1), where each string begins; the last one is the length of `content`.
    """

    def __init__(self, content: np.ndarray, starts: np.ndarray):
        self.content, self.starts = content, starts

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Raises `ValueError` for a string with a zero character."""
        strings = list(strings)
        content = np.frombuffer("".join(f"{string}\0" for string in strings).encode(), np.uint8)
        made = cls.of_content(content)
        if len(made) != len(strings):
            raise ValueError(f"{next(s for s in strings if chr(0) in s)!r} has a zero character.")
        return made

    @classmethod
    def of_content(cls, content: np.ndarray) -> "Strings":
        """Of bytes, uint8, in which each string is followed by a zero byte."""
        return cls(content, np.concatenate([np.zeros(1, np.int64), np.flatnonzero(content == 0) + 1]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: "slice | np.ndarray | Sequence[int]") -> "Strings": ...

    def __getitem__(self, row):
        if isinstance(row, int | np.integer):
            row = range(len(self))[row]
            return self.content[self.starts[row] : self.starts[row + 1] - 1].tobytes().decode()
        if isinstance(row, slice) and row.step in (None, 1):
            first, last, _ = row.indices(len(self))
            starts = self.starts[first : max(first, last) + 1]
            return Strings(self.content[starts[0] : starts[-1]], starts - starts[0])
        return self._taken(np.arange(len(self))[row])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _CHUNK):
            yield from self[first : first + _CHUNK].tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strings):
            return NotImplemented
        return len(self) == len(other) and np.array_equal(self.content, other.content)

    def _taken(self, rows: np.ndarray) -> "Strings":
        lengths = self.starts[rows + 1] - self.starts[rows]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        content = np.empty(starts[-1], np.uint8)
        for first in range(0, len(rows), _CHUNK):
            sizes, target = lengths[first : first + _CHUNK], starts[first : first + _CHUNK + 1]
            moved = self.starts[rows[first : first + _CHUNK]] - target[:-1]
            places = np.arange(target[0], target[-1]) + np.repeat(moved, sizes)
            content[target[0] : target[-1]] = self.content[places]
        return Strings(content, starts)

    def tolist(self) -> list[str]:
        """All strings."""
        return self.content.tobytes().decode().split("\0")[:-1]

    @property
    def joined(self) -> np.ndarray:
        """uint8: the strings with zero bytes between them."""
        return self.content[: max(len(self.content) - 1, 0)]

    def hashes(self) -> np.ndarray:
        """uint64 (n,): equal for equal strings, and hardly ever for others."""
        hashes = np.zeros(len(self), np.uint64)
        for first in range(0, len(self), _CHUNK):
            chunk = self[first : first + _CHUNK]
            lengths = np.diff(chunk.starts)
            exponents = np.arange(len(chunk.content)) - np.repeat(chunk.starts[:-1], lengths)
            powers = np.cumprod(np.full(int(lengths.max(initial=0)), _BASE, np.uint64))
            terms = (chunk.content.astype(np.uint64) + np.uint64(1)) * powers[exponents]
            sums = np.add.reduceat(terms, chunk.starts[:-1])
            hashes[first : first + _CHUNK] = (sums ^ (sums >> np.uint64(29))) * _BASE
        return hashes

    def first_repeated(self) -> tuple[int, int] | None:
        """Two rows with the same string, the earlier one first; None if all differ."""
        hashes = self.hashes()
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for place in same[np.argsort(order[same], kind="stable")].tolist():
            earlier, later = int(order[place]), int(order[place + 1])
            if self[earlier] == self[later]:
                return earlier, later
        return None


class Text(Sequence[str]):
    """A column of short texts, of which many are equal.

    Attributes:
      codes: int32 (n,), index into `values`.
      values: the different texts, sorted.
    """

    def __init__(self, codes: np.ndarray, values: Strings):
        self.codes, self.values = codes, values

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Text":
        """Raises `ValueError` for a text with a zero character."""
        texts = list(texts)
        values = sorted(set(texts))
        places = {value: place for place, value in enumerate(values)}
        return cls(np.array([places[text] for text in texts], np.int32), Strings.of(values))

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: "slice | np.ndarray | Sequence[int]") -> "Text": ...

    def __getitem__(self, row):
        if isinstance(row, int | np.integer):
            return self.values[int(self.codes[row])]
        return Text(self.codes[row], self.values)

    def tolist(self) -> list[str]:
        """All texts."""
        values = self.values.tolist()
        return [values[code] for code in self.codes.tolist()]

    def code(self, text: str) -> int:
        """Code of a text, -1 for one that the column does not have."""
        low, high = 0, len(self.values)
        while low < high:
            middle = (low + high) // 2
            if self.values[middle] < text:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self.values) and self.values[low] == text else -1

    def counts(self) -> dict[str, int]:
        """Rows of each text, the most frequent first."""
        counts = np.bincount(self.codes, minlength=len(self.values))
        order = [code for code in np.argsort(-counts, kind="stable").tolist() if counts[code]]
        return {self.values[code]: int(counts[code]) for code in order}
