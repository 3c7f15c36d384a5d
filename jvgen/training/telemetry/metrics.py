"""Metrics from devices to Python numbers, one step at a time or averaged over batches."""

import jax
import numpy as np

from jvgen.tasks.task import Mean, Metrics


def to_host(metrics: Metrics) -> dict[str, float]:
    """Wait for metrics and return them as Python numbers; a `Mean` with count 0 is left out."""
    values: dict[str, float] = {}
    for name, metric in jax.device_get(dict(metrics)).items():
        if isinstance(metric, Mean):
            if float(metric.count) > 0:
                values[name] = float(metric.total) / float(metric.count)
        elif np.issubdtype(np.asarray(metric).dtype, np.integer):
            values[name] = int(metric)
        else:
            values[name] = float(metric)
    return values


class RunningMeans:
    """Means of metrics over batches: a `Mean` is weighted by its count, other metrics count once per batch."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of one batch (waits for them)."""
        for name, metric in jax.device_get(dict(metrics)).items():
            total, count = (metric.total, metric.count) if isinstance(metric, Mean) else (metric, 1)
            self._totals[name] = self._totals.get(name, 0.0) + float(total)
            self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def result(self) -> dict[str, float]:
        """The means; metrics with count 0 are left out."""
        return {name: self._totals[name] / count for name, count in self._counts.items() if count > 0}
