"""RepVideo's aggregation over layers: each layer reads a gated mix of its input and the mean of earlier layers' inputs.

With m the period, h_l the tokens after layer l (h_-1 the embedded sequence) and g_l one gate per layer,

    A_0 = h_-1,   A_l = mean(h_s, ..., h_l-1) with s = m floor((l - 1) / m)
    h_l = Block_l(h_l-1 + g_l (A_l - h_l-1))

as the released code computes it (Si et al. 2025, arXiv 2501.08994; in its equation 8 the gate weighs the tokens, not
the mean). The mean is carried from layer to layer as a running sum. `aggregation_memory.py` computes the same with a
backward pass that stores less.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.video_dit.config import AggregationConfig, GateKind
from jvgen.nn.stacked import Remat, Stacked
from jvgen.parallel import axes

# (module of one layer, layer index, input, condition, constants) -> output of the layer.
Layer = Callable[[nnx.Module, jax.Array, jax.Array, Any, Any], jax.Array]


class Plan(NamedTuple):
    """What each layer averages: arrays with one entry per layer, known from the number of layers.

    Attributes:
      layer: index of the layer.
      first: index of the first layer whose input is averaged; the last one is the layer itself.
      count: number of averaged inputs, float32.
      resets: whether the output of the layer starts a new sum.
    """

    layer: np.ndarray
    first: np.ndarray
    count: np.ndarray
    resets: np.ndarray


def aggregation_plan(layers: int, period: int) -> Plan:
    """What each of `layers` layers averages."""
    layer = np.arange(layers, dtype=np.int32)
    anchor = np.where(layer == 0, -1, period * ((layer - 1) // period)).astype(np.int32)
    return Plan(layer, anchor + 1, (layer - anchor).astype(np.float32), layer % period == 0)


def mix(hidden: jax.Array, mean: jax.Array, gate: jax.Array) -> jax.Array:
    """`hidden + gate (mean - hidden)` in float32, rounded once to the dtype of `hidden`.

    In this form a mean over the tokens themselves changes nothing and gives its gate no gradient.
    """
    exact = hidden.astype(jnp.float32)
    return (exact + gate * (mean - exact)).astype(hidden.dtype)


class RunningSum(NamedTuple):
    """The carry between layers: the tokens `B L D`, and the float32 sum of the current group's tokens."""

    hidden: jax.Array
    total: jax.Array

    @classmethod
    def start(cls, tokens: jax.Array) -> "RunningSum":
        """The carry before the first layer."""
        return cls(tokens, tokens.astype(jnp.float32))

    def mixed(self, gate: jax.Array, count: jax.Array) -> jax.Array:
        """The input of the next layer."""
        return mix(self.hidden, self.total / count, gate)

    def add(self, output: jax.Array, resets: jax.Array) -> "RunningSum":
        """The carry after a layer: its output is added to the sum, or starts a new one."""
        exact = output.astype(jnp.float32)
        return RunningSum(output, constrain_tokens(jnp.where(resets, exact, self.total + exact)))


def run_layers(
    blocks: Stacked,
    layer: Layer,
    gates: Float[Array, "G #D"],
    plan: Plan,
    tokens: Float[Array, "B L D"],
    condition: Any,
    constants: Any,
    *,
    remat: Remat = Remat.NONE,
    unroll: bool = False,
    pause_after: int | None = None,
) -> Any:
    """Run all layers with aggregation, and return the last tokens.

    Args:
      blocks: the layers.
      layer: computes one of them.
      gates: see `Aggregation.values`.
      plan: see `Aggregation.plan`.
      tokens: input of the first layer.
      condition: tree of arrays that every layer reads.
      constants: the same, without gradients.
      remat: what the backward pass stores of each layer.
      unroll: run the layers in a Python loop and not in a scan.
      pause_after: a layer whose output is returned too, see `Stacked.scan`.
    """

    def step(block: nnx.Module, carry: RunningSum, of_layer: tuple[jax.Array, Plan]) -> RunningSum:
        gate, plan = of_layer
        output = layer(block, plan.layer, carry.mixed(gate, plan.count), condition, constants)
        return carry.add(output, plan.resets)

    per_layer = (gates, jax.tree.map(jnp.asarray, plan))
    how = {"remat": remat, "unroll": unroll, "pause_after": pause_after}
    found = blocks.scan(step, RunningSum.start(tokens), per_layer, **how)
    return found.hidden if pause_after is None else tuple(carry.hidden for carry in found)


class Aggregation(nnx.Module):
    """The gates.

    Args:
      config: period, kind of gate, initial value.
      layers: number of layers.
      width: channels of a token.
    """

    def __init__(self, config: AggregationConfig, *, layers: int, width: int):
        self.config = config
        shape = (layers, width) if config.gate is GateKind.CHANNEL else (layers,)
        start = np.log(config.initial / (1 - config.initial)) if config.gate is GateKind.SIGMOID else config.initial
        names = (axes.LAYERS, axes.EMBED)[: len(shape)]
        self.gates = nnx.Param(jnp.full(shape, start, jnp.float32), logical_axes=names)

    def values(self) -> Float[Array, "G #D"]:
        """The gate of each layer, float32, one number per layer or per channel: weight of the mean."""
        gates = self.gates[...].astype(jnp.float32)
        gates = jax.nn.sigmoid(gates) if self.config.gate is GateKind.SIGMOID else gates
        return gates if gates.ndim == 2 else gates[:, None]

    def plan(self, layers: int) -> Plan:
        """What each of `layers` layers averages."""
        return aggregation_plan(layers, self.config.period)


def constrain_tokens(tokens: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Tokens with the sharding of the residual stream."""
    return axes.constrain(tokens, axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)
