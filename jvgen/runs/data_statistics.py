"""Statistics of a data set: a table, and one picture of all distributions."""

import dataclasses

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jvgen.data.store.index import Index
from jvgen.data.store.sources import open_source
from jvgen.data.store.statistics import Distribution, distributions, of_counts
from jvgen.data.stream.config import SourceConfig
from jvgen.data.stream.pools import bucket_pools
from jvgen.data.stream.source_filter import source_filter
from jvgen.evaluation.plots import Histogram, histograms, png_of
from jvgen.storage import Path
from jvgen.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of a split.

    Attributes:
      title: data set and number of records.
      distributions: of its columns.
    """

    title: str
    distributions: tuple[Distribution, ...]

    def print(self, console: Console) -> None:
        """Print a table: numbers with their quantiles, texts with their counts."""
        console.print(escape(self.title), soft_wrap=True, highlight=False)
        table = Table()
        for name in ("column", "records", "missing", "minimum", "5%", "median", "95%", "maximum"):
            table.add_column(name, justify="left" if name == "column" else "right")
        for one in self.distributions:
            head = escape(one.name), f"{one.records:,}", f"{one.missing:,}" if one.missing else ""
            if one.quantiles:
                table.add_row(*head, *(f"{value:.4g}" for value in one.quantiles))
            else:
                table.add_row(*head)
                for label, count in zip(one.labels, one.counts, strict=True):
                    share = f"{count / max(one.records, 1):.1%}"
                    table.add_row(f"  {escape(label)}", f"{count:,}", "", share)
        console.print(table)

    def picture(self) -> bytes:
        """All distributions as one PNG."""
        return png_of(histograms([_histogram(one) for one in self.distributions], title=self.title))


def data_statistics(
    path: str | Path, split: str = "train", where: str | None = None, experiment: Experiment | None = None
) -> Statistics:
    """Statistics of the records of a split.

    Args:
      path: data set.
      where: only records that a filter takes (`SourceConfig.where`).
      experiment: also count the records and tokens of each of its buckets, if they were read from this data set alone.

    Raises:
      ValueError: as `open_source`; a filter that does not fit, or leaves nothing.
    """
    source = open_source(path, split)
    index, chosen = source.index, SourceConfig(path=str(path), split=split, where=where)
    if where is not None:
        [(_, left_out)] = source_filter(chosen, index, ()).rejected
        index = index.take(~left_out)
    title = f"{source.folder} [{split}]: {len(index):,} records" + (f" of {len(source):,}, {where}" if where else "")
    found = distributions(index)
    if experiment is not None:
        found += _buckets(experiment, chosen, source.index)
    return Statistics(title, tuple(found))


def _buckets(experiment: Experiment, source: SourceConfig, index: Index) -> list[Distribution]:
    task, data = experiment.task.build(), experiment.data.replace(sources=(source,))
    filters = [source_filter(source, index, data.licenses)]
    records: dict[str, int] = {}
    tokens: dict[str, int] = {}
    shapes = [bucket.name for bucket in data.buckets]
    for number, bucket in enumerate(data.buckets):
        # Buckets of one shape may differ in rates, aspects or steps.
        name = bucket.name if shapes.count(bucket.name) == 1 else f"{bucket.name} (buckets.{number})"
        pools, _ = bucket_pools(data, bucket, data.sources, [index], filters)
        records[name] = sum(len(pool.rows) for pool in pools)
        tokens[name] = records[name] * task.sequence_length(bucket)
    found = [of_counts("records that fit a bucket", records)]
    return found + ([of_counts("tokens of an epoch by bucket", tokens)] if any(tokens.values()) else [])


def _histogram(one: Distribution) -> Histogram:
    missing = f", {one.missing:,} without" if one.missing else ""
    return Histogram(f"{one.name}{missing}", one.edges, one.labels, one.counts)
