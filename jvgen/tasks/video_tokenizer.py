"""Training of iVideoGPT's tokenizer: context and future frames through two codebooks (arXiv 2405.15223)."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jvgen.config import Config
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.source_checks import check_pixels
from jvgen.diffusion.objective import slot_keys
from jvgen.evaluation.reconstruction import WINDOW, peak_signal_to_noise, structural_similarity
from jvgen.finite import Clips
from jvgen.losses.adversarial import surrogate_loss
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.losses.reconstruction import absolute_error, squared_error
from jvgen.models.clip_discriminator import flops as discriminator_flops
from jvgen.models.ivideogpt import flops
from jvgen.models.ivideogpt.codebook import Quantized, perplexity, usage
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer, Reconstruction
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.tasks.adversarial import AdversarialConfig, AdversarialLoss
from jvgen.tasks.perceptual import PerceptualDistance, check_weights
from jvgen.tasks.pixels import check_channels, signed_from_unit, unit_from_uint8, unit_to_clips
from jvgen.tasks.task import (
    ArraySpec,
    Batch,
    CodeUse,
    Mean,
    Metrics,
    Objective,
    Task,
    TaskConfig,
    activation_dtype,
)
from jvgen.value_rules import BelowOne, Bounds, Step, Weight

# Purposes folded into a step's key; they never change, so that saved runs resume exactly.
DROPOUT_KEY = 40
RESTART_KEY = 41
DISCRIMINATOR = "discriminator"
# A pixel of a future frame moves where some channel, in [0, 1], is this far from the last frame of the context.
MOVED = 0.08


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestartConfig(Config):
    """Restart of dead codes: codes that are hardly used are set to latents of the batch.

    The published tokenizer does not do this: its codebooks are trained by gradients alone.

    Attributes:
      every: steps between restarts; 0 for never.
      below: a code is dead when its running count is less than this share of the mean count.
      decay: of the running counts, per restart.
    """

    every: Step = 0
    below: Annotated[float, Bounds(above=0, below=1)] = 0.05
    decay: BelowOne = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoTokenizerConfig(TaskConfig):
    """Pixel error, perceptual distance and codebook loss of context and of future frames, equally weighted.

    Attributes:
      network: the tokenizer.
      reconstruction: pixel error, "l1" or "l2".
      perceptual: perceptual distance added to it.
      perceptual_weight: of that distance.
      moving_weight: the pixel error of future frames counts this many times more where they differ from the last frame
        of the context by over 0.08 in some channel; 0 as published.
      restart: of dead codes.
      adversarial: discriminator of single frames, or none, as in all published runs except RoboNet at 256x256: weight
        0.8, start 1e5 (counting the discriminator's own steps), norm_epsilon 0, norm_floor 1e-8.
    """

    network: CompressiveTokenizerConfig
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: PerceptualConfig = PerceptualConfig()
    perceptual_weight: Weight = 1.0
    moving_weight: Weight = 0.0
    restart: RestartConfig = RestartConfig()
    adversarial: AdversarialConfig | None = None

    def validate(self) -> None:
        check_channels("network.channels", self.network.channels)
        if self.adversarial is not None and self.adversarial.update_schedule != "together":
            raise ValueError(
                f"adversarial.update_schedule = {self.adversarial.update_schedule!r}: the tokenizer and its "
                "discriminator are both updated in every step; set it to 'together'."
            )

    def check_bucket(self, bucket: BucketConfig) -> None:
        check_frames(self.network, bucket)
        if bucket.height < WINDOW:
            raise ValueError(f"height = {bucket.height}: must be at least {WINDOW}, the window of the SSIM metric.")
        segment = bucket.segment
        if segment is not None and segment.choice == "later" and segment.context != self.network.context_frames:
            raise ValueError(
                f"segment.context = {segment.context}, but the tokenizer has {self.network.context_frames} context "
                "frames: make them equal."
            )

    def check_weights(self) -> None:
        check_weights(self.perceptual)

    def check_data(self, data: DataConfig) -> None:
        for source in (*data.sources, *data.evaluation_sources):
            check_pixels(source)

    def build(self) -> "VideoTokenizer":
        return VideoTokenizer(self)


def check_frames(network: CompressiveTokenizerConfig, bucket: BucketConfig) -> None:
    """Raise `ValueError` for batch shapes that a tokenizer does not take."""
    if bucket.views != 1:
        raise ValueError(f"views = {bucket.views}: this task trains on single views; set views = 1.")
    if (bucket.height, bucket.width) != (network.resolution, network.resolution):
        raise ValueError(
            f"frames of {bucket.height}x{bucket.width}: the tokenizer takes {network.resolution}x{network.resolution}; "
            "make them equal."
        )
    network.layout(bucket.frames)


class CodeCounts(nnx.Module):
    """Running counts of each code's use, updated by `VideoTokenizer.after_update`, not by gradients."""

    def __init__(self, config: CompressiveTokenizerConfig, *, rngs: nnx.Rngs):
        self.context = nnx.Param(jnp.zeros((config.context_codes,)), logical_axes=(axes.CODES,))
        self.future = nnx.Param(jnp.zeros((config.future_codes,)), logical_axes=(axes.CODES,))


class VideoTokenizer(Task):
    """See `VideoTokenizerConfig`. Trains "tokenizer" and, where configured, "discriminator"; restarts keep "counts"."""

    def __init__(self, config: VideoTokenizerConfig):
        self.config = config
        network = config.network
        self.networks = {"tokenizer": Network.of(lambda rngs: CompressiveTokenizer(network, rngs=rngs))}
        self.network_configs = {"tokenizer": network}
        if config.restart.every:
            self.networks["counts"] = Network.of(lambda rngs: CodeCounts(network, rngs=rngs))
        self.adversarial = None
        if config.adversarial is not None:
            self.adversarial = AdversarialLoss(config.adversarial)
            self.networks[DISCRIMINATOR] = self.adversarial.network
        self.perceptual = PerceptualDistance(config.perceptual)
        self.frozen_networks = self.perceptual.networks
        self.float32_networks = frozenset(self.frozen_networks)

    def load_frozen(self) -> Parameters:
        return self.perceptual.load()

    def frozen_digest(self) -> str:
        return self.perceptual.digest()

    def objectives(self) -> tuple[Objective, ...]:
        objectives = [Objective("model", "tokenizer/.*", self.loss)]
        if self.adversarial is not None:
            # The same loss function, so that both share its passes; neither has a gradient through the other.
            objectives.append(Objective(DISCRIMINATOR, f"{DISCRIMINATOR}/", self.loss))
        return tuple(objectives)

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        shape, names = (bucket.frames, bucket.height, bucket.width, 3), (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
        return {"video": ArraySpec(shape, np.dtype(np.uint8), names)}

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        if "video" not in example:
            raise ValueError("the data set has cached latents and no pixels: a tokenizer needs pixels.")
        return {"video": example["video"]}

    # Loss.

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        dtype = activation_dtype(parameters["tokenizer"])
        video = unit_from_uint8(batch["video"])
        keys = slot_keys(jax.random.fold_in(key, DROPOUT_KEY), batch["slot"])
        output = self.networks["tokenizer"].apply(parameters["tokenizer"], video.astype(dtype), keys)
        total, metrics = jnp.zeros((), jnp.float32), {}
        for stream, frames, codes, target in self._streams(output, video):
            reconstruction = self.pixel_error(stream, frames, target, video)
            perceptual = jnp.mean(self.perceptual.distance(frozen, signed_from_unit(frames), signed_from_unit(target)))
            total += reconstruction + self.config.perceptual_weight * perceptual + codes.loss
            metrics |= {f"{stream}/reconstruction": reconstruction, f"{stream}/codebook": codes.loss}
            if self.perceptual.enabled:
                metrics[f"{stream}/{self.perceptual.metric_name}"] = perceptual
            metrics |= self._fidelity(stream, frames, target, similarity=False)
            metrics |= self._code_metrics(stream, codes.ids)
        if self.adversarial is not None:
            loss, more = self._adversarial_loss(parameters, frozen, batch, output, video)
            total, metrics = total + loss, metrics | more
        return total, metrics

    def _adversarial_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, output: Reconstruction, video: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Loss of tokenizer and discriminator: all reconstructed frames against all true ones, as images in [-1, 1].

        As in the released code the adaptive weight compares gradients of the last kernel of future frames: of their
        perceptual distance (of their error, where there is none) and of the adversarial loss.
        """

        def images(clips: jax.Array) -> jax.Array:
            return rearrange(signed_from_unit(clips.astype(jnp.float32)), "b f h w c -> (b f) 1 h w c")

        stop = jax.lax.stop_gradient
        context, future = (images(clips) for clips in (output.context, output.future))
        target = images(video[:, self.config.network.context_frames :])

        def distance(future: jax.Array) -> jax.Array:
            if self.perceptual.enabled:
                return jnp.mean(self.perceptual.distance(frozen, future[:, 0], target[:, 0]))
            return jnp.mean(absolute_error(future, target))

        future_grad = jax.grad(distance)(stop(future))
        reconstructed = jnp.concatenate([context, future])
        reconstruction_grad = jnp.concatenate([jnp.zeros_like(context), future_grad])

        def last_kernel_grad(gradients: Sequence[jax.Array]) -> jax.Array:
            # Images in [-1, 1] have twice the range of frames in [0, 1].
            of_future = 2 * gradients[0][len(context) :, 0]
            return self._last_kernel_grad(stop(parameters["tokenizer"]), stop(output.future_last), of_future)

        weight, value, (adversarial_grad,) = self.adversarial.generator_loss(
            parameters[DISCRIMINATOR], batch, [reconstructed], [reconstruction_grad], last_kernel_grad
        )
        discriminator_loss, metrics = self.adversarial.discriminator_loss(
            parameters[DISCRIMINATOR], batch, images(video), [reconstructed]
        )
        loss = weight * value + surrogate_loss(reconstructed, weight * adversarial_grad) + discriminator_loss
        return loss, metrics | {"adversarial": value, "adaptive_weight": weight}

    def _last_kernel_grad(self, tokenizer: Parameters, last: jax.Array, gradient: jax.Array) -> jax.Array:
        """Gradient of the last kernel of future frames, from the gradient of their pixels and that layer's input."""
        decoder = tokenizer["prediction_decoder"]

        def pixels(kernel: jax.Array) -> jax.Array:
            layer = {**decoder["conv_out"], "kernel": kernel}
            changed = {**tokenizer, "prediction_decoder": {**decoder, "conv_out": layer}}
            return self.networks["tokenizer"].apply(changed, last, method="future_pixels")

        frames, pullback = jax.vjp(pixels, decoder["conv_out"]["kernel"])
        return pullback(gradient.astype(frames.dtype))[0]

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Fidelity of clipped frames in [0, 1], and codebook use over all batches of an evaluation, without dropout."""
        video = unit_from_uint8(batch["video"])
        output = self.networks["tokenizer"].apply(
            parameters["tokenizer"], video.astype(activation_dtype(parameters["tokenizer"]))
        )
        metrics: Metrics = {}
        for stream, frames, codes, target in self._streams(output, video):
            frames = jnp.clip(frames, 0.0, 1.0)
            metrics |= self._fidelity(stream, frames, target, similarity=True)
            count = jnp.float32(frames.shape[0])
            metrics[f"{stream}/l1"] = Mean(jnp.sum(absolute_error(frames, target)), count)
            if self.perceptual.enabled:
                distance = self.perceptual.distance(frozen, signed_from_unit(frames), signed_from_unit(target))
                metrics[f"{stream}/{self.perceptual.metric_name}"] = Mean(jnp.sum(distance), count)
            metrics[stream] = CodeUse(usage(codes.ids, getattr(self.config.network, f"{stream}_codes")))
        return metrics

    def _streams(
        self, output: Reconstruction, video: jax.Array
    ) -> tuple[tuple[str, jax.Array, Quantized, jax.Array], ...]:
        """(name, reconstructed images, codes, true images) of both kinds of frames, float32 `N H W 3` in [0, 1]."""
        count = self.config.network.context_frames

        def images(frames: jax.Array) -> jax.Array:
            return rearrange(frames, "b f h w c -> (b f) h w c").astype(jnp.float32)

        return (
            ("context", images(output.context), output.context_codes, images(video[:, :count])),
            ("future", images(output.future), output.future_codes, images(video[:, count:])),
        )

    def pixel_error(self, stream: str, frames: jax.Array, target: jax.Array, video: jax.Array) -> jax.Array:
        """Mean error of reconstructed frames in the loss, see `_streams` and `VideoTokenizerConfig.moving_weight`.

        Args:
          video: true clips, `B F H W 3` in [0, 1].
        """
        error, weights = absolute_error if self.config.reconstruction == "l1" else squared_error, None
        if stream == "future" and self.config.moving_weight:
            count = self.config.network.context_frames
            moved = jnp.any(jnp.abs(video[:, count:] - video[:, count - 1 : count]) > MOVED, axis=-1, keepdims=True)
            weights = rearrange(jnp.where(moved, 1.0 + self.config.moving_weight, 1.0), "b f h w c -> (b f) h w c")
            weights = jnp.broadcast_to(weights, target.shape)
        return jnp.mean(error(frames, target, weights))

    def _fidelity(self, stream: str, frames: jax.Array, target: jax.Array, *, similarity: bool) -> Metrics:
        frames, count = jnp.clip(frames, 0.0, 1.0), jnp.float32(frames.shape[0])
        psnr = peak_signal_to_noise(frames, target, data_range=1.0)
        metrics: Metrics = {f"{stream}/psnr": Mean(jnp.sum(psnr), count)}
        if similarity:
            metrics[f"{stream}/ssim"] = Mean(jnp.sum(structural_similarity(frames, target, data_range=1.0)), count)
        return metrics

    def _code_metrics(self, stream: str, ids: jax.Array) -> Metrics:
        """Of this batch: the share of the codes that it uses, and the perplexity of their frequencies."""
        size = getattr(self.config.network, f"{stream}_codes")
        counts = usage(ids, size)
        return {f"{stream}/codes_used": jnp.mean(counts > 0), f"{stream}/perplexity": perplexity(counts)}

    # Dead codes.

    def after_update(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, step: jax.Array
    ) -> Parameters:
        """Set dead codes to latents of the batch, every `restart.every` steps."""
        restart = self.config.restart
        if not restart.every:
            return parameters

        def restarted(parameters: Parameters) -> Parameters:
            model = self.networks["tokenizer"].bind(parameters["tokenizer"])
            video, count = unit_from_uint8(batch["video"]), self.config.network.context_frames
            context, conditions = model.encode_context(video[:, :count])
            latents = {"context": context, "future": model.encode_future(video[:, count:], conditions)}
            tokenizer, counts = dict(parameters["tokenizer"]), {}
            for number, (stream, values) in enumerate(latents.items()):
                table = tokenizer[f"{stream}_codebook"]["table"]
                found = usage(getattr(model, f"{stream}_codebook").nearest(values), table.shape[0])
                running = restart.decay * parameters["counts"][stream] + (1 - restart.decay) * found
                dead = running < restart.below * jnp.mean(running)
                flat = rearrange(values, "b f n d -> (b f n) d").astype(table.dtype)
                draw = jax.random.fold_in(jax.random.fold_in(key, RESTART_KEY), number)
                drawn = flat[jax.random.randint(draw, (table.shape[0],), 0, flat.shape[0])]
                tokenizer[f"{stream}_codebook"] = {"table": jnp.where(dead[:, None], drawn, table)}
                # A restarted code gets the mean count, so that it has time to be used.
                counts[stream] = jnp.where(dead, jnp.mean(running), running)
            return {**parameters, "tokenizer": tokenizer, "counts": counts}

        # On CPUs the convolutions in this branch are about fifty times slower than those of the loss.
        due = step % restart.every == restart.every - 1
        return jax.lax.cond(due, restarted, lambda parameters: parameters, parameters)

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        clips = batch["video"][:4]
        dtype = activation_dtype(parameters["tokenizer"])
        output = self.networks["tokenizer"].apply(parameters["tokenizer"], unit_from_uint8(clips).astype(dtype))
        made = jnp.concatenate([output.context, output.future], axis=1)
        return {"data": clips, "reconstruction": unit_to_clips(made)}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        parts = flops.reconstruct(self.config.network, bucket.frames)
        if self.config.adversarial is not None:
            per_frame = discriminator_flops.forward(self.config.adversarial.network, 1, bucket.height, bucket.width)
            parts["discriminator"] = 2 * bucket.frames * per_frame
        return parts
