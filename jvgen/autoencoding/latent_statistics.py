"""Mean and standard deviation of cached latents, by which training normalizes them."""

import json

import numpy as np

from jvgen import storage
from jvgen.data.store.sources import open_source, splits
from jvgen.models.image_vae.posterior import LOG_VARIANCE_RANGE

NAME = "latent_statistics.json"  # beside the data set
MAX_RECORDS = 1024


def latent_statistics(folder: str | storage.Path) -> dict[str, float]:
    """Mean and standard deviation ("deviation") over all elements of sampled latents, whoever encoded them and when.

    Of a large data set 1,024 records count, evenly spaced.

    Args:
      folder: data set of latents.

    Raises:
      ValueError: no data set, or one without latents.
    """
    sources = [open_source(folder, split) for split in splits(folder)]
    borders = np.cumsum([0, *map(len, sources)])
    chosen = np.linspace(0, borders[-1] - 1, min(borders[-1], MAX_RECORDS)).round().astype(int)
    count, total, squares = 0, 0.0, 0.0
    for number in chosen.tolist():
        split = int(np.searchsorted(borders, number, side="right")) - 1
        latents = sources[split].read(number - int(borders[split])).latents
        mean, log_variance = np.split(latents.astype(np.float64), 2, axis=-1)
        count += mean.size
        total += mean.sum()
        squares += (mean**2 + np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE))).sum()
    if not count:
        raise ValueError(f"{folder}: has no latents.")
    mean = float(total / count)
    return {"mean": mean, "deviation": max(float(squares / count) - mean**2, 0.0) ** 0.5}


def write_latent_statistics(folder: str | storage.Path) -> dict[str, float]:
    """Write the statistics of a data set into its folder, and return them."""
    statistics = latent_statistics(folder)
    storage.write_text(storage.as_path(folder) / NAME, json.dumps(statistics, indent=1))
    return statistics
