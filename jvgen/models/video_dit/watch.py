"""What goes on between and inside layers, made visible: for pictures and tests, without gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.models.video_dit.aggregation import Sum, plan
from jvgen.models.video_dit.config import AggregationConfig
from jvgen.models.video_dit.model import BlockContext, TokenLayout, VideoDiT


class LayerView(NamedTuple):
    """One layer at work. All rows of the sequence, `B L D`; those of attention `B L N D`.

    Attributes:
      hidden: what the layer before left (the embedded sequence before the first).
      mean: what aggregation averages, or would average in a network without it.
      read: what the layer computes with.
      output: what it leaves.
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


Watch = Callable[[LayerView], Any]


def watch_layers(
    model: VideoDiT,
    tokens: Float[Array, "B L D"],
    context: BlockContext,
    watch: Watch,
    *,
    period: int = AggregationConfig().period,
) -> tuple[Float[Array, "B L D"], Any]:
    """Run all blocks and look at each.

    Args:
      model: with parameters in it (`Network.bind`).
      tokens: embedded sequence.
      context: as the blocks get it; an attention_scale in it is left out.
      watch: from a view to a tree of arrays; what it leaves out is not kept, so let it reduce what it sees.
      period: of the means in a network without aggregation.

    Returns:
      The last tokens, and what `watch` returned, stacked over layers.
    """
    aggregation, layers = model.config.aggregation, model.config.layers
    steps = plan(layers, period if aggregation is None else aggregation.period)
    # A gate of zero lets the tokens through as they are.
    gates = jnp.zeros((layers, 1)) if aggregation is None else model.aggregation.values()

    def body(carry: Sum, scanned: tuple) -> tuple[Sum, Any]:
        variables, gate, step = scanned
        seen: list[jax.Array] = []

        def look(query: jax.Array, key: jax.Array, layout: TokenLayout, number: jax.Array) -> jax.Array:
            seen.extend((query, key))
            return jnp.ones((1, 1))

        read = carry.input(gate, step.count)
        looked_at = dataclasses.replace(context, attention_scale=look, layer=step.layer)
        output = model.blocks.layer(variables)(read, looked_at)
        view = LayerView(carry.hidden, carry.total / step.count, read, output, *seen, context.layout)
        return carry.after(output, step.resets), watch(view)

    scanned = (model.blocks.variables(), gates, jax.tree.map(jnp.asarray, steps))
    last, watched = jax.lax.scan(body, Sum.of(tokens), scanned)
    return last.hidden, watched
