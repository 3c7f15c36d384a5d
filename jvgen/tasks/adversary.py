"""A discriminator to train an autoencoder against: its configuration, its loss, and what it adds to the other's."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jvgen.config import Config
from jvgen.losses.adversarial import adaptive_weight, hinge_discriminator, hinge_generator
from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.models.clip_discriminator.model import ClipDiscriminator
from jvgen.nn.network import Network, Parameters
from jvgen.tasks.task import Batch, Metrics, activation_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    """A discriminator of clips, with the hinge loss and VQGAN's adaptive weight.

    Attributes:
      network: the discriminator.
      weight: factor on the adaptive weight.
      start: the step at which it begins to act and to learn.
      turns: "together": both are trained in every step, and share its forward pass; "alternate": the autoencoder in
        even steps, the discriminator in odd ones, as the released code does.
      limit: largest adaptive weight.
    """

    network: ClipDiscriminatorConfig = ClipDiscriminatorConfig()
    weight: float = 0.5
    start: int = 0
    turns: Literal["together", "alternate"] = "together"
    limit: float = 1e4

    def validate(self) -> None:
        if self.weight < 0 or self.start < 0 or self.limit <= 0:
            raise ValueError(
                f"weight = {self.weight}, start = {self.start}, limit = {self.limit}: 0 or more each, limit positive."
            )


class Adversary:
    """An `AdversarialConfig` put to use; `network` is trained by an objective of its own."""

    def __init__(self, config: AdversarialConfig):
        self.config = config
        self.network = Network.of(lambda rngs: ClipDiscriminator(config.network, rngs=rngs))

    def judge(self, discriminator: Parameters, clips: jax.Array) -> jax.Array:
        """How real the patches of clips `B F H W C` look."""
        return self.network.apply(discriminator, clips.astype(activation_dtype(discriminator)))

    def push(
        self,
        discriminator: Parameters,
        batch: Batch,
        clips: Sequence[jax.Array],
        pulls: Sequence[jax.Array],
        of_last_kernel: Callable[[Sequence[jax.Array]], jax.Array],
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """What the autoencoder's loss against the discriminator adds to its other losses.

        Nothing here has a gradient: it is computed, and returned.

        Args:
          discriminator: parameters.
          batch: with the number of the step.
          clips: made by the autoencoder.
          pulls: gradients of the other losses with respect to them.
          of_last_kernel: from gradients with respect to the clips to the gradient of the last layer's kernel.

        Returns:
          Weight and value of the loss, and its gradients with respect to the clips, not weighted.
        """
        discriminator, clips = jax.lax.stop_gradient((discriminator, list(clips)))

        def hinge(clips: list[jax.Array]) -> jax.Array:
            return jnp.mean(jnp.stack([hinge_generator(self.judge(discriminator, clip)) for clip in clips]))

        def act(clips: list[jax.Array]) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
            value, pushes = jax.value_and_grad(hinge)(clips)
            weight = adaptive_weight(of_last_kernel(pulls), of_last_kernel(pushes), limit=self.config.limit)
            return self.config.weight * weight, value, pushes

        def rest(clips: list[jax.Array]) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
            return jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, clips)

        return self._once_started(batch, act, rest, clips)

    def loss(
        self, discriminator: Parameters, batch: Batch, real: jax.Array, made: Sequence[jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """The hinge loss of real clips against made ones, which get no gradient; zero before the start."""
        made = jax.lax.stop_gradient(list(made))

        def act(discriminator: Parameters) -> tuple[jax.Array, jax.Array, jax.Array]:
            of_real = self.judge(discriminator, real)
            of_made = [self.judge(discriminator, clip) for clip in made]
            losses = jnp.stack([hinge_discriminator(of_real, one) for one in of_made])
            return jnp.mean(losses), jnp.mean(of_real.astype(jnp.float32)), jnp.mean(of_made[0].astype(jnp.float32))

        def rest(discriminator: Parameters) -> tuple[jax.Array, jax.Array, jax.Array]:
            return jnp.float32(0), jnp.float32(0), jnp.float32(0)

        loss, of_real, of_made = self._once_started(batch, act, rest, discriminator)
        return loss, {"hinge": loss, "judged_real": of_real, "judged_made": of_made}

    def _once_started(self, batch: Batch, act: Callable, rest: Callable, given: object) -> tuple:
        if not self.config.start or "step" not in batch:
            return act(given)
        return jax.lax.cond(jnp.max(batch["step"]) >= self.config.start, act, rest, given)
