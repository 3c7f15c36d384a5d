"""Metrics from devices to Python numbers, one step at a time or accumulated over batches."""

import jax
import numpy as np

from jvgen.tasks.task import CodeUse, Mean, Metrics

_OF_COUNTS = ("codes_used", "perplexity")


def to_host(metrics: Metrics) -> dict[str, float]:
    """Wait for metrics and return them as Python numbers; those with count 0 are left out."""
    values: dict[str, float] = {}
    for name, metric in jax.device_get(dict(metrics)).items():
        if isinstance(metric, CodeUse):
            if np.any(metric.counts):
                values |= {f"{name}/{what}": value for what, value in metric.summary().items()}
        elif isinstance(metric, Mean):
            if float(metric.count) > 0:
                values[name] = float(metric.total) / float(metric.count)
        elif np.issubdtype(np.asarray(metric).dtype, np.integer):
            values[name] = int(metric)
        else:
            values[name] = float(metric)
    return values


def result_names(metrics: Metrics) -> list[str]:
    """Names of the numbers that metrics, or their shapes, become."""
    return [
        full
        for name, metric in metrics.items()
        for full in ([f"{name}/{what}" for what in _OF_COUNTS] if isinstance(metric, CodeUse) else [name])
    ]


class RunningMeans:
    """Metrics over batches: a `Mean` is weighted by its count, `CodeUse` are added up, others count once per batch."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._codes: dict[str, np.ndarray] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of one batch (waits for them)."""
        for name, metric in jax.device_get(dict(metrics)).items():
            if isinstance(metric, CodeUse):
                self._codes[name] = self._codes.get(name, 0.0) + np.asarray(metric.counts, np.float64)
                continue
            total, count = (metric.total, metric.count) if isinstance(metric, Mean) else (metric, 1)
            self._totals[name] = self._totals.get(name, 0.0) + float(total)
            self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def result(self) -> dict[str, float]:
        """The means, and what counts of codes stand for; metrics with count 0 are left out."""
        means = {name: self._totals[name] / count for name, count in self._counts.items() if count > 0}
        return means | to_host({name: CodeUse(counts) for name, counts in self._codes.items()})
