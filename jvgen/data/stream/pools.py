"""Pools: the rows of one source and one kind that fit a bucket, found once from the index, with a count of the rest."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig


@dataclasses.dataclass(frozen=True)
class Pool:
    """Rows that are drawn from together.

    Attributes:
      source: place of the source in the configuration.
      kind: index into `jvgen.data.store.records.KINDS`.
      rows: uint32, ascending, never empty.
    """

    source: int
    kind: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Census:
    """What became of a source's records in one bucket.

    Attributes:
      source: place of the source in the configuration.
      records: how many it has.
      accepted: how many fit the bucket.
      reasons: how many were turned away, by the first reason that applies.
    """

    source: int
    records: int
    accepted: int
    reasons: dict[str, int]


def bucket_pools(
    config: DataConfig, bucket: BucketConfig, sources: Sequence[SourceConfig], indices: Sequence[Index]
) -> tuple[list[Pool], list[Census]]:
    """The pools of a bucket, ordered by source and kind, and one census a source."""
    pools, census = [], []
    for number, (source, index) in enumerate(zip(sources, indices, strict=True)):
        open_rows = np.ones(len(index), bool)
        reasons = {}
        for reason, wrong in _rules(config, bucket, source, index):
            count = int(np.count_nonzero(wrong & open_rows))
            if count:
                reasons[reason] = count
            open_rows &= ~wrong
        for kind in range(len(KINDS)):
            rows = np.flatnonzero(open_rows & (index.kind == kind)).astype(np.uint32)
            if rows.size:
                pools.append(Pool(number, kind, rows))
        census.append(Census(number, len(index), int(np.count_nonzero(open_rows)), reasons))
    return pools, census


def explain(field: str, sources: Sequence[SourceConfig], bucket: BucketConfig, census: Sequence[Census]) -> str:
    """One line a source: how many of its records fit the bucket, and why the others don't."""
    lines = []
    for entry in census:
        source = sources[entry.source]
        reasons = ", ".join(f"{count} {reason}" for reason, count in entry.reasons.items()) or "none turned away"
        lines.append(
            f"  {field}.{entry.source} ({source.path} [{source.split}]): {entry.accepted} of {entry.records} records "
            f"fit {bucket.name}; {reasons}"
        )
    return "\n".join(lines)


def _rules(
    config: DataConfig, bucket: BucketConfig, source: SourceConfig, index: Index
) -> list[tuple[str, np.ndarray]]:
    """(reason, bool per row: turned away), in the order in which they are counted."""
    # A source with a step of its own lets go of it for recordings that are too short.
    span = (bucket.horizon - 1) * (min(bucket.strides) if source.step == 1 else 1) + 1
    rules = [
        (f"of kind {kind}, which {where}", index.kind == code)
        for code, kind in enumerate(KINDS)
        for where, excluded in (
            ("the bucket does not take", kind not in bucket.kinds),
            ("the source's kinds leave out", bool(source.kinds) and kind not in source.kinds),
            ("kind_weights gives no share", config.kind_weights.get(kind, 1.0) == 0),
        )
        if excluded
    ]
    stored = index.latent_frames > 0
    compressed = stored & (index.latent_frames != index.frames)
    small = (index.height < bucket.height) | (index.width < bucket.width)
    other_size = (index.height != bucket.height) | (index.width != bucket.width)
    rules += [
        (f"too short (fewer than {span} frames)", index.frames < span),
        (f"with fewer than {bucket.views} views", index.views < bucket.views),
        ("with cached latents of another size, which cannot be cropped", stored & other_size),
        ("with cached latents, of which no segment can be cut", stored & (bucket.segment is not None)),
        (
            f"smaller than {bucket.height}x{bucket.width} (upscale = True takes them)",
            small if not config.upscale else np.zeros(len(index), bool),
        ),
        (
            "with latents that merge frames, which need stride 1",
            compressed & (1 not in bucket.strides) & (bucket.frames > 1),
        ),
    ]
    return rules
