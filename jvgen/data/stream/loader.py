"""The stream of batches: Grain reads, decodes and prefetches the records of the plan, one element per step."""

import copy
import dataclasses
import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from jvgen.data.store.index_files import verify_index
from jvgen.data.store.sources import Source, open_source
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.plan import Plan
from jvgen.data.stream.quarantine import Quarantine
from jvgen.data.stream.reader import BatchReader, Preprocess
from jvgen.storage import Path, as_path

# The stop step when none is given; `len` of a sequence must fit in 64 bits.
_ENDLESS = 2**62


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """The rows of one global batch that this process reads. A slot is the index of an example in the global batch.

    Attributes:
      step: training step.
      bucket: shape of the batch; the same for every process at a step.
      arrays: preprocessed arrays by name, stacked over the slots of the process.
      record_ids: ids of the records, one per slot of the process (of the substitute where a record could not be
        decoded).
      read_seconds: time that the consumer waited for the batch.
      substitutes: number of slots filled by a substitute.
      slots: the slots of the process, increasing, int64; another process may read some of them too.
      facts: numbers for the step's row of metrics.jsonl (of an episode that ended).
    """

    step: int
    bucket: BucketConfig
    arrays: dict[str, np.ndarray]
    record_ids: tuple[str, ...]
    read_seconds: float
    substitutes: int = 0
    slots: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Loader:
    """Batches of a run by step: the same for any number of processes, workers and threads, and from any start step.

    Args:
      config: sources and buckets.
      seed: seed of the run.
      preprocess: maps an example (`jvgen.data.stream.transforms.load_example`) to named arrays, with the same shapes
        for every example of a bucket. With workers it is pickled, and it must not use a device.
      rows: bucket -> the slots that this process reads, increasing (`Program.rows`); None for all of them.
      evaluation: read `config.evaluation_sources` in a fixed order instead.
      quarantine_log: JSON-lines file of records that could not be decoded, of this process alone.

    Raises:
      ValueError: a data set that cannot be opened, a bucket that cannot be filled.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        preprocess: Preprocess,
        rows: Callable[[BucketConfig], np.ndarray] | None = None,
        evaluation: bool = False,
        quarantine_log: Path | None = None,
    ):
        # Evaluation is short and repeated: starting workers would take longer than reading.
        self.config, self._evaluation = config.replace(workers=0) if evaluation else config, evaluation
        chosen, cache = config.evaluation_sources if evaluation else config.sources, config.cache()
        sources = [open_source(source.path, source.split, cache) for source in chosen]
        for source in sources:
            verify_index(source.index)
        self.plan = Plan(config, [source.index for source in sources], seed, evaluation=evaluation)
        rows = _all_rows if rows is None else rows
        log = None if quarantine_log is None else as_path(quarantine_log)
        self._reader = BatchReader(
            plan=self.plan,
            sources=sources,
            preprocess=preprocess,
            resize=config.resize,
            # Resolved here: what goes to workers knows no devices.
            slots={bucket: rows(bucket) for bucket in self.plan.buckets},
            threads=config.threads,
            quarantine=Quarantine(log, config.error_budget),
            quarantine_failed_reads=config.on_failed_read == "quarantine",
        )

    @property
    def buckets(self) -> tuple[BucketConfig, ...]:
        """The batch shapes in use."""
        return self.plan.buckets

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets, in the order of the configuration."""
        return self._reader.sources

    def bucket(self, step: int) -> BucketConfig:
        """The shape of a step's batch."""
        return self.plan.bucket(step)

    def record_ids(self, step: int) -> tuple[str, ...]:
        """Ids of the records that the plan puts into the whole global batch of a step; nothing is read."""
        planned = self.plan.at(step)
        indices = [source.index for source in self.sources]
        return tuple(
            str(indices[source].id[row])
            for source, row in zip(planned.source.tolist(), planned.row.tolist(), strict=True)
        )

    def batches(self, start_step: int, stop_step: int | None = None) -> "Batches":
        """Batches of steps [start_step, stop_step), endless without a stop. Close it or use it in a `with` block."""
        if not self._evaluation:
            for source in self._reader.sources:
                source.read_ahead()
            self._reader.quarantine.read_before(self.plan.samples_before(start_step))
        return Batches(self._reader, self.config, start_step, _ENDLESS if stop_step is None else stop_step)

    def state(self, step: int) -> dict[str, Any]:
        """The state to checkpoint for resuming at batch `step`: the step, digests, and licenses that are allowed."""
        licenses = {} if self.plan.licenses is None else {"licenses": self.plan.licenses}
        return {"step": step, "manifest": self.plan.manifest, "plan": self.plan.digest, **licenses}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Check that the stream which saved this state had the same batches.

        Raises:
          ValueError: the records of the data sets or the plan differ.
        """
        if saved["manifest"] != self.plan.manifest:
            paths = ", ".join(f"{source.path} [{source.split}]" for source in self.plan.sources)
            raise ValueError(
                f"data.sources ({paths}): hold other records than when the checkpoint was saved (manifest "
                f"{self.plan.manifest[:12]}, saved {saved['manifest'][:12]}), so the run cannot resume. "
                "Point sources at the same data sets, in the same order, start a new run from these weights "
                "(init_from.run), or pass --allow-changes."
            )
        if saved["plan"] != self.plan.digest:
            raise ValueError(
                "data (buckets, weights, kinds, filters, captions, resize, upscale, flip, augmentation) or seed: "
                f"differ from the checkpoint's (plan {self.plan.digest[:12]}, saved {saved['plan'][:12]}), so the same "
                "step has another batch. Restore the old values, start a new run from these weights (init_from.run), "
                "or pass --allow-changes."
            )

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint's state. Nothing to do: batches are functions of the step."""


class Batches(Iterator[LoadedBatch]):
    """Iterator over batches. Owns its threads, and its workers if there are any, until it is closed."""

    def __init__(self, reader: BatchReader, config: DataConfig, start: int, stop: int):
        self._plan, self._slots, self._workers = reader.plan, reader.slots, config.workers > 0
        reader = copy.copy(reader)  # own threads: another iterator of the same loader may be closed earlier
        # In a list that close() empties: Grain's iterators must be destroyed before interpreter shutdown.
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
            # Arrays of a worker are in shared memory, which close() releases.
            arrays={name: np.array(array, copy=self._workers or None) for name, array in element["arrays"].items()},
            record_ids=tuple(element["record_ids"]),
            read_seconds=waited,
            substitutes=element["substitutes"],
            slots=self._slots[self._plan.bucket(element["step"])],
        )

    def close(self) -> None:
        """Stop reading ahead and release threads, workers and shared memory. Idempotent."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _all_rows(bucket: BucketConfig) -> np.ndarray:
    return np.arange(bucket.batch_size)


class _Steps:
    """Random-access sequence of steps, as Grain's sources are."""

    def __init__(self, read: Callable[[int], dict[str, Any]], start: int, stop: int):
        assert 0 <= start <= stop
        self._read, self._start, self._stop = read, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self._start + int(index))


def _dataset(steps: _Steps, config: DataConfig) -> grain.IterDataset:
    # Otherwise Grain appends advice about a flag that `jvgen` does not have to every error message.
    grain.config.update("py_traceback_filtering", "off")
    # Grain's threads assemble batches and mostly wait. The reader's threads decode, shared by all batches in order, so
    # all of them work on the first batch.
    each = config.prefetch if not config.workers else max(1, -(-config.prefetch // config.workers) // 2)
    dataset = grain.MapDataset.source(steps).to_iter_dataset(
        grain.ReadOptions(num_threads=each, prefetch_buffer_size=each)
    )
    if not config.workers:
        return dataset
    if not flags.FLAGS.is_parsed():
        # Grain reads an absl flag, which absl allows only after flags are parsed.
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=each))


def _close(iterators: list[grain.DatasetIterator], reader: BatchReader, workers: int) -> None:
    iterators[0].close()
    iterators.clear()
    reader.close()
    if workers:
        # Frames of Grain's StopIteration keep the last arrays of each worker alive in a reference cycle.
        gc.collect()
