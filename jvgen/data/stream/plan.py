"""The plan: which records, and which part of each, make the batch of a step. A pure function of (seed, step)."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jvgen.data.store.index import Index
from jvgen.data.store.records import KINDS
from jvgen.data.stream import counter, exclusions
from jvgen.data.stream.augment import UNIFORMS, Augmentation
from jvgen.data.stream.captions import UNIFORMS as CAPTION_UNIFORMS
from jvgen.data.stream.captions import CaptionDraw, check_caption_names
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig, weight_at
from jvgen.data.stream.frame_times import offsets
from jvgen.data.stream.mixture import StagedInterleave, check_kind_weights, pool_weights
from jvgen.data.stream.pools import FilterStats, Pool, bucket_pools, explain
from jvgen.data.stream.shared_rows import SharedRows
from jvgen.data.stream.source_filter import SourceFilter, license_counts, source_filter
from jvgen.data.stream.stages import BucketSchedule

# Increment with every change that gives the same configuration other batches; old checkpoints then refuse to resume.
VERSION = 1
# Fields of a bucket that digests contain under their names of version 0.1.0.
_DIGEST_NAMES = {"start_step": "begins", "end_step": "ends"}
# Fields of a bucket that 0.1.0 or earlier versions did not have, and what they are when they are not used.
_UNUSED = {"segment": None, "begins": 0, "ends": None, "frames_per_second": None, "aspects": None}
_CAPTIONS = 0x63617074696F6E73  # tells the numbers of captions from those of clips


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The records of one global batch: slot i, its i-th example, is record `row[i]` of source `source[i]`.

    Attributes:
      step: training step.
      bucket: shape of the batch.
      bucket_index: its index in `DataConfig.buckets`.
      source, row: int64 (batch_size,).
    """

    step: int
    bucket: BucketConfig
    bucket_index: int
    source: np.ndarray
    row: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """The part of a record that makes an example.

    Attributes:
      start: first frame.
      stride: frame stride.
      views: views of the record, as many as the bucket has.
      crop_y, crop_x: position of the crop, from 0 (top, left) up to 1 (bottom, right).
      flip: flip the clip horizontally.
      caption: index of the caption; -1 when the record has none.
      frames: frame numbers of a segment; None for the frames from `start` on at `stride`.
      frames_per_second: take the frames from `start` on at this rate, not at `stride`; None for the stride.
      caption_draw: draw the caption by these weights; None for the caption of that index.
      augmentation: None to disable.
      seed: seed for random numbers of the task's preprocessing.
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
    frames_per_second: float | None = None
    caption_draw: CaptionDraw | None = None


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A bucket with its pools: pool p has the rows in `rows[p]`, or all `sizes[p]` of its source."""

    index: int
    config: BucketConfig
    order: StagedInterleave
    sources: np.ndarray
    kinds: tuple[int, ...]
    sizes: np.ndarray
    keys: np.ndarray
    rows: tuple[SharedRows | None, ...]


class Plan:
    """Batches by step, in O(1) for any step.

    Buckets over steps, and pools (source, kind) over the samples of a bucket, are interleaved by weighted round robin,
    so the number of samples of a pool before any step is known in closed form. The rows of a pool are visited in a new
    pseudo-random permutation in each epoch: every row once before any row twice.

    With `evaluation`, sources are `config.evaluation_sources`, rows come in recorded order, windows and crops are
    centered, the first caption is used, and clips are neither flipped nor augmented: the same batches for every seed.
    Buckets that no evaluation source can fill are left out.

    Attributes:
      buckets: the buckets in use, in the order of the configuration.
      digest: changes when a step may have other rows or other parts of them.
      manifest: digest of the indices of all sources; changes when the records do.
      licenses: records that the run may use of each license that it allows; None if it allows all.

    Raises:
      ValueError: a bucket that cannot be filled or a source that fits no bucket, with the number of rejected records
        by reason.
    """

    def __init__(self, config: DataConfig, indices: Sequence[Index], seed: int, *, evaluation: bool = False):
        self.sources: tuple[SourceConfig, ...] = config.evaluation_sources if evaluation else config.sources
        assert len(indices) == len(self.sources), f"{len(indices)} indices for {len(self.sources)} sources"
        check_kind_weights(config.kind_weights)
        self.seed = 0 if evaluation else seed
        self.evaluation = evaluation
        self._flip = config.flip and not evaluation
        self._captions = config.captions
        check_caption_names(config.captions, indices)
        self._augmentation = None if evaluation else config.augmentation
        # Mapped into memory, and opened again by workers.
        self._indices = tuple(indices)
        filters = [
            source_filter(source, index, config.licenses) for source, index in zip(self.sources, indices, strict=True)
        ]
        self.licenses = license_counts(self.sources, indices, filters, config.licenses) if config.licenses else None
        found = [bucket_pools(config, bucket, self.sources, indices, filters) for bucket in config.buckets]
        self._filter_stats: list[list[FilterStats]] = [stats for _, stats in found]
        self._pools: list[list[Pool]] = [pools for pools, _ in found]
        del found
        self._all_buckets = config.buckets
        self.validate()
        used = [index for index, pools in enumerate(self._pools) if pools or not evaluation]
        self.buckets: tuple[BucketConfig, ...] = tuple(config.buckets[index] for index in used)
        self._schedule = BucketSchedule(self.buckets, always=evaluation)
        self._buckets = [self._bucket(place, index, config) for place, index in enumerate(used)]
        del self._pools  # the rows are in the buckets
        self.manifest = _sha256([index.digest for index in indices])
        self.digest = self._digest(config, filters)

    def validate(self) -> None:
        """Check that every bucket can be filled and every source is used; the constructor calls this.

        Raises:
          ValueError: names the bucket, the sources, and the number of rejected records by reason.
        """
        field = "evaluation_sources" if self.evaluation else "sources"
        if not self.sources:
            raise ValueError(f"{field} = (): add at least one data set, or disable this stream.")
        for index, (bucket, pools, stats) in enumerate(
            zip(self._all_buckets, self._pools, self._filter_stats, strict=True)
        ):
            rows = sum(len(pool.rows) for pool in pools)
            if not self.evaluation and rows < bucket.batch_size:
                problem = "cannot be filled by any source" if not rows else f"has only {rows} records for a batch"
                raise ValueError(
                    f"buckets.{index} ({bucket.name}, batch_size {bucket.batch_size}) {problem}.\n"
                    f"{explain(field, self.sources, bucket, stats)}\n"
                    "Change the bucket (frames, strides, size, batch_size, kinds) or add a source that fits."
                )
        used = {pool.source for pools in self._pools for pool in pools}
        for source, config in enumerate(self.sources):
            if source not in used:
                lines = [
                    explain(field, self.sources, bucket, [stats[source]])
                    for bucket, stats in zip(self._all_buckets, self._filter_stats, strict=True)
                ]
                raise ValueError(
                    f"{field}.{source} ({config.path} [{config.split}]) has no record for any bucket.\n"
                    + "\n".join(lines)
                    + "\nRemove the source, or add a bucket that it fits."
                )

    def at(self, step: int) -> StepPlan:
        """The global batch of a step."""
        bucket, positions = self._positions(step)
        pool, row = self._rows(bucket, positions)
        return StepPlan(step, bucket.config, bucket.index, bucket.sources[pool], row)

    def bucket(self, step: int) -> BucketConfig:
        """The shape of a step's batch."""
        return self._buckets[self._schedule.at(step)[0]].config

    def samples_before(self, step: int) -> int:
        """Number of samples in all batches before a step."""
        batches = self._schedule.before(step)
        return sum(number * bucket.batch_size for number, bucket in zip(batches, self.buckets, strict=True))

    def substitute(self, step: int, slot: int, attempt: int) -> tuple[int, int] | None:
        """(source, row) of a slot's substitute number `attempt`, for records that cannot be decoded.

        Substitutes are of the same pool, in a fixed pseudo-random order over all its rows; None when there are no more.
        """
        assert attempt >= 1
        bucket, positions = self._positions(step, np.array([slot]))
        pool, row = self._rows(bucket, positions, attempt)
        if attempt > int(bucket.sizes[pool[0]]):
            return None
        return int(bucket.sources[pool[0]]), int(row[0])

    def clip_spec(self, step: int, slot: int, attempt: int = 0) -> ClipSpec:
        """The clip of a slot; with `attempt`, of its substitute of that number."""
        if attempt:
            place = self.substitute(step, slot, attempt)
            assert place is not None, f"slot {slot} of step {step} has fewer than {attempt} substitutes"
            return self.sample_spec(step, slot, attempt, *place)
        bucket, positions = self._positions(step, np.array([slot]))
        pool, row = self._rows(bucket, positions)
        return self.sample_spec(step, slot, 0, int(bucket.sources[pool[0]]), int(row[0]))

    def sample_spec(self, step: int, slot: int, attempt: int, source: int, row: int) -> ClipSpec:
        """As `clip_spec`, when the slot's source and row are already known from `at` or `substitute`."""
        bucket = self.bucket(step)
        index = self._indices[source]
        frames, views, captions = int(index.frames[row]), int(index.views[row]), int(index.captions[row])
        latent_frames, has_camera = int(index.latent_frames[row]), bool(index.has_camera[row])
        if self.evaluation:
            # Stride, start, crop_y, crop_x, flip, caption.
            uniforms = np.array([0.0, 0.5, 0.5, 0.5, 1.0, 0.0])
            chosen = tuple(range(bucket.views))
        else:
            more = UNIFORMS + bucket.frames if self._augmentation or bucket.segment else 0
            uniforms = counter.uniforms(6 + bucket.views + more, self.seed, step, slot, attempt)
            chosen = _choose(views, uniforms[6 : 6 + bucket.views])
        stride, last = 1, 0
        if bucket.frames_per_second is None:
            own_stride = self.sources[source].frame_stride
            strides = [own_stride * n for n in bucket.strides if (bucket.horizon - 1) * own_stride * n < frames]
            strides = strides or [(frames - 1) // max(bucket.horizon - 1, 1)]
            stride = strides[int(uniforms[0] * len(strides))]
            last = (bucket.horizon - 1) * stride
        elif bucket.frames > 1:
            rate = float(index.frames_per_second[row])
            last = int(offsets(rate, bucket.frames_per_second, bucket.frames - 1))
        start = int(uniforms[1] * (frames - last))
        further = uniforms[6 + bucket.views :]
        augmentation = None
        if self._augmentation is not None and not (has_camera or latent_frames):
            augmentation = Augmentation(self._augmentation, tuple(further[:UNIFORMS].tolist()))
        can_flip = not (has_camera or latent_frames or index.has_action[row])
        if latent_frames not in (0, frames):
            # Temporally compressed latents are exact only from the first frame on, at stride 1.
            start, stride = 0, 1
        return ClipSpec(
            start=start,
            stride=stride,
            views=chosen,
            crop_y=float(uniforms[2]),
            crop_x=float(uniforms[3]),
            flip=self._flip and can_flip and bool(uniforms[4] < 0.5),
            caption=int(uniforms[5] * captions) if captions else -1,
            frames=bucket.segment and bucket.segment.frames(bucket.frames, start, stride, further[UNIFORMS:]),
            augmentation=augmentation,
            seed=0 if self.evaluation else counter.fold(self.seed, step, slot, attempt),
            frames_per_second=bucket.frames_per_second,
            caption_draw=self._caption_draw(step, slot, attempt),
        )

    def _caption_draw(self, step: int, slot: int, attempt: int) -> CaptionDraw | None:
        if self._captions is None:
            return None
        if self.evaluation:
            return CaptionDraw(self._captions)
        words = counter.fold(_CAPTIONS, self.seed), step, slot, attempt
        return CaptionDraw(self._captions, tuple(counter.uniforms(CAPTION_UNIFORMS, *words).tolist()))

    def records(self, bucket: int) -> dict[tuple[str, str], int]:
        """Number of records that fit bucket number `bucket` of `buckets`, by (source path, kind)."""
        found = self._buckets[bucket]
        places = zip(found.sources.tolist(), found.kinds, found.sizes.tolist(), strict=True)
        return {(self.sources[source].path, KINDS[kind]): size for source, kind, size in places}

    def _bucket(self, place: int, index: int, config: DataConfig) -> _Bucket:
        pools = self._pools[index]
        sizes = np.array([len(pool.rows) for pool in pools], np.int64)
        keys = [counter.fold(self.seed, index, pool.source, pool.kind) for pool in pools]
        return _Bucket(
            index=index,
            config=config.buckets[index],
            order=self._order(place, config.buckets[index], pools, config.kind_weights),
            sources=np.array([pool.source for pool in pools], np.int64),
            kinds=tuple(pool.kind for pool in pools),
            sizes=sizes,
            keys=np.array(keys, np.uint64),
            # A pool of all records of its source needs no table.
            rows=tuple(
                None if len(pool.rows) == len(self._indices[pool.source]) else SharedRows(pool.rows) for pool in pools
            ),
        )

    def _order(
        self, place: int, bucket: BucketConfig, pools: Sequence[Pool], kind_weights: Mapping[str, float]
    ) -> StagedInterleave:
        """The order of a bucket's pools, with the weights that their sources have at each step."""
        members = [(pool.source, pool.kind) for pool in pools]
        steps = {stage.start_step for source in self.sources for stage in source.weight_stages}
        stages: list[tuple[int, list[float]]] = []
        for step in [0] if self.evaluation else sorted({0, *steps}):
            start = self._schedule.before(step)[place] * bucket.batch_size
            weights = pool_weights(members, [weight_at(source, step) for source in self.sources], kind_weights)
            if stages and stages[-1][0] == start:
                stages.pop()  # without a batch of this bucket
            stages.append((start, weights))
        for number, (start, weights) in enumerate(stages):
            if not any(weights):
                raise ValueError(
                    f"buckets.{place} ({bucket.name}): all sources that fit it have weight 0 from its batch "
                    f"{start // bucket.batch_size} on (weight_stages); give one of them a weight."
                )
            assert number == 0 or start > stages[number - 1][0]
        return StagedInterleave(stages)

    def _positions(self, step: int, slots: np.ndarray | None = None) -> tuple[_Bucket, np.ndarray]:
        """The bucket of a step, and the positions of some slots (or all) among all samples of the bucket so far."""
        member, before = self._schedule.at(step)
        bucket = self._buckets[member]
        if slots is None:
            slots = np.arange(bucket.config.batch_size)
        assert np.all((slots >= 0) & (slots < bucket.config.batch_size))
        return bucket, before * bucket.config.batch_size + slots

    def _rows(self, bucket: _Bucket, positions: np.ndarray, attempt: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Pool and row, int64, of some of the bucket's samples (or of their substitutes)."""
        pool, ordinal = bucket.order.at(positions)
        sizes = bucket.sizes[pool]
        epoch, position = np.divmod(ordinal, sizes)
        if attempt:
            # Another permutation than any epoch's: neighbors of a slot are no more likely substitutes than other rows.
            keys = counter.fold_array(~bucket.keys[pool], epoch)
            position = counter.permute((position + attempt - 1) % sizes, sizes, keys)
        elif not self.evaluation:
            position = counter.permute(position, sizes, counter.fold_array(bucket.keys[pool], epoch))
        row = position.astype(np.int64)
        for number in np.unique(pool).tolist():
            table = bucket.rows[number]
            if table is not None:
                members = pool == number
                row[members] = table.array[row[members]]
        return pool, row

    def _digest(self, config: DataConfig, filters: Sequence[SourceFilter]) -> str:
        # Without paths: a data set may be moved. The manifest covers its content.
        sources = [{"weight": source.weight, "kinds": list(source.kinds)} for source in self.sources]
        buckets = [
            {_DIGEST_NAMES.get(name, name): value for name, value in dataclasses.asdict(bucket).items()}
            for bucket in config.buckets
        ]
        fields = {name: getattr(config, name) for name in ("kind_weights", "resize", "upscale", "flip")}
        # Fields that were added later count only if used, so that digests of older runs stay the same.
        for source, hashed in zip(self.sources, sources, strict=True):
            hashed |= {"step": source.frame_stride} if source.frame_stride != 1 else {}
            hashed |= {"exclude": exclusions.digest(source.exclude)} if source.exclude is not None else {}
            if source.weight_stages:
                hashed["weight_stages"] = [dataclasses.asdict(stage) for stage in source.weight_stages]
        for chosen, hashed in zip(filters, sources, strict=True):
            hashed |= {"rows": chosen.rows_digest} if chosen.rows_digest is not None else {}
        for hashed in buckets:
            for name, unused in _UNUSED.items():
                if hashed[name] == unused:
                    del hashed[name]
        if config.augmentation is not None:
            fields["augmentation"] = dataclasses.asdict(config.augmentation)
        if config.captions is not None:
            fields["captions"] = dataclasses.asdict(config.captions)
        return _sha256({"version": VERSION, "seed": self.seed, "sources": sources, "buckets": buckets, **fields})


def _choose(views: int, uniforms: np.ndarray) -> tuple[int, ...]:
    """The first `len(uniforms)` elements of a random permutation of 0..views-1."""
    order = list(range(views))
    for place, uniform in enumerate(uniforms):
        other = place + int(uniform * (views - place))
        order[place], order[other] = order[other], order[place]
    return tuple(order[: len(uniforms)])


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
