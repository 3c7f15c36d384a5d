"""A LoRA adapter for the attention of a `VideoDiT` (Hu et al. 2021, arXiv 2106.09685), switched on per kind of data.

It is merged into the parameters before the network runs, so the network itself is unchanged.
"""

import jax.numpy as jnp
from flax import nnx

from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.precision import product_precision

MATRICES = ("query", "key", "value", "output")


class LoRA(nnx.Module):
    """Two factors of an update of one square matrix in each layer; the update is zero at initialization."""

    def __init__(self, layers: int, features: int, *, rank: int, rngs: nnx.Rngs):
        down = nnx.initializers.normal(1.0 / rank)(rngs.params(), (layers, features, rank), jnp.float32)
        self.down = nnx.Param(down, logical_axes=(axes.LAYERS, axes.EMBED, None))
        self.up = nnx.Param(
            jnp.zeros((layers, rank, features), jnp.float32), logical_axes=(axes.LAYERS, None, axes.EMBED)
        )


class AttentionLoRA(nnx.Module):
    """A `LoRA` for the query, key, value and output matrices of all blocks."""

    def __init__(self, layers: int, features: int, *, rank: int, rngs: nnx.Rngs):
        for name in MATRICES:
            setattr(self, name, LoRA(layers, features, rank=rank, rngs=rngs))


def merge_lora(denoiser: Parameters, adapter: Parameters, scale: float = 1.0) -> Parameters:
    """Parameters of a `VideoDiT` with `scale` times the updates of an `AttentionLoRA` added to its attention."""
    layers = denoiser["blocks"]["layers"]
    attention = dict(layers["attention"])
    for name in MATRICES:
        kernel, factors = attention[name]["kernel"], adapter[name]
        down, up = factors["down"], factors["up"]
        update = jnp.einsum("lir,lro->lio", down, up, precision=product_precision(down.dtype, up.dtype))
        attention[name] = {**attention[name], "kernel": kernel + (scale * update).astype(kernel.dtype)}
    return {**denoiser, "blocks": {"layers": {**layers, "attention": attention}}}
