"""The perceptual distance of a task: its frozen network, its weights and the distance."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvgen.interop.digest import content_digest
from jvgen.losses.perceptual import LPIPS, PerceptualConfig, laplacian_distance, load_lpips
from jvgen.nn.network import Network, Parameters

NAME = "lpips"


class PerceptualDistance:
    """The distance of a `PerceptualConfig`.

    Attributes:
      networks: to add to a task's frozen networks; empty for distances without weights.
    """

    def __init__(self, config: PerceptualConfig):
        self.config = config
        self.networks: dict[str, Network] = {}
        if config.kind == "lpips":
            self.networks[NAME] = Network.of(lambda rngs: LPIPS(rngs=rngs))

    @property
    def enabled(self) -> bool:
        """Whether there is a distance."""
        return self.config.kind != "none"

    @property
    def metric_name(self) -> str:
        """Name of the distance in logs; it contains the kind, because kinds are not comparable."""
        return f"perceptual_{self.config.kind}"

    def load(self) -> Parameters:
        """Parameters of `networks`, by name."""
        return {NAME: load_lpips(self.config.weights)} if self.networks else {}

    def digest(self) -> str:
        """Content hash of the weights; empty without weights."""
        return "" if self.config.weights is None else content_digest(self.config.weights)

    def distance(
        self, frozen: Parameters, images: Float[Array, "B H W 3"], target: Float[Array, "B H W 3"]
    ) -> Float[Array, "B"]:
        """Distance per image, float32, of images in [-1, 1]; zeros for kind "none"."""
        images, target = images.astype(jnp.float32), target.astype(jnp.float32)
        if self.config.kind == "lpips":
            return self.networks[NAME].apply(frozen[NAME], images, target)
        if self.config.kind == "laplacian":
            return laplacian_distance(images, target, self.config.levels)
        return jnp.zeros(images.shape[:1], jnp.float32)


def check_weights(config: PerceptualConfig) -> None:
    """Raise `ValueError` for weights that are missing or of another network."""
    if config.weights is not None:
        load_lpips(config.weights)
