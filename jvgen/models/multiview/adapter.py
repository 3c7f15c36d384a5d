"""Low-rank matrices added to those of attention, switched on for one kind of data (Hu et al. 2021, arXiv 2106.09685).

They are added to the parameters and not inside the network, which so knows nothing of them.
"""

import jax.numpy as jnp
from flax import nnx

from jvgen.nn.network import Parameters
from jvgen.parallel import axes

MATRICES = ("query", "key", "value", "output")


class LowRank(nnx.Module):
    """Two factors of a matrix for each layer; their product is zero at first."""

    def __init__(self, layers: int, features: int, *, rank: int, rngs: nnx.Rngs):
        down = nnx.initializers.normal(1.0 / rank)(rngs.params(), (layers, features, rank), jnp.float32)
        self.down = nnx.Param(down, logical_axes=(axes.LAYERS, axes.EMBED, None))
        self.up = nnx.Param(
            jnp.zeros((layers, rank, features), jnp.float32), logical_axes=(axes.LAYERS, None, axes.EMBED)
        )


class AttentionAdapter(nnx.Module):
    """A `LowRank` for queries, keys, values and outputs of all blocks."""

    def __init__(self, layers: int, features: int, *, rank: int, rngs: nnx.Rngs):
        for name in MATRICES:
            setattr(self, name, LowRank(layers, features, rank=rank, rngs=rngs))


def merged(denoiser: Parameters, adapter: Parameters, scale: float = 1.0) -> Parameters:
    """Parameters of a `VideoDiT` with those of an `AttentionAdapter` added to its attention, `scale` times."""
    layers = denoiser["blocks"]["layers"]
    attention = dict(layers["attention"])
    for name in MATRICES:
        kernel, factors = attention[name]["kernel"], adapter[name]
        added = jnp.einsum("lir,lro->lio", factors["down"], factors["up"])
        attention[name] = {**attention[name], "kernel": kernel + (scale * added).astype(kernel.dtype)}
    return {**denoiser, "blocks": {"layers": {**layers, "attention": attention}}}
