"""The least memory that a training step can need, by arithmetic: to hold against what the compiler gives it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jvgen.data.stream.config import BucketConfig
from jvgen.parallel import axes
from jvgen.training.program import Program


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device.

    Attributes:
      parameters, optimizer, averages, frozen: the parts of the state, as they are stored.
      batch: input arrays of one step.
      gradients: one float32 gradient per trained parameter, stored as the parameters are.
      cast: the parameters in the compute dtype, stored as the parameters are.
    """

    parameters: float
    optimizer: float
    averages: float
    frozen: float
    batch: float
    gradients: float
    cast: float

    @property
    def state(self) -> float:
        """What lies in memory between steps."""
        return self.parameters + self.optimizer + self.averages + self.frozen

    @property
    def total(self) -> float:
        """State, batch, gradients and cast parameters; activations come on top."""
        return self.state + self.batch + self.gradients + self.cast


def estimate(program: Program, bucket: BucketConfig) -> Estimate:
    """The least memory of a training step for one batch shape; activations, which depend on `remat`, are left out."""
    state = program.abstract_state()
    dtype = jnp.dtype(program.experiment.training.compute_dtype)
    parameters = local_bytes(state.parameters)
    return Estimate(
        parameters=parameters,
        optimizer=local_bytes(state.optimizer),
        averages=local_bytes(state.ema),
        frozen=local_bytes(state.frozen),
        batch=local_bytes(program.abstract_batch(bucket)),
        gradients=parameters,
        cast=parameters * dtype.itemsize / 4 if dtype.itemsize < 4 else 0.0,
    )


def saved_between_layers(
    program: Program, bucket: BucketConfig, tokens: int, width: int, layers: int, kept: int = 1
) -> float:
    """Bytes per device that a scan over layers keeps for its backward pass: `kept` arrays of tokens x width a layer."""
    shape = (bucket.batch_size // program.experiment.training.accumulation, tokens, width)
    place = program.sharding.activation((axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED), shape)
    itemsize = jnp.dtype(program.experiment.training.compute_dtype).itemsize
    return float(kept * layers * math.prod(place.shard_shape(shape)) * itemsize)


def local_bytes(tree: Any) -> float:
    """Bytes of one device's shards of a tree of `ShapeDtypeStruct` with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        # A key of the default generator is two 32-bit words.
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return float(total)
