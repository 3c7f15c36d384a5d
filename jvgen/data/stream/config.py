"""Configuration of the input pipeline: sources (weighted data sets on disk) and buckets (batch shapes)."""

import dataclasses
import typing
from typing import Annotated, ClassVar, Literal

from jvgen.config import Config
from jvgen.data.stream import where
from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.captions import CaptionConfig
from jvgen.data.stream.segments import SegmentConfig
from jvgen.storage.cache import DEFAULT_GIB, FileCache, cache_of
from jvgen.value_rules import BelowOne, Bounds, Count, Frames, Pixels, Step, Weight, Workers

Kind = Literal["image", "static", "dynamic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStage(Config):
    """A source's weight from a step on.

    Attributes:
      start_step: first step with this weight.
      weight: share of the samples of a bucket, relative to the other sources that fit it; 0 for none.
    """

    start_step: Step
    weight: Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """One TFDS data set in ArrayRecord, written by `jvgen data build`.

    Attributes:
      path: folder of the data set (with `dataset_info.json`, or a parent that contains exactly one data set).
      split: TFDS split name.
      weight: share of the samples of a bucket, relative to the other sources that fit it.
      kinds: use only records of these kinds; empty for all.
      frame_stride: stride of the source itself, by which strides of buckets are multiplied, so that recordings at
        different frame rates move at similar speeds. Recordings that are too short use the largest stride that fits.
      exclude: leave out the recordings that a list names, such as another data set's test recordings: "robonet_test",
        or a text file of names. A name is a part of a record's id, without its suffix. None leaves out nothing.
      where: use only records that a condition on the columns of the data set takes, such as "aesthetic > 5 and license
        in ('cc-by', 'cc0')"; see `jvgen.data.stream.where`. None takes all.
      weight_stages: other weights from some steps on, in the order of their steps; `weight` holds before the first.
    """

    renamed_fields: ClassVar[dict[str, str]] = {"step": "frame_stride"}

    path: str
    split: str = "train"
    weight: Annotated[float, Bounds(above=0, fix="remove the source to give it no share")] = 1.0
    kinds: tuple[Kind, ...] = ()
    frame_stride: Frames = 1
    exclude: str | None = None
    where: str | None = None
    weight_stages: tuple[WeightStage, ...] = ()

    def validate(self) -> None:
        if self.where is not None:
            try:
                where.parse(self.where)
            except where.FilterError as error:
                raise ValueError(f"where = {self.where!r}: {error}") from None
        steps = [stage.start_step for stage in self.weight_stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"weight_stages begin at steps {steps}: each must begin after the one before it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketConfig(Config):
    """One batch shape.

    Attributes:
      frames, height, width: size of a clip in pixels; frames 1 for images.
      batch_size: global batch size, over all processes; `DataConfig.tokens_per_step` replaces it.
      views: synchronized cameras per example.
      strides: frame strides to draw from; a clip of F frames spans (F-1)*stride+1 recorded frames.
      frames_per_second: take frames at this rate instead, by their times in the recording: at any recorded rate, also
        a variable one. Recordings that are slower do not fit. `strides` must be 1, and strides of sources do not count.
      aspects: take only records whose width over height is at least the first number and below the second; none for
        all. `jvgen.data.aspect_buckets` sets them.
      kinds: record kinds that may fill the bucket.
      weight: share of the steps, relative to the other active buckets.
      segment: draw the frames from a longer window; none for every frame of the window.
      start_step, end_step: the bucket is active in steps [start_step, end_step); none for the end of the run.
        `jvgen.training.optimization.curriculum` sets them from stages.
    """

    renamed_fields: ClassVar[dict[str, str]] = {"begins": "start_step", "ends": "end_step"}

    frames: Frames
    height: Pixels
    width: Pixels
    batch_size: Count
    views: Annotated[int, Bounds(at_least=1, at_most=1000)] = 1
    strides: tuple[Frames, ...] = (1,)
    kinds: tuple[Kind, ...] = ("image", "static", "dynamic")
    weight: Annotated[float, Bounds(above=0, fix="remove the bucket to give it no steps")] = 1.0
    segment: SegmentConfig | None = None
    start_step: Step = 0
    end_step: Step | None = None
    frames_per_second: Annotated[float, Bounds(above=0, at_most=1000)] | None = None
    aspects: tuple[Annotated[float, Bounds(at_least=0)], Annotated[float, Bounds(above=0)]] | None = None

    @property
    def horizon(self) -> int:
        """Length of the window that an example is taken from, in frames at the bucket's stride."""
        return self.frames if self.segment is None else self.segment.horizon

    @property
    def name(self) -> str:
        """Short name for logs: views x frames x height x width."""
        return f"{self.views}x{self.frames}x{self.height}x{self.width}"

    def validate(self) -> None:
        if not self.strides:
            raise ValueError("strides = (): needs at least one stride, for example 1.")
        if not self.kinds:
            raise ValueError("kinds = (): use at least one of image, static, dynamic.")
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(
                f"start_step = {self.start_step}, end_step = {self.end_step}: 0 <= start_step < end_step, or "
                "end_step = none."
            )
        if self.segment is not None:
            self.segment.check(self.frames)
        if self.aspects is not None and self.aspects[0] >= self.aspects[1]:
            raise ValueError(f"aspects = {self.aspects}: from a ratio up to a larger one, such as 1.0,1.5.")
        if self.frames_per_second is not None and (self.strides != (1,) or self.segment is not None):
            raise ValueError(
                f"frames_per_second = {self.frames_per_second}, strides = {self.strides}: frames are taken either at a "
                "rate or at strides; set strides = 1 and segment = none, or frames_per_second = none."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Sources, buckets, and how each process reads them.

    Attributes:
      sources: training data sets.
      buckets: batch shapes; every step uses one.
      evaluation_sources: data sets for evaluation (usually another split of the same).
      kind_weights: relative share of samples by record kind, within a bucket that takes several; a missing kind
        counts 1.
      resize: how a frame is brought to the bucket's size. "crop": keep the aspect ratio, crop at random; "center_crop":
        keep the aspect ratio, crop the center; "squash": change the aspect ratio.
      upscale: also use records that are smaller than the bucket.
      flip: flip clips horizontally at random (never records with cameras, actions or cached latents).
      augmentation: random crops and color jitter; none to disable.
      threads: reading and decoding threads per process (or per worker).
      workers: worker processes per process; 0 reads in the process itself.
      prefetch: number of batches read ahead.
      error_budget: fraction of the records read that may fail to decode before the run stops.
      cache_folder: local folder for copies of the shards of data sets in buckets; none for one in the machine's
        temporary folder. The variable JVGEN_CACHE replaces it.
      cache_gib: size at which the shards that were used least recently are removed. JVGEN_CACHE_GIB replaces it.
      on_failed_read: what a read that still fails after retries does, of a bucket or a disk. "stop": end the run, so
        that a restart tries again. "quarantine": use another record and count against `error_budget`; processes that
        read the same rows (`seq` or `tensor` across processes) would then differ.
      captions: which caption of several is used, and how much of it; none for any of them, whole.
      licenses: licenses that the run may use, by the column `license` of its data sets; records with another license,
        or without one, are left out, of evaluation too. Checkpoints keep the list and how many records each has. Empty
        to allow all.
      tokens_per_step: choose the batch sizes of all buckets, whatever they say, so that steps take the same time within
        10% of their mean, and a batch of the longest examples has about this many tokens; see `jvgen.training.balance`.
        None for the buckets' own batch sizes.
      attention_cost: time that a FLOP of attention takes, in those of the other FLOPs of a step; `tokens_per_step`
        counts with it. 1 to 1.3 by estimates of RepVideo-2B on v5p.
      batch_multiple: batch sizes that `tokens_per_step` chooses are multiples of this times `training.accumulation`:
        the devices that batches are divided over.
    """

    sources: tuple[SourceConfig, ...]
    buckets: tuple[BucketConfig, ...]
    evaluation_sources: tuple[SourceConfig, ...] = ()
    kind_weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    resize: Literal["crop", "center_crop", "squash"] = "crop"
    upscale: bool = False
    flip: bool = False
    augmentation: AugmentationConfig | None = None
    threads: Workers = 8
    workers: Annotated[int, Bounds(at_least=0, at_most=1024)] = 0
    prefetch: Annotated[int, Bounds(at_least=1, at_most=1000)] = 4
    error_budget: BelowOne = 0.001
    cache_folder: str | None = None
    cache_gib: Annotated[float, Bounds(above=0, at_most=1e6, fix="GiB of local disk")] = DEFAULT_GIB
    on_failed_read: Literal["stop", "quarantine"] = "stop"
    captions: CaptionConfig | None = None
    licenses: tuple[str, ...] = ()
    tokens_per_step: Annotated[int, Bounds(at_least=1, at_most=10**12, fix="none for buckets' sizes")] | None = None
    batch_multiple: Count = 1
    attention_cost: Annotated[float, Bounds(at_least=0.1, at_most=10)] = 1.0

    def validate(self) -> None:
        if not self.sources:
            raise ValueError("sources = (): add at least one data set; build one with `jvgen data build`.")
        if not self.buckets:
            raise ValueError("buckets = (): add at least one batch shape.")
        unknown = sorted(set(self.kind_weights) - set(typing.get_args(Kind)))
        if unknown:
            raise ValueError(f"kind_weights has {unknown[0]!r}: a weight of image, static or dynamic.")

    def cache(self) -> FileCache:
        """The cache of remote shards on this machine."""
        return cache_of(self.cache_folder, self.cache_gib)


def weight_at(source: SourceConfig, step: int) -> float:
    """The weight of a source at a step."""
    weight = source.weight
    for stage in source.weight_stages:
        if stage.start_step <= step:
            weight = stage.weight
    return weight
