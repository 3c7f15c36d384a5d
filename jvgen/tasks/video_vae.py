"""Training a video VAE that shares its latents with a frozen image VAE (CV-VAE, arXiv 2405.20279)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jvgen.config import Config
from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.source_checks import check_pixels
from jvgen.diffusion.objective import slot_keys, slot_normal
from jvgen.evaluation.reconstruction import WINDOW, peak_signal_to_noise
from jvgen.finite import Clips
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import content_digest
from jvgen.interop.from_torch import import_folder
from jvgen.losses.adversarial import surrogate_loss
from jvgen.losses.frame_mapping import FrameMapping, draw_picks, map_frames
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.losses.reconstruction import absolute_error
from jvgen.models.clip_discriminator import flops as discriminator_flops
from jvgen.models.cv_vae import flops as cv_vae_flops
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae import flops as image_vae_flops
from jvgen.models.image_vae import posterior
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.tasks import compatibility
from jvgen.tasks.adversarial import AdversarialConfig, AdversarialLoss
from jvgen.tasks.clip_vae import ClipVAE
from jvgen.tasks.perceptual import PerceptualDistance, check_weights
from jvgen.tasks.pixels import check_channels, from_uint8, unit_from_signed
from jvgen.tasks.task import ArraySpec, Batch, Mean, Metrics, Objective, Task, TaskConfig, activation_dtype
from jvgen.value_rules import Weight

# Purposes of random keys; a number never changes its meaning.
POSTERIOR_KEY = 17
PICKS_KEY = 50
IMAGE_POSTERIOR_KEY = 51

VAE, IMAGE_VAE, DISCRIMINATOR, SCALES = "vae", "image_vae", "discriminator", "scales"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedLatentsConfig(Config):
    """Latents shared with a frozen image VAE (CV-VAE, section 3.2).

    Attributes:
      decoder_weight: of the error of the image VAE's decoder on latents of the video VAE; its gradient reaches the
        video encoder through that decoder. The paper's best is 1 here and 0 below.
      encoder_weight: of the error of the video VAE's decoder on latents of the image VAE.
      mapping: which of the frames of a latent that decoder should reconstruct, or that encoder reads.
    """

    decoder_weight: Weight = 1.0
    encoder_weight: Weight = 0.0
    mapping: FrameMapping = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoVAETaskConfig(TaskConfig):
    """The loss of a video VAE: reconstruction, perceptual distance, KL, shared latents, a discriminator.

    Every term is a mean over pixel values, so that weights are independent of the batch shape: the released code's
    loss, a sum over a frame, divided by the pixel values of a frame. Its KL is a sum over a clip, which weighs F times
    as much on clips of F frames as on images; here the weight is the same.

    Attributes:
      network: the video VAE.
      image_vae: the frozen image VAE; None to train without one.
      image_vae_weights: exported folder of its weights.
      shared: how latents are shared with it; None to only measure how well they are.
      perceptual, perceptual_weight: distance of frames, added to their absolute errors.
      kl_weight: of the KL divergence relative to the likelihood: 1 (the evidence lower bound) suits learned scales,
        Stable Diffusion's 1e-6 fixed ones.
      learned_scales: learn the log-variance of the errors, one for reconstructions and one for the image decoder's
        frames. They are a separate objective, "scales", so that their large gradients do not count in the
        autoencoder's gradient clipping.
      adversarial: the discriminator; None for none.
    """

    network: CVVAEConfig
    image_vae: ImageVAEConfig | None = None
    image_vae_weights: str | None = None
    shared: SharedLatentsConfig | None = None
    perceptual: PerceptualConfig = PerceptualConfig()
    perceptual_weight: Weight = 0.5
    kl_weight: Weight = 1.0
    learned_scales: bool = True
    adversarial: AdversarialConfig | None = None

    def validate(self) -> None:
        check_channels("network.channels", self.network.channels)
        if self.shared is not None and self.image_vae is None:
            raise ValueError("shared needs image_vae and image_vae_weights: the VAE to share latents with.")
        if (self.image_vae is None) != (self.image_vae_weights is None):
            raise ValueError("image_vae and image_vae_weights belong together: give both, or neither.")
        if self.image_vae is not None:
            for name in ("latent_channels", "downsampling", "channels"):
                ours, theirs = getattr(self.network, name), getattr(self.image_vae, name)
                if ours != theirs:
                    raise ValueError(f"network.{name} = {ours}, but image_vae.{name} = {theirs}: must be equal.")

    def check_bucket(self, bucket: BucketConfig) -> None:
        self.network.check_clip(bucket.frames, bucket.height, bucket.width)
        if bucket.views != 1:
            raise ValueError(f"views = {bucket.views}: a video VAE codes one view at a time; take 1.")
        for name in ("height", "width"):
            if getattr(bucket, name) < WINDOW:
                raise ValueError(
                    f"{name} = {getattr(bucket, name)}: must be at least {WINDOW}, the window of the SSIM metric."
                )

    def check_weights(self) -> None:
        check_weights(self.perceptual)
        if self.image_vae is not None:
            check_architecture(self.image_vae_weights, self.image_vae, "task.image_vae_weights")

    def check_data(self, data: DataConfig) -> None:
        for source in (*data.sources, *data.evaluation_sources):
            check_pixels(source)

    def build(self) -> "VideoVAETask":
        return VideoVAETask(self)


class Scales(nnx.Module):
    """Learned log-variances of the errors of reconstructions and of the image decoder's frames."""

    def __init__(self) -> None:
        self.reconstruction = nnx.Param(jnp.zeros((1,), jnp.float32), logical_axes=(None,))
        self.shared = nnx.Param(jnp.zeros((1,), jnp.float32), logical_axes=(None,))


class Decoded(NamedTuple):
    """Decoded clips and their targets.

    Attributes:
      features: input of the decoder's last layer.
      clips: its output, float32.
      target: float32, in [-1, 1].
      weight: of the clips' error in the loss.
    """

    features: jax.Array
    clips: jax.Array
    target: jax.Array
    weight: float


class VideoVAETask(Task):
    """See `VideoVAETaskConfig`. Trains "vae" and, where configured, "scales" and "discriminator"."""

    def __init__(self, config: VideoVAETaskConfig):
        self.config = config
        self.perceptual = PerceptualDistance(config.perceptual)
        self.vae = ClipVAE(config.network)
        self.networks = {VAE: self.vae.network}
        self.network_configs = {VAE: config.network}
        if config.learned_scales:
            self.networks[SCALES] = Network.of(lambda rngs: Scales())
        self.adversarial = None
        if config.adversarial is not None:
            self.adversarial = AdversarialLoss(config.adversarial)
            self.networks[DISCRIMINATOR] = self.adversarial.network
        self.frozen_networks = dict(self.perceptual.networks)
        self.image_vae = None
        if config.image_vae is not None:
            self.image_vae = ClipVAE(config.image_vae)
            self.frozen_networks[IMAGE_VAE] = self.image_vae.network

    def load_frozen(self) -> Parameters:
        frozen = self.perceptual.load()
        if self.config.image_vae is not None:
            frozen[IMAGE_VAE] = import_folder(self.config.image_vae_weights)[1]
        return frozen

    def frozen_digest(self) -> str:
        digests = [self.perceptual.digest()]
        if self.config.image_vae is not None:
            digests.append(content_digest(self.config.image_vae_weights))
        return "+".join(digest for digest in digests if digest)

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        shape = (bucket.frames, bucket.height, bucket.width, 3)
        return {"video": ArraySpec(shape, np.dtype(np.uint8), (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None))}

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        if "video" not in example:
            raise ValueError("the data set holds cached latents and no pixels: a video VAE needs pixels.")
        return {"video": example["video"]}

    # Objectives.

    def objectives(self) -> tuple[Objective, ...]:
        adversarial = self.config.adversarial
        alternate = adversarial is not None and adversarial.update_schedule == "alternate"
        loss = self.both_losses if adversarial is not None and not alternate else self.loss
        turn = (0, 2) if alternate else (0, 1)
        objectives = [Objective("autoencoder", f"{VAE}/", loss, turn)]
        if self.config.learned_scales:
            objectives.append(Objective("scales", f"{SCALES}/", loss, turn))
        if adversarial is not None:
            own = self.discriminator_loss if alternate else loss
            objectives.append(Objective("discriminator", f"{DISCRIMINATOR}/", own, (1, 2) if alternate else turn))
        return tuple(objectives)

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss of the autoencoder and the scales."""
        loss, metrics, _ = self._autoencoder_loss(parameters, frozen, batch, key)
        return loss, metrics

    def both_losses(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The sum of the losses of autoencoder and discriminator; neither has a gradient for the other's parameters."""
        loss, metrics, decoded = self._autoencoder_loss(parameters, frozen, batch, key)
        hinge, more = self._discriminator_hinge(parameters, batch, decoded)
        return loss + hinge, metrics | more

    def discriminator_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss of the discriminator."""
        vae = jax.lax.stop_gradient(parameters[VAE])
        decoded, _, _ = self._reconstruct(vae, frozen, batch, key)
        return self._discriminator_hinge(parameters, batch, decoded)

    def _discriminator_hinge(
        self, parameters: Parameters, batch: Batch, decoded: list[Decoded]
    ) -> tuple[jax.Array, Metrics]:
        clips = [one.clips for one in decoded]
        return self.adversarial.discriminator_loss(parameters[DISCRIMINATOR], batch, from_uint8(batch["video"]), clips)

    def _autoencoder_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics, list[Decoded]]:
        config, video = self.config, from_uint8(batch["video"])
        decoded, moments, latents = self._reconstruct(parameters[VAE], frozen, batch, key)
        scales = parameters.get(SCALES, {})
        loss, metrics = self._reconstruction_loss(parameters, frozen, batch, decoded)
        divergence = jnp.mean(posterior.kl_divergence(moments))
        loss += config.kl_weight * divergence / video[0].size
        metrics["kl_per_element"] = divergence / latents[0].size
        if config.shared is not None and config.shared.decoder_weight:
            error = self._shared_error(frozen, batch, key, latents)
            loss += config.shared.decoder_weight * _negative_log_likelihood(error, scales.get("shared"))
            metrics["image_decoder_error"] = error
        for name, value in scales.items():
            metrics[f"log_variance_{name}"] = value[0]
        return loss, metrics, decoded

    def _reconstruct(
        self, vae: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[list[Decoded], jax.Array, jax.Array]:
        """Clips decoded from sampled latents (and from the image VAE's), the moments, and the sampled latents."""
        config, dtype, slots = self.config, activation_dtype(vae), batch["slot"]
        video = from_uint8(batch["video"])
        moments = self.networks[VAE].apply(vae, video.astype(dtype), method="encode")
        noise = slot_normal(jax.random.fold_in(key, POSTERIOR_KEY), posterior.mode(moments).shape, slots)
        latents = posterior.sample(moments, noise)
        decoded = [self._decode(vae, latents, video, 1.0)]
        if config.shared is not None and config.shared.encoder_weight:
            frames = self._map_frames(video, slots, key)
            theirs = self.image_vae.moments(frozen[IMAGE_VAE], frames)
            noise = slot_normal(jax.random.fold_in(key, IMAGE_POSTERIOR_KEY), posterior.mode(theirs).shape, slots)
            image_latents = posterior.sample(theirs, noise).astype(dtype)
            target = video[:, : config.network.pixel_frames(image_latents.shape[1])]
            decoded.append(self._decode(vae, image_latents, target, config.shared.encoder_weight))
        return decoded, moments, latents

    def _decode(self, vae: Parameters, latents: jax.Array, target: jax.Array, weight: float) -> Decoded:
        features = self.networks[VAE].apply(vae, latents, method="decode_features")
        clips = self.networks[VAE].apply(vae, features, method="pixels")
        return Decoded(features, clips.astype(jnp.float32), target, weight)

    def _map_frames(self, video: jax.Array, slots: jax.Array, key: jax.Array) -> jax.Array:
        """One frame for each latent frame, by `shared.mapping`."""
        group = self.config.network.temporal_downsampling
        keys = slot_keys(jax.random.fold_in(key, PICKS_KEY), slots)
        picks = draw_picks(keys, (video.shape[1] - 1) // group, group)
        return map_frames(video, self.config.shared.mapping, group, picks)

    def _shared_error(self, frozen: Parameters, batch: Batch, key: jax.Array, latents: jax.Array) -> jax.Array:
        """Mean absolute error of the frozen image decoder on the video encoder's latents."""
        frames = self._map_frames(from_uint8(batch["video"]), batch["slot"], key)
        # Sampled latents, unscaled, as in the paper.
        images = self.image_vae.decode(frozen[IMAGE_VAE], latents[:, : frames.shape[1]])
        return jnp.mean(absolute_error(images, frames))

    def _reconstruction_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, decoded: list[Decoded]
    ) -> tuple[jax.Array, Metrics]:
        """Negative log likelihood of reconstructions and, with a discriminator, the weighted adversarial loss.

        The gradients of both losses are computed here with respect to the decoded clips; the adaptive weight needs them
        through the last layer only. Their sum is injected, so that there is one backward pass through the autoencoder.
        """
        scale, stop = parameters.get(SCALES, {}).get("reconstruction"), jax.lax.stop_gradient
        clips = [one.clips for one in decoded]

        def errors(clips: list[jax.Array]) -> tuple[jax.Array, Metrics]:
            return self._errors(frozen, [one._replace(clips=c) for one, c in zip(decoded, clips, strict=True)])

        if self.adversarial is None:
            error, metrics = errors(clips)
            return _negative_log_likelihood(error, scale), metrics
        (error, metrics), reconstruction_grads = jax.value_and_grad(errors, has_aux=True)(stop(clips))
        if scale is not None:
            reconstruction_grads = [grad * jnp.exp(-stop(scale[0])) for grad in reconstruction_grads]

        def last_kernel_grad(gradients: Sequence[jax.Array]) -> jax.Array:
            features = stop([one.features for one in decoded])
            return self._last_kernel_grad(stop(parameters[VAE]), features, gradients)

        weight, value, adversarial_grads = self.adversarial.generator_loss(
            parameters[DISCRIMINATOR], batch, clips, reconstruction_grads, last_kernel_grad
        )
        metrics |= {"adversarial": value, "adaptive_weight": weight}
        total = _negative_log_likelihood(error, scale) + weight * value
        for clip, of_reconstruction, of_adversarial in zip(clips, reconstruction_grads, adversarial_grads, strict=True):
            total += surrogate_loss(clip, of_reconstruction + weight * of_adversarial)
        return total, metrics

    def _last_kernel_grad(
        self, vae: Parameters, features: Sequence[jax.Array], gradients: Sequence[jax.Array]
    ) -> jax.Array:
        """The gradient of the decoder's last kernel, from gradients with respect to the clips."""
        decoder = vae["decoder"]
        kernel = decoder["conv_out"]["kernel"]

        def last_layer(kernel: jax.Array, features: jax.Array) -> jax.Array:
            changed = {**vae, "decoder": {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}}
            return self.networks[VAE].apply(changed, features, method="pixels")

        total = jnp.zeros_like(kernel)
        for feature, gradient in zip(features, gradients, strict=True):
            output, pullback = jax.vjp(lambda kernel, f=feature: last_layer(kernel, f), kernel)
            total += pullback(gradient.astype(output.dtype))[0]
        return total

    def _errors(self, frozen: Parameters, decoded: list[Decoded]) -> tuple[jax.Array, Metrics]:
        """Weighted absolute and perceptual errors, means over pixel values; metrics of the reconstructions only."""
        total, metrics = jnp.float32(0), {}
        for one in decoded:
            frames, target = (rearrange(clip, "b f h w c -> (b f) h w c") for clip in (one.clips, one.target))
            absolute = jnp.mean(absolute_error(frames, target))
            distance = jnp.mean(self.perceptual.distance(frozen, frames, target))
            total += one.weight * (absolute + self.config.perceptual_weight * distance)
            if not metrics:
                fidelity = peak_signal_to_noise(*map(unit_from_signed, (frames, target)), data_range=1.0)
                metrics = {"l1": absolute, "psnr": Mean(jnp.sum(fidelity), jnp.float32(len(frames)))}
                if self.perceptual.enabled:
                    metrics[self.perceptual.metric_name] = distance
        return total, metrics

    # Evaluation.

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Reconstruction from posterior means and, with an image VAE, how well latents are shared with it."""
        return compatibility.evaluate(
            self.vae, parameters[VAE], from_uint8(batch["video"]), self.perceptual, frozen,
            image_vae=self.image_vae, image_parameters=frozen.get(IMAGE_VAE),
        )  # fmt: skip

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        clips = batch["video"][:4]
        reconstructions = compatibility.reconstructed_clips(
            self.vae, parameters[VAE], from_uint8(clips), self.image_vae, frozen.get(IMAGE_VAE)
        )
        return {"data": clips, **reconstructions}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        config, size = self.config, (bucket.frames, bucket.height, bucket.width)
        parts = cv_vae_flops.reconstruct(config.network, *size)
        latent = config.network.latent_size(bucket.height, bucket.width)
        if config.shared is not None and config.shared.decoder_weight:
            of_frame = sum(image_vae_flops.decode(config.image_vae, *latent).values())
            parts["image decoder"] = config.network.latent_frames(bucket.frames) * of_frame
        if config.adversarial is not None:
            parts["discriminator"] = 2 * discriminator_flops.forward(config.adversarial.network, *size)
        return parts


def _negative_log_likelihood(error: jax.Array, log_variance: jax.Array | None) -> jax.Array:
    """`error / exp(log_variance) + log_variance`; the error if no scale is learned."""
    return error if log_variance is None else error * jnp.exp(-log_variance[0]) + log_variance[0]
