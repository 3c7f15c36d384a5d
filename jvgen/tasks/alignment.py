"""Representation alignment: hidden states of the denoiser beside features of a frozen image encoder, in training."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jvgen.config import Config
from jvgen.interop.architecture import check_architecture
from jvgen.interop.from_torch import import_folder
from jvgen.losses.alignment import AlignmentLoss, cross_frame_alignment
from jvgen.models.dinov2 import flops
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.dinov2.model import Dinov2, prepared
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network, Parameters, run_frozen
from jvgen.parallel import axes
from jvgen.tasks.task import Mean, activation_dtype
from jvgen.value_rules import CountOrZero, Positive, Steps, Width

# Names of the networks, the trained one last by the alphabet: the others begin as they do without it.
ENCODER, PROJECTION = "image_encoder", "visual_projection"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig(Config):
    """Alignment of a block's tokens with an image encoder's features (CREPA, arXiv 2506.09229; REPA, arXiv 2410.06940).

    Each latent frame is compared with the last recorded frame that it stands for, resized so that the encoder has as
    many patches as the denoiser has tokens. The alignment is part of the training loss alone.

    Attributes:
      encoder: the frozen image encoder.
      weights: its folder, as `Dinov2Model` of transformers or `jvgen export` writes it.
      layer: block whose output is aligned, from 0.
      weight: of the alignment beside the diffusion loss, at the beginning.
      decay_steps: steps in which the weight falls to zero, in a straight line; from then on the encoder does not run.
        None keeps the weight.
      distance: frames before and after a frame that its hidden states are aligned with; 0 for its own alone (REPA).
      decay: features of a frame that is n frames away count exp(-n / decay).
      hidden: width of the trained projection's two hidden layers.
    """

    encoder: Dinov2Config = Dinov2Config()
    weights: str | None = None
    layer: CountOrZero = 7
    weight: Positive = 0.5
    decay_steps: Steps | None = None
    distance: CountOrZero = 1
    decay: Positive = 1.0
    hidden: Width = 2048

    def check_denoiser(self, denoiser: VideoDiTConfig) -> None:
        """Raise `ValueError` for a denoiser without such a layer."""
        if self.layer >= denoiser.layers:
            raise ValueError(
                f"alignment.layer = {self.layer}: the last block is {denoiser.layers - 1}; take that or less."
            )
        if denoiser.aggregation is not None and denoiser.aggregation.memory_saving:
            raise ValueError(
                "alignment with denoiser.aggregation.memory_saving = True: its backward pass gives no hidden states; "
                "set denoiser.aggregation.memory_saving = false, which gives the same numbers."
            )

    def check_weights(self) -> None:
        """Raise `ValueError` for weights that are not named, missing, or of another encoder."""
        if self.weights is None:
            raise ValueError(
                "task.alignment.weights = none: name a local folder of `Dinov2Model`, such as weights/dinov2-base."
            )
        check_architecture(self.weights, self.encoder, "task.alignment.weights")


class Projection(nnx.Module):
    """Hidden states to the width of the features: three linear layers with SiLU between them, as in REPA."""

    def __init__(self, width: int, hidden: int, features: int, *, rngs: nnx.Rngs):
        self.first = Linear(width, hidden, axes=(axes.EMBED, axes.MLP), rngs=rngs)
        self.second = Linear(hidden, hidden, axes=(axes.MLP, axes.EMBED), rngs=rngs)
        self.output = Linear(hidden, features, axes=(axes.EMBED, axes.MLP), rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
        return self.output(jax.nn.silu(self.second(jax.nn.silu(self.first(hidden)))))


class Alignment:
    """The two networks and the loss of an `AlignmentConfig`; its methods with parameters are traced under `jax.jit`.

    Attributes:
      encoder: the frozen image encoder.
      projection: the trained network between the denoiser and the encoder's features.
    """

    def __init__(self, config: AlignmentConfig, width: int):
        self.config = config
        self.encoder = Network.of(lambda rngs: Dinov2(config.encoder, rngs=rngs))
        self.projection = Network.of(lambda rngs: Projection(width, config.hidden, config.encoder.width, rngs=rngs))

    def load(self) -> Parameters:
        """The encoder's weights; `AlignmentConfig.check_weights` checks the files."""
        return import_folder(self.config.weights)[1]

    def weight(self, step: jax.Array) -> jax.Array:
        """Factor on the alignment in a step, float32."""
        config = self.config
        if config.decay_steps is None:
            return jnp.full(step.shape, config.weight, jnp.float32)
        return config.weight * jnp.maximum(0.0, 1.0 - step.astype(jnp.float32) / config.decay_steps)

    def loss(
        self, parameters: Parameters, hidden: jax.Array, frames: jax.Array, grid: tuple[int, int, int], step: jax.Array
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """The weighted alignment, a scalar, and as a metric the mean cosine with features of the same frame.

        Args:
          parameters: of all networks by name.
          hidden: the denoiser's tokens `B F P D`.
          frames: one per frame of tokens, uint8 `B F h w 3`.
          grid: frames, rows and columns of tokens.
          step: number of steps before this one, int32.
        """
        weight = self.weight(step)

        def found(hidden: jax.Array) -> AlignmentLoss:
            return cross_frame_alignment(
                self.projected(parameters[PROJECTION], hidden), self.features(parameters[ENCODER], frames, grid),
                distance=self.config.distance, decay=self.config.decay,
            )  # fmt: skip

        if self.config.decay_steps is None:
            loss, similarity = found(hidden)
        else:
            none = jnp.zeros((len(hidden),), jnp.float32)
            loss, similarity = jax.lax.cond(weight > 0, found, lambda _: AlignmentLoss(none, none), hidden)
        count = len(hidden) * (weight > 0).astype(jnp.float32)
        return weight * jnp.mean(loss), {"alignment": Mean(jnp.sum(similarity), count)}

    def features(self, encoder: Parameters, frames: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """The encoder's features `B F P C` of frames, one per token."""
        patch, (_, rows, columns) = self.config.encoder.patch, grid

        def run() -> jax.Array:
            pixels = rearrange(frames, "b f h w c -> (b f) h w c").astype(jnp.float32) / 255.0
            images = prepared(pixels, (rows * patch, columns * patch))
            return self.encoder.apply(encoder, images, dtype=activation_dtype(encoder))[:, 1:]

        tokens = run_frozen(run, frames.shape[0] * frames.shape[1], axes.HEADS, axes.MLP)
        return rearrange(tokens, "(b f) p c -> b f p c", f=frames.shape[1])

    def projected(self, projection: Parameters, hidden: jax.Array) -> jax.Array:
        """Hidden states `B F P D` in the space of the features."""
        rows = self.projection.apply(projection, rearrange(hidden, "b f p d -> b (f p) d"))
        return rearrange(rows, "b (f p) c -> b f p c", f=hidden.shape[1])

    def flops(self, grid: tuple[int, int, int], width: int) -> dict[str, float]:
        """Forward FLOPs for one clip of tokens (frames, rows, columns), by network."""
        config, (frames, rows, columns) = self.config, grid
        patch, hidden = config.encoder.patch, config.hidden
        encoded = sum(flops.forward_flops(config.encoder, rows * patch, columns * patch).values())
        matrices = hidden * (width + hidden + config.encoder.width)
        return {ENCODER: frames * encoded, PROJECTION: float(2 * frames * rows * columns * matrices)}
