"""The inputs and outputs of every layer and of its attention, for analysis and tests, without gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.models.video_dit.aggregation import RunningSum, aggregation_plan
from jvgen.models.video_dit.config import AggregationConfig
from jvgen.models.video_dit.model import BlockContext, TokenLayout, VideoDiT


class LayerActivations(NamedTuple):
    """Activations of one layer, for all rows of the sequence.

    Attributes:
      hidden: output of the previous layer (the embedded sequence for the first).
      mean: what aggregation averages, or would average in a network without it.
      read: input of the layer.
      output: output of the layer.
      query, key: normed and rotated.
      layout: what the rows are.
    """

    hidden: Float[Array, "B L D"]
    mean: Float[Array, "B L D"]
    read: Float[Array, "B L D"]
    output: Float[Array, "B L D"]
    query: Float[Array, "B L N D"]
    key: Float[Array, "B L N D"]
    layout: TokenLayout


Probe = Callable[[LayerActivations], Any]


def probe_layers(
    model: VideoDiT,
    tokens: Float[Array, "B L D"],
    context: BlockContext,
    probe: Probe,
    *,
    period: int = AggregationConfig().period,
) -> tuple[Float[Array, "B L D"], Any]:
    """Run all layers and apply a function to the activations of each.

    Args:
      model: with parameters in it (`Network.bind`).
      tokens: embedded sequence.
      context: as the layers get it; its attention_scale is ignored.
      probe: from activations to a tree of arrays. Only this tree is kept, so it should reduce the activations.
      period: of the means in a network without aggregation.

    Returns:
      The last tokens, and the results of `probe`, stacked over layers.
    """
    aggregation, layers = model.config.aggregation, model.config.layers
    plans = aggregation_plan(layers, period if aggregation is None else aggregation.period)
    # With a gate of zero a layer reads the tokens alone.
    gates = jnp.zeros((layers, 1)) if aggregation is None else model.aggregation.values()

    def body(carry: RunningSum, of_layer: tuple) -> tuple[RunningSum, Any]:
        variables, gate, plan = of_layer
        attended: list[jax.Array] = []

        def record(query: jax.Array, key: jax.Array, layout: TokenLayout, layer: jax.Array) -> jax.Array:
            attended.extend((query, key))
            return jnp.ones((1, 1))

        read = carry.mixed(gate, plan.count)
        recorded = dataclasses.replace(context, attention_scale=record, layer=plan.layer)
        output = model.blocks.layer(variables)(read, recorded)
        mean = carry.total / plan.count
        activations = LayerActivations(carry.hidden, mean, read, output, *attended, context.layout)
        return carry.add(output, plan.resets), probe(activations)

    per_layer = (model.blocks.variables(), gates, jax.tree.map(jnp.asarray, plans))
    last, probed = jax.lax.scan(body, RunningSum.start(tokens), per_layer)
    return last.hidden, probed
