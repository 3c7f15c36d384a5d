"""The dtype that each network of a run computes in."""

from collections.abc import Mapping

import jax.numpy as jnp

from jvgen.config import ConfigError
from jvgen.nn.compute_dtype import cast
from jvgen.nn.network import Parameters
from jvgen.tasks.task import Task
from jvgen.training.config import PrecisionConfig


def float32_networks(task: Task, precision: PrecisionConfig) -> list[str]:
    """Names of the networks that compute in float32 whatever the compute dtype: the task's and the user's, sorted.

    Raises:
      ConfigError: a name in `float32_networks` that is no network of the task.
    """
    names = {*task.networks, *task.frozen_networks}
    for name in precision.float32_networks:
        if name not in names:
            raise ConfigError(
                f"training.precision.float32_networks: {name!r} is no network of this task; it has "
                f"{', '.join(sorted(names))}."
            )
    return sorted(task.float32_networks | set(precision.float32_networks))


def network_dtypes(task: Task, precision: PrecisionConfig) -> dict[str, jnp.dtype]:
    """Name of each network, trained or frozen -> the dtype of its matrices and activations.

    Raises:
      ConfigError: see `float32_networks`.
    """
    exact = float32_networks(task, precision)
    return {
        name: jnp.dtype(jnp.float32) if name in exact else jnp.dtype(precision.compute_dtype)
        for name in sorted({*task.networks, *task.frozen_networks})
    }


def cast_networks(parameters: Parameters, axes: Parameters, dtypes: Mapping[str, jnp.dtype]) -> Parameters:
    """Parameters by network in the dtypes that the networks compute with, see `jvgen.nn.compute_dtype.cast`."""
    return {name: cast(tree, axes[name], dtypes[name]) for name, tree in parameters.items()}


def describe_precision(task: Task, precision: PrecisionConfig) -> str:
    """The policy in one line, for the start of a run."""
    line = f"precision: {precision.compute_dtype} compute; products of float32 operands at {precision.matmul_precision}"
    exact = float32_networks(task, precision)
    if exact and precision.compute_dtype != "float32":
        line += f"; float32 networks: {', '.join(exact)}"
    if precision.quantized != "none":
        line += f"; linear layers of blocks in {precision.quantized}"
    return line
