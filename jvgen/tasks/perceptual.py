"""The perceptual distance of a task: which network it needs, where its weights come from, and the distance itself."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.interop.digest import content_digest
from jvgen.losses.perceptual import LPIPS, PerceptualConfig, laplacian_distance, load_lpips
from jvgen.nn.network import Network, Parameters

NAME = "lpips"


class Perceptual:
    """A `PerceptualConfig` put to use; `networks` joins a task's frozen networks."""

    def __init__(self, config: PerceptualConfig):
        self.config = config
        self.networks: dict[str, Network] = {}
        if config.kind == "lpips":
            self.networks[NAME] = Network.of(lambda rngs: LPIPS(rngs=rngs))

    @property
    def measures(self) -> bool:
        """Whether there is a distance at all."""
        return self.config.kind != "none"

    @property
    def metric(self) -> str:
        """What the distance is called in logs: it is not comparable between kinds."""
        return f"perceptual_{self.config.kind}"

    def load(self) -> Parameters:
        """Parameters of `networks`, by name."""
        return {NAME: load_lpips(self.config.weights)} if self.networks else {}

    def digest(self) -> str:
        """Content hash of the weights; empty without."""
        return "" if self.config.weights is None else content_digest(self.config.weights)

    def distance(
        self, frozen: Parameters, made: Float[Array, "B H W 3"], target: Float[Array, "B H W 3"]
    ) -> Float[Array, "B"]:
        """Distance of images in [-1, 1], one an image, float32; zeros for kind "none"."""
        made, target = made.astype(jnp.float32), target.astype(jnp.float32)
        if self.config.kind == "lpips":
            return self.networks[NAME].apply(frozen[NAME], made, target)
        if self.config.kind == "laplacian":
            return laplacian_distance(made, target, self.config.levels)
        return jnp.zeros(made.shape[:1], jnp.float32)


def check_weights(config: PerceptualConfig) -> None:
    """Raise `ValueError` for weights that are missing or of another network."""
    if config.weights is not None:
        load_lpips(config.weights)
