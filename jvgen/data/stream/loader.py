"""The stream of batches: Grain reads, decodes and prefetches what the plan names, one element a step."""

import copy
import dataclasses
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from jvgen.data.store.sources import open_source
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.plan import Plan
from jvgen.data.stream.quarantine import Quarantine, host_log
from jvgen.data.stream.reader import BatchReader, Prepare

# Steps are counted up to here when no end is given; Python's ranges must fit a machine word.
_ENDLESS = 2**62


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """This host's part of one global batch.

    Attributes:
      step: the training step that it belongs to.
      bucket: its shape; every host has the same bucket at a step.
      arrays: prepared arrays by name, stacked over the host's contiguous slots.
      record_ids: ids of the records, one a slot (of the substitute where a record could not be decoded).
      read_seconds: how long the consumer waited for it.
      substitutes: how many slots hold a substitute.
    """

    step: int
    bucket: BucketConfig
    arrays: dict[str, np.ndarray]
    record_ids: tuple[str, ...]
    read_seconds: float
    substitutes: int = 0


class Loader:
    """Batches of a run by step: the same for any number of hosts, workers and threads, from any step on.

    Args:
      config: what to read.
      seed: of the run.
      prepare: turns an example (`jvgen.data.stream.transforms.load_example`) into named arrays, the same shapes for
        every example of a bucket. With workers it is pickled, and it must not touch a device.
      host, hosts: this process reads slots [host * B / hosts, (host + 1) * B / hosts) of every batch of B.
      evaluation: read `config.evaluation_sources` in a fixed order instead.
      quarantine_log: JSON-lines file of records that could not be decoded; with several hosts each has its own.

    Raises:
      ValueError: a data set that cannot be opened, a bucket that cannot be filled, a batch that the hosts cannot share.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        prepare: Prepare,
        host: int = 0,
        hosts: int = 1,
        evaluation: bool = False,
        quarantine_log: Path | None = None,
    ):
        assert 0 <= host < hosts
        for number, bucket in enumerate(config.buckets):
            if bucket.batch_size % hosts:
                raise ValueError(
                    f"buckets.{number}.batch_size = {bucket.batch_size}: does not divide over {hosts} hosts; "
                    f"take a multiple of {hosts}."
                )
        # Evaluation is short and begins again and again: starting processes for it takes longer than reading.
        self.config = config.replace(workers=0) if evaluation else config
        sources = [open_source(s.path, s.split) for s in (config.evaluation_sources if evaluation else config.sources)]
        self.plan = Plan(config, [source.index for source in sources], seed, evaluation=evaluation)
        log = None if quarantine_log is None else host_log(Path(quarantine_log), host, hosts)
        self._reader = BatchReader(
            plan=self.plan,
            sources=sources,
            prepare=prepare,
            resize=config.resize,
            host=host,
            hosts=hosts,
            threads=config.threads,
            quarantine=Quarantine(log, config.error_budget),
        )

    @property
    def buckets(self) -> tuple[BucketConfig, ...]:
        """The shapes that batches come in."""
        return self.plan.buckets

    def bucket(self, step: int) -> BucketConfig:
        """The shape of a step's batch."""
        return self.plan.bucket(step)

    def batches(self, start_step: int, stop_step: int | None = None) -> "Batches":
        """Batches of steps [start_step, stop_step), or without end. Close it, or use it as a context manager."""
        return Batches(self._reader, self.config, start_step, _ENDLESS if stop_step is None else stop_step)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to continue with batch `step`: the step and two hashes."""
        return {"step": step, "manifest": self.plan.manifest, "plan": self.plan.digest}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Check that the stream which stored `saved` had the same batches as this one.

        Raises:
          ValueError: the data sets hold other records, or the plan is another.
        """
        if saved["manifest"] != self.plan.manifest:
            paths = ", ".join(f"{source.path} [{source.split}]" for source in self.plan.sources)
            raise ValueError(
                f"data.sources ({paths}): hold other records than when the checkpoint was saved (manifest "
                f"{self.plan.manifest[:12]}, saved {saved['manifest'][:12]}), so the run cannot continue where it was. "
                "Point sources at the same data sets, in the same order, or start a new run from these weights."
            )
        if saved["plan"] != self.plan.digest:
            raise ValueError(
                f"data (buckets, weights, kinds, resize, upscale, flip) or seed: differ from the checkpoint's (plan "
                f"{self.plan.digest[:12]}, saved {saved['plan'][:12]}), so the same step has another batch. Restore "
                "them, or start a new run from these weights."
            )


class Batches(Iterator[LoadedBatch]):
    """Iterator over batches that owns threads, and processes if there are workers, until it is closed."""

    def __init__(self, reader: BatchReader, config: DataConfig, start: int, stop: int):
        self._plan, self._workers = reader.plan, config.workers > 0
        reader = copy.copy(reader)  # threads of its own: another iterator of the same loader may be closed meanwhile
        # In a list that closing empties: Grain's iterators complain when they die after the modules that they use.
        self._iterators = [iter(_dataset(_Steps(reader, start, stop), config))]
        self._close = weakref.finalize(self, _close, self._iterators, reader, config.workers)

    def __next__(self) -> LoadedBatch:
        if not self._iterators:
            raise StopIteration
        began = time.perf_counter()
        element = next(self._iterators[0])
        waited = time.perf_counter() - began
        return LoadedBatch(
            step=element["step"],
            bucket=self._plan.bucket(element["step"]),
            # Arrays from a worker lie in shared memory that closing would take away.
            arrays={name: np.array(array, copy=self._workers or None) for name, array in element["arrays"].items()},
            record_ids=tuple(element["record_ids"]),
            read_seconds=waited,
            substitutes=element["substitutes"],
        )

    def close(self) -> None:
        """Stop reading ahead and release threads, processes and shared memory. Harmless when repeated."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps:
    """A random-access sequence of steps, as Grain wants it."""

    def __init__(self, read: Callable[[int], dict[str, Any]], start: int, stop: int):
        assert 0 <= start <= stop
        self._read, self._start, self._stop = read, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self._start + int(index))


def _dataset(steps: _Steps, config: DataConfig) -> grain.IterDataset:
    # Otherwise Grain ends every error message with advice about a flag that `jvgen` does not have.
    grain.config.update("py_traceback_filtering", "off")
    # Grain's threads put batches together and mostly wait: the reader's own threads, shared by all batches in order,
    # decode. So the first batch comes as soon as all threads can make it.
    each = config.prefetch if not config.workers else max(1, -(-config.prefetch // config.workers) // 2)
    dataset = grain.MapDataset.source(steps).to_iter_dataset(
        grain.ReadOptions(num_threads=each, prefetch_buffer_size=each)
    )
    if not config.workers:
        return dataset
    if not flags.FLAGS.is_parsed():
        # Grain reads an absl flag there, and absl refuses before flags were parsed, which is for programs to do.
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=each))


def _close(iterators: list[grain.DatasetIterator], reader: BatchReader, workers: int) -> None:
    iterators[0].close()
    iterators.clear()
    reader.close()
    if workers:
        # The last arrays of each worker hang on frames of Grain's StopIteration, in a cycle that keeps their memory.
        gc.collect()
