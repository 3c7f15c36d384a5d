"""Adversarial training of autoencoders: the discriminator, its loss, and the term it adds to the autoencoder's loss."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jvgen.config import Config
from jvgen.losses.adversarial import adaptive_weight, hinge_discriminator, hinge_generator
from jvgen.models.clip_discriminator.config import ClipDiscriminatorConfig
from jvgen.models.clip_discriminator.model import ClipDiscriminator
from jvgen.nn.network import Network, Parameters
from jvgen.tasks.pixels import check_channels
from jvgen.tasks.task import Batch, Metrics, activation_dtype
from jvgen.value_rules import Positive, Step, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    """A discriminator of clips, with the hinge loss and VQGAN's adaptive weight.

    Attributes:
      network: the discriminator.
      weight: factor on the adaptive weight.
      start: first step in which the discriminator is trained and the autoencoder is trained against it.
      update_schedule: "together": both are updated in every step and share its forward pass; "alternate": the
        autoencoder in even steps, the discriminator in odd ones, as in the released code.
      limit: largest adaptive weight, as the published code states it.
      limit_of: what the reconstruction loss is in the code that `limit` is stated for: "mean" over pixel values (VQGAN,
        iVideoGPT), or "sum" over the 3HW values of a frame (Stable Diffusion's autoencoder, CV-VAE). Here it is a mean,
        so with "sum" the weight is limited to limit / (3HW): 1e4 becomes 0.051 for frames of 256x256.
      norm_epsilon: added to the norm of the adversarial gradient, by which is divided.
      norm_floor: smallest norm that is divided by. iVideoGPT's code has norm_epsilon 0 and norm_floor 1e-8.
    """

    renamed_fields: ClassVar[dict[str, str]] = {"turns": "update_schedule"}

    network: ClipDiscriminatorConfig = ClipDiscriminatorConfig()
    weight: Weight = 0.5
    start: Step = 0
    update_schedule: Literal["together", "alternate"] = "together"
    limit: Positive = 1e4
    limit_of: Literal["mean", "sum"] = "mean"
    norm_epsilon: Weight = 1e-4
    norm_floor: Weight = 0.0

    def validate(self) -> None:
        check_channels("network.channels", self.network.channels)
        if self.norm_epsilon + self.norm_floor == 0:
            raise ValueError(
                f"norm_epsilon = {self.norm_epsilon}, norm_floor = {self.norm_floor}: one must be positive, because "
                "the norm of a gradient that is zero is divided by otherwise."
            )

    def limit_for(self, height: int, width: int, channels: int = 3) -> float:
        """The largest adaptive weight in the units of a loss that is a mean, for frames of this size."""
        return self.limit / (height * width * channels if self.limit_of == "sum" else 1)


class AdversarialLoss:
    """The losses of an `AdversarialConfig`; `network` is the discriminator, which has an objective of its own."""

    def __init__(self, config: AdversarialConfig):
        self.config = config
        self.network = Network.of(lambda rngs: ClipDiscriminator(config.network, rngs=rngs))

    def scores(self, discriminator: Parameters, clips: jax.Array) -> jax.Array:
        """Scores of the patches of clips `B F H W C`; higher means real."""
        return self.network.apply(discriminator, clips.astype(activation_dtype(discriminator)))

    def generator_loss(
        self,
        discriminator: Parameters,
        batch: Batch,
        clips: Sequence[jax.Array],
        reconstruction_grads: Sequence[jax.Array],
        last_kernel_grad: Callable[[Sequence[jax.Array]], jax.Array],
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """The term that the autoencoder's loss gets from the discriminator, with its gradients; 0 before the start.

        Nothing returned has a gradient: gradients with respect to the clips are values (see `surrogate_loss`).

        Args:
          discriminator: parameters.
          batch: with the number of the step.
          clips: reconstructed by the autoencoder.
          reconstruction_grads: gradients of the other losses with respect to the clips.
          last_kernel_grad: from gradients with respect to the clips to the gradient of the last layer's kernel.

        Returns:
          Weight and value of the loss, and its gradients with respect to the clips, not weighted.
        """
        discriminator, clips = jax.lax.stop_gradient((discriminator, list(clips)))

        def hinge(clips: list[jax.Array]) -> jax.Array:
            return jnp.mean(jnp.stack([hinge_generator(self.scores(discriminator, clip)) for clip in clips]))

        def started(clips: list[jax.Array]) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
            value, adversarial_grads = jax.value_and_grad(hinge)(clips)
            kernel_grads = last_kernel_grad(reconstruction_grads), last_kernel_grad(adversarial_grads)
            config, (height, width, channels) = self.config, clips[0].shape[-3:]
            weight = adaptive_weight(
                *kernel_grads, limit=config.limit_for(height, width, channels), epsilon=config.norm_epsilon,
                floor=config.norm_floor,
            )  # fmt: skip
            return self.config.weight * weight, value, adversarial_grads

        def not_started(clips: list[jax.Array]) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
            return jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, clips)

        return self._from_start(batch, started, not_started, clips)

    def discriminator_loss(
        self, discriminator: Parameters, batch: Batch, real: jax.Array, reconstructed: Sequence[jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """Hinge loss of real against reconstructed clips, which get no gradient; 0 before the start."""
        reconstructed = jax.lax.stop_gradient(list(reconstructed))

        def started(discriminator: Parameters) -> tuple[jax.Array, jax.Array, jax.Array]:
            real_scores = self.scores(discriminator, real)
            all_scores = [self.scores(discriminator, clip) for clip in reconstructed]
            losses = jnp.stack([hinge_discriminator(real_scores, scores) for scores in all_scores])
            means = (jnp.mean(scores.astype(jnp.float32)) for scores in (real_scores, all_scores[0]))
            return jnp.mean(losses), *means

        def not_started(discriminator: Parameters) -> tuple[jax.Array, jax.Array, jax.Array]:
            return jnp.float32(0), jnp.float32(0), jnp.float32(0)

        loss, of_real, of_made = self._from_start(batch, started, not_started, discriminator)
        return loss, {"hinge": loss, "judged_real": of_real, "judged_made": of_made}

    def _from_start(self, batch: Batch, started: Callable, not_started: Callable, operand: object) -> tuple:
        if not self.config.start or "step" not in batch:
            return started(operand)
        return jax.lax.cond(jnp.max(batch["step"]) >= self.config.start, started, not_started, operand)
