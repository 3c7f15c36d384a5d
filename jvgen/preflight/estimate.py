"""What arithmetic says about a training step: a lower bound on its memory, its time, and what a process reads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jvgen.data.stream.config import BucketConfig
from jvgen.parallel import axes
from jvgen.training.program import Program
from jvgen.training.telemetry.throughput import step_flops, trained_flops

# Model FLOPs utilization where the program is not compiled, so that its time cannot be estimated: the best that is
# published for training of a video DiT on TPUs (Wan 2.1 14B, MaxDiffusion, v5p).
ASSUMED_MFU = 0.3
ASSUMED_BASIS = f"assuming {ASSUMED_MFU:.0%} MFU"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device.

    Attributes:
      parameters, optimizer, ema, frozen: parts of the train state, in their stored dtypes and shardings.
      batch: input arrays of one step.
      gradients: one float32 gradient per trained parameter, stored as the parameters are.
      cast: the parameters in the compute dtype, stored as the parameters are.
    """

    parameters: float
    optimizer: float
    ema: float
    frozen: float
    batch: float
    gradients: float
    cast: float

    @property
    def state(self) -> float:
        """Bytes of the train state, which stay in memory between steps."""
        return self.parameters + self.optimizer + self.ema + self.frozen

    @property
    def total(self) -> float:
        """State, batch, gradients and cast parameters; activations are not included."""
        return self.state + self.batch + self.gradients + self.cast


def lower_bound(program: Program, bucket: BucketConfig) -> Estimate:
    """The least memory that the step of one batch shape needs, without activations, which depend on `remat`."""
    state = program.abstract_state()
    parameters = local_bytes(state.parameters)
    return Estimate(
        parameters=parameters,
        optimizer=local_bytes(state.optimizer),
        ema=local_bytes(state.ema),
        frozen=local_bytes(state.frozen),
        batch=local_bytes(program.abstract_batch(bucket)),
        gradients=parameters,
        cast=sum(
            local_bytes(tree) * program.dtypes[name].itemsize / 4
            for name, tree in state.parameters.items()
            if program.dtypes[name].itemsize < 4
        ),
    )


@dataclasses.dataclass(frozen=True)
class Replicated:
    """What a device holds of parameters, moments and EMA beyond an even split over `fsdp` x `seq`, in bytes.

    Attributes:
      small: of arrays below `sharding.replicate_below`, which are replicated on purpose.
      undivided: of larger ones, by path of the parameter, the most bytes first: they cannot be split completely.
    """

    small: float
    undivided: dict[str, float]


def replicated(program: Program) -> Replicated:
    """Bytes of the train state that `fsdp` and `seq` do not split."""
    shards, state = program.sharding.state_shards, program.abstract_state()
    leaves = jax.tree.leaves((state.parameters, state.optimizer, state.ema))
    beyond = sum(max(0.0, local_bytes(leaf) - leaf.size * leaf.dtype.itemsize / shards) for leaf in leaves)
    undivided = program.replicated_bytes()
    small = max(0.0, beyond - sum(undivided.values()))
    return Replicated(small, dict(sorted(undivided.items(), key=lambda item: -item[1])))


def step_seconds(program: Program, bucket: BucketConfig, peak_flops: float | None) -> float | None:
    """Seconds per step at `ASSUMED_MFU` of a device's peak in FLOP/s; None if either FLOPs or peak are unknown."""
    flops = sum(trained_flops(program.task, step_flops(program.task, bucket)).values())
    devices = program.sharding.mesh.size
    return flops / (devices * peak_flops * ASSUMED_MFU) if flops and peak_flops else None


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a process reads for one step.

    Attributes:
      rows: rows of the global batch that a process reads; the most, if processes differ.
      clips: clips of these rows (one per view).
      batch_size: rows of the global batch.
      readers: number of processes that read the same row, on average.
      bytes: arrays of these rows as they go to the devices, uncompressed.
      seconds: time of a step; None if unknown.
      basis: where that time is from.
    """

    rows: int
    clips: int
    batch_size: int
    readers: float
    bytes: float
    seconds: float | None
    basis: str = ASSUMED_BASIS

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes per second that a process has to prepare to keep up with the devices."""
        return self.bytes / self.seconds if self.seconds else None

    def __str__(self) -> str:
        shared = f", each read by {self.readers:.3g} processes" if self.readers > 1 else ""
        text = (
            f"a process reads {self.rows} of {self.batch_size} examples per step ({self.clips} clips{shared}), "
            f"{amount(self.bytes)} decoded"
        )
        if self.seconds is None:
            return text
        return f"{text}: {amount(self.bytes_per_second)}/s at {self.seconds:.3g} s/step ({self.basis})"


def reading(program: Program, bucket: BucketConfig, peak_flops: float | None) -> Reading:
    """What one process reads for a step of a bucket."""
    rows = [len(rows) for rows in program.rows_by_process(bucket).values()]
    batch = jax.tree.leaves(program.abstract_batch(bucket))
    per_row = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in batch) / bucket.batch_size
    return Reading(
        rows=max(rows),
        clips=max(rows) * bucket.views,
        batch_size=bucket.batch_size,
        readers=sum(rows) / bucket.batch_size,
        bytes=per_row * max(rows),
        seconds=step_seconds(program, bucket, peak_flops),
    )


def saved_between_layers(
    program: Program, bucket: BucketConfig, tokens: int, width: int, layers: int, kept: int = 1
) -> float:
    """Bytes per device that a scan over layers saves for the backward pass: `kept` arrays tokens x width per layer."""
    shape = (bucket.batch_size // program.experiment.training.accumulation, tokens, width)
    place = program.sharding_of(bucket).activation((axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED), shape)
    itemsize = jnp.dtype(program.experiment.training.precision.compute_dtype).itemsize
    return float(kept * layers * math.prod(place.shard_shape(shape)) * itemsize)


def amount(size: float) -> str:
    """A number of bytes with a unit that suits it: "34.3 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def local_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of `ShapeDtypeStruct` with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        # A key of the default generator is two 32-bit words.
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return float(total)
