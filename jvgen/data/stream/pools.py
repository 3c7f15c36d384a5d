"""Pools: the rows of one source and one kind that fit a bucket, found once from the index; the rest is counted."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.frame_times import SLOWEST, offsets
from jvgen.data.stream.source_filter import SourceFilter


@dataclasses.dataclass(frozen=True)
class Pool:
    """Rows that are drawn from together.

    Attributes:
      source: index of the source in the configuration.
      kind: index into `jvgen.data.store.records.KINDS`.
      rows: uint32, ascending, never empty.
    """

    source: int
    kind: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class FilterStats:
    """How many of a source's records fit a bucket.

    Attributes:
      source: index of the source in the configuration.
      records: number of records.
      accepted: records that fit the bucket.
      rejected: records that do not, by the first reason that applies.
    """

    source: int
    records: int
    accepted: int
    rejected: dict[str, int]


def bucket_pools(
    config: DataConfig,
    bucket: BucketConfig,
    sources: Sequence[SourceConfig],
    indices: Sequence[Index],
    filters: Sequence[SourceFilter],
) -> tuple[list[Pool], list[FilterStats]]:
    """The pools of a bucket, ordered by source and kind, and the statistics of each source."""
    pools, stats = [], []
    for number, (source, index, chosen) in enumerate(zip(sources, indices, filters, strict=True)):
        accepted = np.ones(len(index), bool)
        rejected = {}
        for reason, mask in _rules(config, bucket, source, index, chosen):
            count = int(np.count_nonzero(mask & accepted))
            if count:
                rejected[reason] = count
            accepted &= ~mask
        for kind in range(len(KINDS)):
            rows = np.flatnonzero(accepted & (index.kind == kind)).astype(np.uint32)
            if rows.size:
                pools.append(Pool(number, kind, rows))
        stats.append(FilterStats(number, len(index), int(np.count_nonzero(accepted)), rejected))
    return pools, stats


def explain(field: str, sources: Sequence[SourceConfig], bucket: BucketConfig, stats: Sequence[FilterStats]) -> str:
    """One line per source: how many of its records fit the bucket, and why the others were rejected."""
    lines = []
    for entry in stats:
        source = sources[entry.source]
        rejected = ", ".join(f"{count} {reason}" for reason, count in entry.rejected.items()) or "none"
        lines.append(
            f"  {field}.{entry.source} ({source.path} [{source.split}]): {entry.accepted} of {entry.records} records "
            f"fit {bucket.name}; rejected: {rejected}"
        )
    return "\n".join(lines)


def _rules(
    config: DataConfig, bucket: BucketConfig, source: SourceConfig, index: Index, chosen: SourceFilter
) -> Iterator[tuple[str, np.ndarray]]:
    """(reason, bool per row: rejected), in the order in which they are counted; one mask is in memory at a time."""
    yield from (
        (f"of kind {kind}, which {where}", index.kind == code)
        for code, kind in enumerate(KINDS)
        for where, excluded in (
            ("the bucket does not take", kind not in bucket.kinds),
            ("the source's kinds leave out", bool(source.kinds) and kind not in source.kinds),
            ("kind_weights gives no share", config.kind_weights.get(kind, 1.0) == 0),
        )
        if excluded
    )
    yield from chosen.rejected
    cached = index.latent_frames > 0
    compressed = cached & (index.latent_frames != index.frames)
    rate = bucket.frames_per_second
    if rate is None:
        # A source with its own stride uses a smaller one for recordings that are too short.
        span = (bucket.horizon - 1) * (min(bucket.strides) if source.frame_stride == 1 else 1) + 1
        yield f"too short (fewer than {span} frames)", index.frames < span
    elif bucket.frames > 1:
        yield f"of fewer than {rate:g} frames per second", index.frames_per_second < SLOWEST * rate
        lasts = offsets(index.frames_per_second, rate, bucket.frames - 1)
        yield f"too short ({bucket.frames} frames at {rate:g} per second)", index.frames <= lasts
        other = np.abs(index.frames_per_second - rate) > (1 - SLOWEST) * rate
        yield f"with temporally compressed latents, at another rate than {rate:g}", compressed & other
    if bucket.views > 1:
        yield f"with fewer than {bucket.views} views", index.views < bucket.views
    if cached.any():
        other_size = (index.height != bucket.height) | (index.width != bucket.width)
        yield "with cached latents of another size, which cannot be cropped", cached & other_size
        yield "with cached latents, of which no segment can be cut", cached & (bucket.segment is not None)
    if bucket.aspects is not None:
        ratio = index.width / index.height
        outside = (ratio < bucket.aspects[0]) | (ratio >= bucket.aspects[1])
        yield f"with another aspect ratio than {bucket.aspects[0]:.3g}..{bucket.aspects[1]:.3g}", outside
    if not config.upscale:
        small = (index.height < bucket.height) | (index.width < bucket.width)
        yield f"smaller than {bucket.height}x{bucket.width} (upscale = True takes them)", small
    if cached.any() and 1 not in bucket.strides and bucket.frames > 1:
        yield "with temporally compressed latents, which need stride 1", compressed
