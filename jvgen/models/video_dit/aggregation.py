"""RepVideo's aggregation over layers: each reads a gated mix of the last layer's tokens and the mean of earlier ones'.

With m the period, h the tokens after each layer (h before layer 0 the embedded sequence) and g a gate a layer,

    A_0 = h_-1,   A_l = mean(h_s, ..., h_l-1) with s = m floor((l - 1) / m)
    h_l = Block_l(h_l-1 + g_l (A_l - h_l-1))

as the released code computes it (Si et al. 2025, arXiv 2501.08994; its equation 8 writes the gate the other way round).
The mean is a running sum. The backward pass has the tokens between layers, which it needs in any case, and sums what it
needs of them again: no sum is kept from the forward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jvgen.models.video_dit.config import AggregationConfig, GateKind
from jvgen.nn.stacked import Remat, Stacked, checkpointed
from jvgen.parallel import axes

# (module of one layer, its number, its input, condition, constants) -> its output.
Layer = Callable[[nnx.Module, jax.Array, jax.Array, Any, Any], jax.Array]


class Plan(NamedTuple):
    """What layer l averages, known from the number of layers: arrays with one entry a layer.

    Attributes:
      layer: l.
      first: the first layer whose input is averaged; the last one is l itself.
      count: how many are averaged, float32.
      resets: the output of layer l begins a new sum.
    """

    layer: np.ndarray
    first: np.ndarray
    count: np.ndarray
    resets: np.ndarray


def plan(layers: int, period: int) -> Plan:
    """Which tokens each of `layers` layers averages; layer l's input counts as number l."""
    layer = np.arange(layers, dtype=np.int32)
    anchor = np.where(layer == 0, -1, period * ((layer - 1) // period)).astype(np.int32)
    return Plan(layer, anchor + 1, (layer - anchor).astype(np.float32), layer % period == 0)


class Aggregation(nnx.Module):
    """The gates, and the run over all layers that uses them.

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
        """The gate of each layer, float32, one number or one a channel: weight of the mean against the tokens."""
        gates = self.gates[...].astype(jnp.float32)
        gates = jax.nn.sigmoid(gates) if self.config.gate is GateKind.SIGMOID else gates
        return gates if gates.ndim == 2 else gates[:, None]

    def plan(self, layers: int) -> Plan:
        """What each of `layers` layers averages."""
        return plan(layers, self.config.period)

    def run(
        self,
        blocks: Stacked,
        layer: Layer,
        tokens: Float[Array, "B L D"],
        condition: Any,
        constants: Any,
        *,
        remat: Remat = Remat.NONE,
        unroll: bool = False,
    ) -> Float[Array, "B L D"]:
        """All layers.

        Args:
          blocks: the layers.
          layer: computes one of them.
          tokens: what goes into the first.
          condition: tree of arrays that every layer reads.
          constants: the same, without gradients.
          remat: what the backward pass keeps of each layer.
          unroll: no loop in the compiled program.
        """
        network = _Layers(blocks, layer, self.plan(blocks.count), remat, unroll)
        return network(blocks.variables(), self.values(), tokens, condition, constants)


def mix(hidden: jax.Array, mean: jax.Array, gate: jax.Array) -> jax.Array:
    """`hidden + gate (mean - hidden)` in float32, rounded once to the dtype of `hidden`.

    In this form a mean over the tokens themselves changes nothing and gives its gate no gradient.
    """
    exact = hidden.astype(jnp.float32)
    return (exact + gate * (mean - exact)).astype(hidden.dtype)


class Sum(NamedTuple):
    """What goes from layer to layer: the tokens, and the float32 sum of the current group's."""

    hidden: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array) -> "Sum":
        """The sum that begins with these tokens."""
        return cls(tokens, tokens.astype(jnp.float32))

    def input(self, gate: jax.Array, count: jax.Array) -> jax.Array:
        """What the next layer reads."""
        return mix(self.hidden, self.total / count, gate)

    def after(self, output: jax.Array, resets: jax.Array) -> "Sum":
        """With the output of a layer added, or as the first of a new group."""
        exact = output.astype(jnp.float32)
        return Sum(output, _placed(jnp.where(resets, exact, self.total + exact)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Layers:
    """The run over all layers with a backward pass of its own.

    Left to itself, the backward pass of the scan would read two arrays a layer, its input and the mean (or the sum) for
    the gate's gradient, where one, the tokens between layers, tells both.
    """

    blocks: Stacked
    layer: Layer
    plan: Plan
    remat: Remat
    unroll: bool

    def __call__(
        self, variables: Any, gates: jax.Array, tokens: jax.Array, condition: Any, constants: Any
    ) -> jax.Array:
        # `restore` is how a layer's pullback is put together again: known once the forward pass has been traced.
        partitioner, restore = axes.current(), []

        @jax.custom_vjp
        def run(variables: Any, gates: jax.Array, tokens: jax.Array, condition: Any, constants: Any) -> jax.Array:
            def body(carry: Sum, scanned: tuple) -> tuple[Sum, None]:
                of_layer, gate, plan = scanned
                output = self._layer(plan, constants)(of_layer, carry.input(gate, plan.count), condition)
                return carry.after(output, plan.resets), None

            return self._scan(body, Sum.of(tokens), (variables, gates, self.plan))[0].hidden

        def forward(variables: Any, gates: jax.Array, tokens: jax.Array, condition: Any, constants: Any) -> tuple:
            def body(carry: Sum, scanned: tuple) -> tuple[Sum, tuple]:
                of_layer, gate, plan = scanned
                read = carry.input(gate, plan.count)
                output, pullback = jax.vjp(self._layer(plan, constants), of_layer, read, condition)
                kept, restore[:] = _without(pullback, (of_layer, read, condition, constants))
                return carry.after(output, plan.resets), (carry.hidden, kept)

            last, (between, kept) = self._scan(body, Sum.of(tokens), (variables, gates, self.plan))
            return last.hidden, (variables, gates, condition, constants, between, kept)

        def backward(residuals: tuple, gradient: jax.Array) -> tuple:
            variables, gates, condition, constants, between, kept = residuals

            def body(carry: tuple, scanned: tuple) -> tuple[tuple, tuple]:
                of_hidden, of_total, of_condition = carry
                of_layer, gate, plan, hidden, kept = scanned
                read = mix(hidden, _mean(between, plan, self.window), gate)
                pullback = restore[0](kept, (of_layer, read, condition, constants))
                of_output = (of_hidden.astype(jnp.float32) + of_total).astype(of_hidden.dtype)
                of_variables, of_read, more = pullback(of_output)
                # The mean is taken again, and not kept while the layer is gone back through.
                plan, of_read = jax.lax.optimization_barrier((plan, of_read))
                exact = of_read.astype(jnp.float32)
                hidden = jax.lax.dynamic_index_in_dim(between, plan.layer, keepdims=False).astype(jnp.float32)
                of_gate = jnp.sum(exact * (_mean(between, plan, self.window) - hidden), axis=(0, 1))
                of_gate = of_gate if gate.shape == of_gate.shape else jnp.sum(of_gate, keepdims=True)
                of_hidden = ((1.0 - gate) * exact).astype(of_read.dtype)
                of_total = _placed(gate / plan.count * exact + jnp.where(plan.resets, 0.0, of_total))
                of_condition = jax.tree.map(jnp.add, of_condition, more)
                return (of_hidden, of_total, of_condition), (of_variables, of_gate)

            start = (gradient, jnp.zeros(gradient.shape, jnp.float32), jax.tree.map(jnp.zeros_like, condition))
            # The forward pass may have left the context that says how arrays are placed by now.
            with axes.partitioned(partitioner):
                last, (of_variables, of_gates) = self._scan(
                    body, start, (variables, gates, self.plan, between, kept), reverse=True
                )
            of_hidden, of_total, of_condition = last
            of_tokens = (of_hidden.astype(jnp.float32) + of_total).astype(of_hidden.dtype)
            return of_variables, of_gates, of_tokens, of_condition, None

        run.defvjp(forward, backward)
        return run(variables, gates, tokens, condition, constants)

    @property
    def window(self) -> int:
        """Most tokens that are averaged."""
        return int(self.plan.count.max())

    def _layer(self, plan: Plan, constants: Any) -> Callable[[Any, jax.Array, Any], jax.Array]:
        def compute(variables: Any, read: jax.Array, condition: Any) -> jax.Array:
            return self.layer(self.blocks.layer(variables), plan.layer, read, condition, constants)

        return checkpointed(compute, self.remat)

    def _scan(self, body: Callable, carry: Any, scanned: Any, *, reverse: bool = False) -> tuple[Any, Any]:
        scanned = jax.tree.map(jnp.asarray, scanned)
        return jax.lax.scan(body, carry, scanned, reverse=reverse, unroll=self.blocks.count if self.unroll else 1)


def _placed(tokens: jax.Array) -> jax.Array:
    return axes.constrain(tokens, axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


def _mean(between: Float[Array, "G B L D"], plan: Plan, window: int) -> Float[Array, "B L D"]:
    """What a layer averages, float32, from the inputs of all layers."""
    start = jnp.minimum(plan.first, between.shape[0] - window)
    total = jnp.zeros(between.shape[1:], jnp.float32)
    # One sum of slices, where a reduction over a window would be written out in float32.
    for number in (start + offset for offset in range(window)):
        tokens = jax.lax.dynamic_index_in_dim(between, number, keepdims=False).astype(jnp.float32)
        total += jnp.where((number >= plan.first) & (number <= plan.layer), tokens, 0.0)
    return total / plan.count


def _without(pullback: Any, known: Any) -> tuple[list[jax.Array], list[Callable[[list, Any], Any]]]:
    """The arrays of a pullback other than known ones, and a function that puts both back."""
    places = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(known))}
    leaves, structure = jax.tree.flatten(pullback)
    origin = [places.get(id(leaf)) for leaf in leaves]

    def rebuild(kept: list[jax.Array], known: Any) -> Any:
        kept, known = iter(kept), jax.tree.leaves(known)
        return structure.unflatten([next(kept) if place is None else known[place] for place in origin])

    return [leaf for leaf, place in zip(leaves, origin, strict=True) if place is None], [rebuild]
