"""A lower bound on the memory of a training step, by arithmetic, to compare with what the compiler allocates."""

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
    dtype = jnp.dtype(program.experiment.training.compute_dtype)
    parameters = local_bytes(state.parameters)
    return Estimate(
        parameters=parameters,
        optimizer=local_bytes(state.optimizer),
        ema=local_bytes(state.ema),
        frozen=local_bytes(state.frozen),
        batch=local_bytes(program.abstract_batch(bucket)),
        gradients=parameters,
        cast=parameters * dtype.itemsize / 4 if dtype.itemsize < 4 else 0.0,
    )


def saved_between_layers(
    program: Program, bucket: BucketConfig, tokens: int, width: int, layers: int, kept: int = 1
) -> float:
    """Bytes per device that a scan over layers saves for the backward pass: `kept` arrays tokens x width per layer."""
    shape = (bucket.batch_size // program.experiment.training.accumulation, tokens, width)
    place = program.sharding.activation((axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED), shape)
    itemsize = jnp.dtype(program.experiment.training.compute_dtype).itemsize
    return float(kept * layers * math.prod(place.shard_shape(shape)) * itemsize)


def local_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of `ShapeDtypeStruct` with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        # A key of the default generator is two 32-bit words.
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return float(total)
