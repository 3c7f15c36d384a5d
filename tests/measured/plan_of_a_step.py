"""Milliseconds that the plan of one step takes: 1024 clips from 1.3 million records, at step 0 and at step 1e12."""

import statistics
import time

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.store.strings import Strings
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.plan import Plan

RECORDS = 1_300_000


def index(count: int) -> Index:
    """Clips of 60 frames of 256x456, all of one kind."""
    values = {
        "kind": KINDS.index("dynamic"), "frames": 60, "height": 256, "width": 456, "views": 1, "captions": 1,
        "frames_per_second": 24.0, "has_camera": False, "has_action": False, "latent_frames": 0,
    }  # fmt: skip
    columns = {name: np.full(count, value) for name, value in values.items()}
    ids = Strings.of(f"clip-{number}" for number in range(count))
    return Index(id=ids, checksum=np.arange(count, dtype=np.uint64), **columns)


def milliseconds(records: int = RECORDS, repeats: int = 50) -> float:
    """The larger of the medians at the two steps."""
    bucket = BucketConfig(frames=17, height=256, width=256, batch_size=1024)
    plan = Plan(DataConfig(sources=(SourceConfig(path="x"),), buckets=(bucket,)), [index(records)], seed=0)
    medians = []
    for first in (0, 10**12):
        times = []
        for step in range(first, first + repeats):
            start = time.perf_counter()
            plan.at(step)
            times.append(time.perf_counter() - start)
        medians.append(1e3 * statistics.median(times))
    return max(medians)


if __name__ == "__main__":
    print(f"{milliseconds():.2f} ms")
