"""What a data set has, by its columns: distributions of numbers and counts of texts. No record is read."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.store.strings import Strings, Text

BINS = 40
MAX_VALUES = 12  # of a text column that are shown


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Values of one column.

    Attributes:
      name: of the column, with its unit.
      records: how many have a value.
      missing: how many have none.
      labels: what is counted: texts, or none for numbers.
      edges: borders of the bins of numbers; empty for texts.
      counts: records in each bin, or with each text (the most frequent first).
      quantiles: minimum, 5%, median, 95% and maximum of numbers; empty for texts.
    """

    name: str
    records: int
    missing: int
    labels: tuple[str, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    quantiles: tuple[float, ...] = ()


def distributions(index: Index) -> list[Distribution]:
    """The distributions of an index's columns; those in which all records are alike are left out, but kind and size."""
    found = []
    for name, column in _columns(index):
        one = of_texts(name, column) if isinstance(column, Text) else of_numbers(name, column)
        if name in ("kind", "frame size") or len(set(one.quantiles)) > 1 or len(one.labels) > 1 or one.missing:
            found.append(one)
    return found


def of_numbers(name: str, values: np.ndarray) -> Distribution:
    """Distribution of numbers; NaN is a missing value."""
    there = values[np.isfinite(values)]
    if not len(there):
        return Distribution(name, 0, len(values), (), (), ())
    quantiles = np.quantile(there, [0, 0.05, 0.5, 0.95, 1])
    # A few far outliers would squeeze all others into one bin: they are counted in the last ones.
    low, high = quantiles[0], quantiles[4]
    spread = quantiles[3] - quantiles[1]
    if spread > 0:
        low, high = max(low, quantiles[1] - spread), min(high, quantiles[3] + spread)
    counts, edges = np.histogram(np.clip(there, low, high), bins=BINS, range=(low, high) if high > low else None)
    return Distribution(
        name,
        len(there),
        len(values) - len(there),
        (),
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        tuple(quantiles.tolist()),
    )


def of_texts(name: str, column: Text) -> Distribution:
    """Counts of texts; those beyond the most frequent ones are counted together."""
    counts = column.counts()
    missing = counts.pop("", 0)
    shown = dict(list(counts.items())[:MAX_VALUES])
    others = sum(counts.values()) - sum(shown.values())
    if others:
        shown[f"{len(counts) - len(shown)} others"] = others
    return Distribution(name, sum(counts.values()), missing, tuple(shown), (), tuple(shown.values()))


def of_counts(name: str, counts: dict[str, int]) -> Distribution:
    """A distribution of counts that are known already."""
    return Distribution(name, sum(counts.values()), 0, tuple(counts), (), tuple(counts.values()))


def _columns(index: Index) -> Iterator[tuple[str, np.ndarray | Text]]:
    def numbers(values: np.ndarray, there: np.ndarray | None = None) -> np.ndarray:
        values = np.asarray(values, np.float64)
        return values if there is None else values[there]

    yield "kind", _of_codes(np.asarray(index.kind, np.int64), KINDS)
    clips = np.asarray(index.frames_per_second) > 0
    if clips.any():
        rate = numbers(index.frames_per_second, clips)
        yield "duration (s)", numbers(index.frames, clips) / rate
        yield "frames per second", rate
        yield "frames", numbers(index.frames, clips)
    # One number per size: NumPy sorts rows of a matrix ten times slower.
    sizes, codes = np.unique(index.width.astype(np.int64) << 32 | index.height, return_inverse=True)
    yield "frame size", _of_codes(codes, [f"{size >> 32}x{size & 0xFFFFFFFF}" for size in sizes.tolist()])
    yield "shorter side (pixels)", numbers(np.minimum(index.height, index.width))
    yield "width / height", numbers(index.width) / numbers(index.height)
    yield "views", numbers(index.views)
    yield "captions", numbers(index.captions)
    yield "cached latent frames", numbers(index.latent_frames)
    yield from index.columns.items()


def _of_codes(codes: np.ndarray, names: Sequence[str]) -> Text:
    order = np.argsort(np.array(names))
    places = np.empty(len(names), np.int32)
    places[order] = np.arange(len(names))
    return Text(places[codes], Strings.of(sorted(names)))
