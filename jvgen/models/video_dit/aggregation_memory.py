"""RepVideo's aggregation with a backward pass that stores the tokens between layers, and no sums.

The gradient of a gate is <gradient of the layer's input, mean - tokens>. Differentiated by JAX, the scan in
`aggregation.py` stores two arrays per layer for it: the tokens, and the float32 sum. Here the forward pass stores the
tokens alone, and the backward pass sums those of a group again. So a step stores no more than without aggregation.

What a layer stores for its own gradient is what the function that `jax.vjp` returns holds, a pytree, according to the
remat policy. Those of its arrays that are the layer's arguments are left out (`Pullback`) and put back in the backward
pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float

from jvgen.models.video_dit.aggregation import Layer, Plan, RunningSum, constrain_tokens, mix
from jvgen.nn.stacked import Remat, Stacked, checkpointed
from jvgen.parallel import axes


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
) -> Float[Array, "B L D"]:
    """As `aggregation.run_layers`."""
    # The backward pass may be traced after this context has ended.
    partitioner = axes.current()
    window = int(plan.count.max())

    def compute(plan: Plan) -> Callable[..., jax.Array]:
        def one_layer(variables: Any, read: jax.Array, condition: Any, constants: Any) -> jax.Array:
            return layer(blocks.layer(variables), plan.layer, read, condition, constants)

        return checkpointed(one_layer, remat, in_scan=not unroll)

    def scan(body: Callable, carry: Any, per_layer: Any, *, reverse: bool = False) -> tuple[Any, Any]:
        per_layer = jax.tree.map(jnp.asarray, per_layer)
        return jax.lax.scan(body, carry, per_layer, reverse=reverse, unroll=blocks.count if unroll else 1)

    @jax.custom_vjp
    def run(variables: Any, gates: jax.Array, tokens: jax.Array, condition: Any, constants: Any) -> jax.Array:
        def body(carry: RunningSum, of_layer: tuple) -> tuple[RunningSum, None]:
            variables, gate, plan = of_layer
            output = compute(plan)(variables, carry.mixed(gate, plan.count), condition, constants)
            return carry.add(output, plan.resets), None

        return scan(body, RunningSum.start(tokens), (variables, gates, plan))[0].hidden

    def forward(variables: Any, gates: jax.Array, tokens: jax.Array, condition: Any, constants: Any) -> tuple:
        def body(carry: RunningSum, of_layer: tuple) -> tuple[RunningSum, tuple]:
            variables, gate, plan = of_layer
            arguments = (variables, carry.mixed(gate, plan.count), condition, constants)
            output, pullback = vjp(compute(plan), *arguments)
            return carry.add(output, plan.resets), (carry.hidden, pullback)

        last, (between, pullbacks) = scan(body, RunningSum.start(tokens), (variables, gates, plan))
        return last.hidden, (variables, gates, condition, constants, between, pullbacks)

    def backward(residuals: tuple, gradient: jax.Array) -> tuple:
        variables, gates, condition, constants, between, pullbacks = residuals

        def body(carry: tuple, of_layer: tuple) -> tuple[tuple, tuple]:
            d_hidden, d_total, d_condition = carry
            variables, gate, plan, hidden, pullback = of_layer
            read = mix(hidden, group_mean(between, plan, window), gate)
            d_output = (d_hidden.astype(jnp.float32) + d_total).astype(d_hidden.dtype)
            d_variables, d_read, d_condition_here, _ = pullback(d_output, variables, read, condition, constants)
            # The mean is computed again here, so that it is not kept in memory during the backward pass of the layer.
            plan, d_read = jax.lax.optimization_barrier((plan, d_read))
            exact = d_read.astype(jnp.float32)
            hidden = jax.lax.dynamic_index_in_dim(between, plan.layer, keepdims=False).astype(jnp.float32)
            d_gate = jnp.sum(exact * (group_mean(between, plan, window) - hidden), axis=(0, 1))
            d_gate = d_gate if gate.shape == d_gate.shape else jnp.sum(d_gate, keepdims=True)
            d_hidden = ((1.0 - gate) * exact).astype(d_read.dtype)
            d_total = constrain_tokens(gate / plan.count * exact + jnp.where(plan.resets, 0.0, d_total))
            d_condition = jax.tree.map(jnp.add, d_condition, d_condition_here)
            return (d_hidden, d_total, d_condition), (d_variables, d_gate)

        start = (gradient, jnp.zeros(gradient.shape, jnp.float32), jax.tree.map(jnp.zeros_like, condition))
        per_layer = (variables, gates, plan, between, pullbacks)
        with axes.partitioned(partitioner):
            (d_hidden, d_total, d_condition), (d_variables, d_gates) = scan(body, start, per_layer, reverse=True)
        d_tokens = (d_hidden.astype(jnp.float32) + d_total).astype(d_hidden.dtype)
        return d_variables, d_gates, d_tokens, d_condition, None

    run.defvjp(forward, backward)
    return run(blocks.variables(), gates, tokens, condition, constants)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pullback:
    """The pullback of a function, without the arrays that are its arguments.

    Attributes:
      saved: what it holds besides arguments: arrays, and numbers that JAX keeps as NumPy's.
      sources: for each array that it holds, the number of the argument that the array is, or None.
      structure: the pullback that `jax.vjp` returned, as a tree of these arrays.
    """

    saved: list[Any]
    sources: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, gradient: Any, *arguments: Any) -> tuple:
        """Gradients of the arguments from that of the output. The arguments are those of the forward pass."""
        given, saved = jax.tree.leaves(arguments), iter(self.saved)
        arrays = [next(saved) if source is None else given[source] for source in self.sources]
        return jax.tree.unflatten(self.structure, arrays)(gradient)


def vjp(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Pullback]:
    """As `jax.vjp`. Which of the saved arrays are arguments is read from the jaxpr, whose outputs they then are."""
    closed, made = jax.make_jaxpr(functools.partial(jax.vjp, function), return_shape=True)(*arguments)
    output, pullback = jax.tree.unflatten(jax.tree.structure(made), jaxpr_as_fun(closed)(*jax.tree.leaves(arguments)))
    numbers = {id(variable): number for number, variable in enumerate(closed.jaxpr.invars)}
    arrays, structure = jax.tree.flatten(pullback)
    sources = tuple(numbers.get(id(variable)) for variable in closed.jaxpr.outvars[-len(arrays) :])
    saved = [array for array, source in zip(arrays, sources, strict=True) if source is None]
    return output, Pullback(saved, sources, structure)


def group_mean(between: Float[Array, "G B L D"], plan: Plan, window: int) -> Float[Array, "B L D"]:
    """What one layer averages, float32, from the stored inputs of all layers.

    Args:
      between: tokens before each layer.
      plan: the entries of one layer.
      window: maximum number of averaged inputs.
    """
    start = jnp.minimum(plan.first, between.shape[0] - window)
    total = jnp.zeros(between.shape[1:], jnp.float32)
    # A sum of slices: XLA would write the window of a single reduction to memory in float32.
    for index in (start + offset for offset in range(window)):
        tokens = jax.lax.dynamic_index_in_dim(between, index, keepdims=False).astype(jnp.float32)
        total += jnp.where((index >= plan.first) & (index <= plan.layer), tokens, 0.0)
    return total / plan.count
