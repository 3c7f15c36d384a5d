"""Feed-forward blocks: two matrices with GELU between them, and the gated form with three (T5, Llama)."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from jvgen.nn.linear import Initializer, Linear
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

DEFAULT_INIT = nnx.initializers.normal(0.02)
Activation = Callable[[jax.Array], jax.Array]
GELU: Activation = functools.partial(jax.nn.gelu, approximate=True)


class FeedForward(nnx.Module):
    """`output(gelu(hidden(x)))` over `B L D`.

    Args:
      features: width of input and output.
      hidden: width between the matrices.
      exact_gelu: GELU itself, not its tanh approximation.
      output_init: initializer of the second matrix.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        exact_gelu: bool = False,
        output_init: Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        self.exact_gelu = exact_gelu
        self.hidden = Linear(features, hidden, axes=(axes.EMBED, axes.MLP), rngs=rngs)
        self.output = Linear(hidden, features, axes=(axes.MLP, axes.EMBED), kernel_init=output_init, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        hidden = constrain(self.hidden(x), axes.BATCH, axes.LENGTH, axes.ACTIVATION_MLP)

        def activate(hidden: jax.Array) -> jax.Array:
            return self.output(jax.nn.gelu(hidden, approximate=not self.exact_gelu))

        # The backward pass recomputes GELU: one of the widest arrays of a block is stored, instead of six.
        return jax.checkpoint(activate, prevent_cse=False)(hidden)


class GatedFeedForward(nnx.Module):
    """`output(activation(gate(x)) * hidden(x))`.

    Args:
      features: width of input and output.
      hidden: width between the matrices.
      activation: by default GELU by its tanh approximation (T5 v1.1); SiLU for Llama.
      bias: of all three matrices.
      input_init, output_init: initializers of the first two matrices and of the last.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Activation = GELU,
        bias: bool = False,
        input_init: Initializer = DEFAULT_INIT,
        output_init: Initializer = DEFAULT_INIT,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        into, out = (axes.EMBED, axes.MLP), (axes.MLP, axes.EMBED)
        self.gate = Linear(features, hidden, axes=into, bias=bias, kernel_init=input_init, rngs=rngs)
        self.hidden = Linear(features, hidden, axes=into, bias=bias, kernel_init=input_init, rngs=rngs)
        self.output = Linear(hidden, features, axes=out, bias=bias, kernel_init=output_init, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        hidden = self.activation(self.gate(x)) * self.hidden(x)
        return self.output(constrain(hidden, axes.BATCH, axes.LENGTH, axes.ACTIVATION_MLP))
