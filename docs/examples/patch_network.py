"""A network of one's own: patches of a frame through a narrow layer and back."""

import dataclasses

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.models.weight_map import LINEAR, Entry, WeightMap
from jvgen.nn.linear import Linear
from jvgen.parallel import axes
from jvgen.value_rules import Count, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig(Config):
    """Patches through a bottleneck.

    Attributes:
      patch: rows and columns of a patch, in pixels.
      width: channels of the bottleneck.
    """

    patch: Count = 4
    width: Width = 8


class PatchNetwork(nnx.Module):
    """B H W 3 -> B H W 3; the patch divides height and width."""

    def __init__(self, config: PatchConfig, *, rngs: nnx.Rngs):
        self.patch = config.patch
        pixels = 3 * config.patch**2
        # Names of axes, not of a mesh: jvgen/parallel/rules.py decides what is split, and over what.
        self.encode = Linear(pixels, config.width, axes=(axes.EMBED, axes.MLP), rngs=rngs)
        self.decode = Linear(config.width, pixels, axes=(axes.MLP, axes.EMBED), rngs=rngs)

    def __call__(self, frames: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        p = self.patch
        patches = rearrange(frames, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        decoded = self.decode(jax.nn.gelu(self.encode(patches)))
        return rearrange(decoded, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)


def weight_map() -> WeightMap:
    """Its parameters in a PyTorch state dict: this table reads and writes files, in both directions."""
    entries = []
    for name in ("encode", "decode"):
        entries += [Entry(f"{name}/kernel", f"{name}.weight", LINEAR), Entry(f"{name}/bias", f"{name}.bias")]
    return WeightMap(tuple(entries))
