"""The plan: which records, and which part of each, make the batch of a step. A pure function of (seed, step)."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.stream import counter
from jvgen.data.stream.augment import NUMBERS, Augmentation
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.mixture import Quota, check_kind_weights, pool_weights
from jvgen.data.stream.pools import Census, Pool, bucket_pools, explain
from jvgen.data.stream.stages import BucketTurns

# Raise it with every change that makes the same configuration name other batches: old checkpoints then say so.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The records of one global batch: slot i is record `row[i]` of source `source[i]`.

    Attributes:
      step: the training step.
      bucket: shape of the batch.
      bucket_index: its place in `DataConfig.buckets`.
      source, row: int64 (batch_size,).
    """

    step: int
    bucket: BucketConfig
    bucket_index: int
    source: np.ndarray
    row: np.ndarray

    @property
    def slots(self) -> tuple[np.ndarray, np.ndarray]:
        """(source, row)."""
        return self.source, self.row


@dataclasses.dataclass(frozen=True)
class Sample:
    """Which part of a record is used.

    Attributes:
      start: first frame.
      stride: distance between the frames kept.
      views: which cameras of the record, as many as the bucket has.
      crop_y, crop_x: where the crop lies in the room that it has, from 0 (top, left) up to 1.
      flip: whether the clip is mirrored left to right.
      caption: which caption; -1 when the record has none.
      frames: numbers of the frames, where these are not those from `start` on in steps of `stride`.
      augmentation: what is done to the frames; None for nothing.
      seed: of what a task draws on the host for this sample.
    """

    start: int
    stride: int
    views: tuple[int, ...]
    crop_y: float
    crop_x: float
    flip: bool
    caption: int
    frames: tuple[int, ...] | None = None
    augmentation: Augmentation | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A bucket with its pools laid end to end."""

    index: int
    config: BucketConfig
    quota: Quota
    sources: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    keys: np.ndarray
    rows: np.ndarray


class Plan:
    """Batches by step, in O(1) at any step and in any order of asking.

    A step's bucket, and within a bucket each sample's pool (source and kind), follow fixed quotas, so how many samples
    a pool gave before a step is known in closed form. A pool's rows come in a pseudo-random permutation of their own
    in each epoch: every row once before any row twice, without end.

    With `evaluation`, sources are `config.evaluation_sources`, rows come in recorded order, windows and crops are the
    middle ones, the first caption is used and nothing is mirrored: the same batches for every seed. Buckets that no
    evaluation source can fill are left out.

    Attributes:
      buckets: the buckets in use, in the order of the configuration.
      digest: changes when the same step might name other rows or other parts of them.
      manifest: digest of the indices of all sources: changes when the records do.

    Raises:
      ValueError: a bucket that cannot be filled, a source that fills none; with the counts of the reasons.
    """

    def __init__(self, config: DataConfig, indices: Sequence[Index], seed: int, *, evaluation: bool = False):
        self.sources: tuple[SourceConfig, ...] = config.evaluation_sources if evaluation else config.sources
        assert len(indices) == len(self.sources), f"{len(indices)} indices for {len(self.sources)} sources"
        check_kind_weights(config.kind_weights)
        self.seed = 0 if evaluation else seed
        self.evaluation = evaluation
        self._mirror = config.flip and not evaluation
        self._augmentation = None if evaluation else config.augmentation
        # Only the columns that windows are drawn from: a plan is sent to worker processes, ids would be most of it.
        self._columns = [
            {
                "frames": index.frames,
                "views": index.views,
                "captions": index.captions,
                "compressed": (index.latent_frames != 0) & (index.latent_frames != index.frames),
                "as_it_is": index.has_camera | (index.latent_frames > 0),
                "mirrored": ~(index.has_camera | index.has_action | (index.latent_frames > 0)),
            }
            for index in indices
        ]
        found = [bucket_pools(config, bucket, self.sources, indices) for bucket in config.buckets]
        self._census: list[list[Census]] = [census for _, census in found]
        self._pools: list[list[Pool]] = [pools for pools, _ in found]
        self._all_buckets = config.buckets
        self.validate()
        self._buckets = [
            self._bucket(index, config) for index, pools in enumerate(self._pools) if pools or not evaluation
        ]
        self.buckets: tuple[BucketConfig, ...] = tuple(bucket.config for bucket in self._buckets)
        self._bucket_turns = BucketTurns(self.buckets, always=evaluation)
        self.manifest = _sha256([index.digest for index in indices])
        self.digest = self._digest(config)

    def validate(self) -> None:
        """Check that every bucket can be filled and every source is used; the constructor calls this.

        Raises:
          ValueError: names the bucket, the sources, and how many records were turned away for which reason.
        """
        field = "evaluation_sources" if self.evaluation else "sources"
        if not self.sources:
            raise ValueError(f"{field} = (): name at least one data set, or do without this stream.")
        for index, (bucket, pools, census) in enumerate(zip(self._all_buckets, self._pools, self._census, strict=True)):
            rows = sum(len(pool.rows) for pool in pools)
            if not self.evaluation and rows < bucket.batch_size:
                problem = "cannot be filled by any source" if not rows else f"has only {rows} records for a batch"
                raise ValueError(
                    f"buckets.{index} ({bucket.name}, batch_size {bucket.batch_size}) {problem}.\n"
                    f"{explain(field, self.sources, bucket, census)}\n"
                    "Change the bucket (frames, strides, size, batch_size, kinds) or add a source that fits."
                )
        used = {pool.source for pools in self._pools for pool in pools}
        for source, config in enumerate(self.sources):
            if source not in used:
                lines = [
                    explain(field, self.sources, bucket, [census[source]])
                    for bucket, census in zip(self._all_buckets, self._census, strict=True)
                ]
                raise ValueError(
                    f"{field}.{source} ({config.path} [{config.split}]) has no record for any bucket.\n"
                    + "\n".join(lines)
                    + "\nLeave the source out, or add a bucket that it fits."
                )

    def at(self, step: int) -> StepPlan:
        """The global batch of a step."""
        bucket, turns = self._turn(step)
        pool, row = self._rows(bucket, turns)
        return StepPlan(step, bucket.config, bucket.index, bucket.sources[pool], row)

    def bucket(self, step: int) -> BucketConfig:
        """The shape of a step's batch."""
        return self._buckets[self._bucket_turns.at(step)[0]].config

    def substitute(self, step: int, slot: int, attempt: int) -> tuple[int, int] | None:
        """(source, row) that stands in for a slot's record when it and `attempt - 1` substitutes cannot be decoded.

        Of the same pool, in a fixed pseudo-random order that reaches every row of it; None when there are no more.
        """
        assert attempt >= 1
        bucket, turns = self._turn(step, np.array([slot]))
        pool, row = self._rows(bucket, turns, attempt)
        if attempt > int(bucket.sizes[pool[0]]):
            return None
        return int(bucket.sources[pool[0]]), int(row[0])

    def sample(self, step: int, slot: int, attempt: int = 0) -> Sample:
        """Which part of a slot's record is used; with `attempt`, of the substitute of that number."""
        if attempt:
            place = self.substitute(step, slot, attempt)
            assert place is not None, f"slot {slot} of step {step} has fewer than {attempt} substitutes"
            return self.draw(step, slot, attempt, *place)
        bucket, turns = self._turn(step, np.array([slot]))
        pool, row = self._rows(bucket, turns)
        return self.draw(step, slot, 0, int(bucket.sources[pool[0]]), int(row[0]))

    def draw(self, step: int, slot: int, attempt: int, source: int, row: int) -> Sample:
        """As `sample`, for a caller who knows the slot's source and row from `at` or `substitute`."""
        bucket = self.bucket(step)
        columns = {name: column[row] for name, column in self._columns[source].items()}
        frames, views, captions = int(columns["frames"]), int(columns["views"]), int(columns["captions"])
        if self.evaluation:
            numbers = np.array([0.0, 0.5, 0.5, 0.5, 1.0, 0.0])
            chosen = tuple(range(bucket.views))
        else:
            more = NUMBERS + bucket.frames if self._augmentation or bucket.segment else 0
            numbers = counter.uniforms(6 + bucket.views + more, self.seed, step, slot, attempt)
            chosen = _choose(views, numbers[6 : 6 + bucket.views])
        by_source = self.sources[source].step
        strides = [by_source * n for n in bucket.strides if (bucket.horizon - 1) * by_source * n < frames]
        strides = strides or [(frames - 1) // max(bucket.horizon - 1, 1)]
        stride = strides[int(numbers[0] * len(strides))]
        start = int(numbers[1] * (frames - (bucket.horizon - 1) * stride))
        further = numbers[6 + bucket.views :]
        augmentation = None
        if self._augmentation is not None and not columns["as_it_is"]:
            augmentation = Augmentation(self._augmentation, tuple(further[:NUMBERS].tolist()))
        if columns["compressed"]:
            # Latents that merge frames are exact only from the first frame on, one after the other.
            start, stride = 0, 1
        return Sample(
            start=start,
            stride=stride,
            views=chosen,
            crop_y=float(numbers[2]),
            crop_x=float(numbers[3]),
            flip=self._mirror and bool(columns["mirrored"]) and bool(numbers[4] < 0.5),
            caption=int(numbers[5] * captions) if captions else -1,
            frames=bucket.segment and bucket.segment.frames(bucket.frames, start, stride, further[NUMBERS:]),
            augmentation=augmentation,
            seed=0 if self.evaluation else counter.fold(self.seed, step, slot, attempt),
        )

    def records(self, bucket: int) -> dict[tuple[str, str], int]:
        """How many records may fill a bucket in use, by (source path, kind)."""
        pools = self._pools[self._buckets[bucket].index]
        return {(self.sources[pool.source].path, KINDS[pool.kind]): len(pool.rows) for pool in pools}

    def _bucket(self, index: int, config: DataConfig) -> _Bucket:
        pools = self._pools[index]
        members = [(pool.source, pool.kind) for pool in pools]
        weights = pool_weights(members, [source.weight for source in self.sources], config.kind_weights)
        sizes = np.array([len(pool.rows) for pool in pools], np.int64)
        keys = [counter.fold(self.seed, index, pool.source, pool.kind) for pool in pools]
        return _Bucket(
            index=index,
            config=config.buckets[index],
            quota=Quota(weights),
            sources=np.array([pool.source for pool in pools], np.int64),
            sizes=sizes,
            offsets=np.cumsum(sizes) - sizes,
            keys=np.array(keys, np.uint64),
            rows=np.concatenate([pool.rows for pool in pools]),
        )

    def _turn(self, step: int, slots: np.ndarray | None = None) -> tuple[_Bucket, np.ndarray]:
        """The bucket of a step, and the numbers, among all its samples ever, of some slots (or all)."""
        member, before = self._bucket_turns.at(step)
        bucket = self._buckets[member]
        if slots is None:
            slots = np.arange(bucket.config.batch_size)
        assert np.all((slots >= 0) & (slots < bucket.config.batch_size))
        return bucket, before * bucket.config.batch_size + slots

    def _rows(self, bucket: _Bucket, turns: np.ndarray, attempt: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Pool and row, int64, of some of the bucket's samples (or of their substitutes)."""
        pool, ordinal = bucket.quota.at(turns)
        sizes = bucket.sizes[pool]
        epoch, position = np.divmod(ordinal, sizes)
        if attempt:
            # Another permutation than any epoch's, so that the neighbours of a slot are no more likely than others.
            keys = counter.fold_array(~bucket.keys[pool], epoch)
            position = counter.permute((position + attempt - 1) % sizes, sizes, keys)
        elif not self.evaluation:
            position = counter.permute(position, sizes, counter.fold_array(bucket.keys[pool], epoch))
        return pool, bucket.rows[bucket.offsets[pool] + position].astype(np.int64)

    def _digest(self, config: DataConfig) -> str:
        # Not the paths: a data set may move. What it holds is the manifest's business.
        sources = [{"weight": source.weight, "kinds": list(source.kinds)} for source in self.sources]
        buckets = [dataclasses.asdict(bucket) for bucket in config.buckets]
        fields = {name: getattr(config, name) for name in ("kind_weights", "resize", "upscale", "flip")}
        # Fields that came later count only where they are used: the plans of older runs are still what they were.
        for source, said in zip(self.sources, sources, strict=True):
            said |= {"step": source.step} if source.step != 1 else {}
        for said in buckets:
            for name, unused in (("segment", None), ("begins", 0), ("ends", None)):
                if said[name] == unused:
                    del said[name]
        if config.augmentation is not None:
            fields["augmentation"] = dataclasses.asdict(config.augmentation)
        return _sha256({"version": VERSION, "seed": self.seed, "sources": sources, "buckets": buckets, **fields})


def _choose(views: int, numbers: np.ndarray) -> tuple[int, ...]:
    """The first `len(numbers)` members of a random order of 0..views-1."""
    order = list(range(views))
    for place, number in enumerate(numbers):
        other = place + int(number * (views - place))
        order[place], order[other] = order[other], order[place]
    return tuple(order[: len(numbers)])


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
