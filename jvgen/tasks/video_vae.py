"""Training a video VAE whose latents an image VAE shares (CV-VAE, arXiv 2405.20279): configuration, losses, players."""

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
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import content_digest
from jvgen.interop.from_torch import import_folder
from jvgen.losses.adversarial import given_gradient
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
from jvgen.tasks.adversary import AdversarialConfig, Adversary
from jvgen.tasks.clip_coder import ClipCoder
from jvgen.tasks.perceptual import Perceptual, check_weights
from jvgen.tasks.pixels import from_uint8
from jvgen.tasks.task import ArraySpec, Batch, Mean, Metrics, Objective, Task, TaskConfig, activation_dtype

# Purposes of a step's key; numbers never change their meaning.
POSTERIOR_KEY = 17
PICKS_KEY = 50
IMAGE_POSTERIOR_KEY = 51

VAE, IMAGE_VAE, DISCRIMINATOR, SCALES = "vae", "image_vae", "discriminator", "scales"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedLatentsConfig(Config):
    """Latents that a frozen image VAE shares (CV-VAE, section 3.2).

    Attributes:
      decoder_weight: of the error of frames that the image VAE's decoder makes of the video VAE's latents: its gradient
        reaches the video encoder through that decoder. The paper's best is 1 here and 0 below.
      encoder_weight: of the error of clips that the video VAE's decoder makes of the image VAE's latents.
      mapping: which frame of those of a latent that decoder is to make, or that encoder is given.
    """

    decoder_weight: float = 1.0
    encoder_weight: float = 0.0
    mapping: FrameMapping = "random"

    def validate(self) -> None:
        if self.decoder_weight < 0 or self.encoder_weight < 0:
            raise ValueError(
                f"decoder_weight = {self.decoder_weight}, encoder_weight = {self.encoder_weight}: must not be negative."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoVAETaskConfig(TaskConfig):
    """Reconstruction, perceptual distance, KL, latents shared with an image VAE, a discriminator.

    Every term is a mean over pixel values, so that weights mean the same for every batch shape: the released code's
    loss, which adds up over a frame, divided by the pixel values of a frame. Its KL alone is added up over a clip, so
    that it weighs F times as much on clips of F frames as on images; here it weighs the same.

    Attributes:
      network: the video VAE.
      image_vae: architecture of the frozen image VAE; none to train without one.
      image_vae_weights: exported folder of its weights.
      shared: how latents are shared with it; none to measure only how well they are.
      perceptual, perceptual_weight: distance of frames added to their absolute errors.
      kl_weight: of the divergence over the likelihood: 1 is the evidence lower bound, and makes sense with learned
        scales; with fixed ones Stable Diffusion's 1e-6 does.
      learned_scales: learn the log-variance of the errors, one for reconstructions and one for the image decoder's
        frames. They are an objective of their own, "scales", so that their large gradients stay out of the
        autoencoder's clipping.
      adversarial: the discriminator; none for none.
    """

    network: CVVAEConfig
    image_vae: ImageVAEConfig | None = None
    image_vae_weights: str | None = None
    shared: SharedLatentsConfig | None = None
    perceptual: PerceptualConfig = PerceptualConfig()
    perceptual_weight: float = 0.5
    kl_weight: float = 1.0
    learned_scales: bool = True
    adversarial: AdversarialConfig | None = None

    def validate(self) -> None:
        if self.perceptual_weight < 0 or self.kl_weight < 0:
            raise ValueError(
                f"perceptual_weight = {self.perceptual_weight}, kl_weight = {self.kl_weight}: must not be negative."
            )
        if self.shared is not None and self.image_vae is None:
            raise ValueError("shared needs image_vae (and image_vae_weights): whose latents are to be shared?")
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
            raise ValueError(f"views = {bucket.views}: a video VAE sees one view at a time; take 1.")
        for name in ("height", "width"):
            if getattr(bucket, name) < WINDOW:
                raise ValueError(
                    f"{name} = {getattr(bucket, name)}: must be at least {WINDOW}, the window of the measured SSIM."
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
    """Log-variances of errors: of reconstructions, and of the image decoder's frames."""

    def __init__(self) -> None:
        self.reconstruction = nnx.Param(jnp.zeros((1,), jnp.float32), logical_axes=(None,))
        self.shared = nnx.Param(jnp.zeros((1,), jnp.float32), logical_axes=(None,))


class Made(NamedTuple):
    """Clips that the decoder made, and what they should be.

    Attributes:
      features: what the decoder's last layer read.
      clips: what it made of them.
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
        self.perceptual = Perceptual(config.perceptual)
        self.coder = ClipCoder(config.network)
        self.networks = {VAE: self.coder.network}
        self.network_configs = {VAE: config.network}
        if config.learned_scales:
            self.networks[SCALES] = Network.of(lambda rngs: Scales())
        self.adversary = None
        if config.adversarial is not None:
            self.adversary = Adversary(config.adversarial)
            self.networks[DISCRIMINATOR] = self.adversary.network
        self.frozen_networks = dict(self.perceptual.networks)
        self.image_coder = None
        if config.image_vae is not None:
            self.image_coder = ClipCoder(config.image_vae)
            self.frozen_networks[IMAGE_VAE] = self.image_coder.network

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

    # Players.

    def objectives(self) -> tuple[Objective, ...]:
        adversarial = self.config.adversarial
        alternate = adversarial is not None and adversarial.turns == "alternate"
        loss = self.both_losses if adversarial is not None and not alternate else self.loss
        turn = (0, 2) if alternate else (0, 1)
        players = [Objective("autoencoder", f"{VAE}/", loss, turn)]
        if self.config.learned_scales:
            players.append(Objective("scales", f"{SCALES}/", loss, turn))
        if adversarial is not None:
            own = self.discriminator_loss if alternate else loss
            players.append(Objective("discriminator", f"{DISCRIMINATOR}/", own, (1, 2) if alternate else turn))
        return tuple(players)

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """What the autoencoder and the scales minimise."""
        loss, metrics, _ = self._autoencoder(parameters, frozen, batch, key)
        return loss, metrics

    def both_losses(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The sum of what the two sides minimise; neither has a gradient with respect to the other's parameters."""
        loss, metrics, made = self._autoencoder(parameters, frozen, batch, key)
        against, more = self._against(parameters, batch, made)
        return loss + against, metrics | more

    def discriminator_loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """What the discriminator minimises."""
        still = jax.lax.stop_gradient(parameters[VAE])
        made, _, _ = self._reconstruct(still, frozen, batch, key)
        return self._against(parameters, batch, made)

    def _against(self, parameters: Parameters, batch: Batch, made: list[Made]) -> tuple[jax.Array, Metrics]:
        clips = [one.clips for one in made]
        return self.adversary.loss(parameters[DISCRIMINATOR], batch, from_uint8(batch["video"]), clips)

    def _autoencoder(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics, list[Made]]:
        config, video = self.config, from_uint8(batch["video"])
        made, moments, latents = self._reconstruct(parameters[VAE], frozen, batch, key)
        scales = parameters.get(SCALES, {})
        loss, metrics = self._reconstruction(parameters, frozen, batch, made)
        divergence = jnp.mean(posterior.kl_divergence(moments))
        loss += config.kl_weight * divergence / video[0].size
        metrics["kl_per_element"] = divergence / latents[0].size
        if config.shared is not None and config.shared.decoder_weight:
            error = self._shared_error(frozen, batch, key, latents)
            loss += config.shared.decoder_weight * _likelihood(error, scales.get("shared"))
            metrics["image_decoder_error"] = error
        for name, value in scales.items():
            metrics[f"log_variance_{name}"] = value[0]
        return loss, metrics, made

    def _reconstruct(
        self, vae: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[list[Made], jax.Array, jax.Array]:
        """What the decoder makes of drawn latents (and of the image VAE's), the moments, and those latents."""
        config, dtype, slots = self.config, activation_dtype(vae), batch["slot"]
        video = from_uint8(batch["video"])
        moments = self.networks[VAE].apply(vae, video.astype(dtype), method="encode")
        noise = slot_normal(jax.random.fold_in(key, POSTERIOR_KEY), posterior.mode(moments).shape, slots)
        latents = posterior.sample(moments, noise)
        made = [self._decoded(vae, latents, video, 1.0)]
        if config.shared is not None and config.shared.encoder_weight:
            frames = self._mapped(video, slots, key)
            theirs = self.image_coder.moments(frozen[IMAGE_VAE], frames)
            noise = slot_normal(jax.random.fold_in(key, IMAGE_POSTERIOR_KEY), posterior.mode(theirs).shape, slots)
            given = posterior.sample(theirs, noise).astype(dtype)
            target = video[:, : config.network.pixel_frames(given.shape[1])]
            made.append(self._decoded(vae, given, target, config.shared.encoder_weight))
        return made, moments, latents

    def _decoded(self, vae: Parameters, latents: jax.Array, target: jax.Array, weight: float) -> Made:
        features = self.networks[VAE].apply(vae, latents, method="decode_features")
        clips = self.networks[VAE].apply(vae, features, method="pixels")
        return Made(features, clips.astype(jnp.float32), target, weight)

    def _mapped(self, video: jax.Array, slots: jax.Array, key: jax.Array) -> jax.Array:
        """The frames that stand for latents, as `shared.mapping` says."""
        group = self.config.network.temporal_downsampling
        keys = slot_keys(jax.random.fold_in(key, PICKS_KEY), slots)
        picks = draw_picks(keys, (video.shape[1] - 1) // group, group)
        return map_frames(video, self.config.shared.mapping, group, picks)

    def _shared_error(self, frozen: Parameters, batch: Batch, key: jax.Array, latents: jax.Array) -> jax.Array:
        """Mean absolute error of the frames that the frozen image decoder makes of the video encoder's latents."""
        frames = self._mapped(from_uint8(batch["video"]), batch["slot"], key)
        # The paper gives it the drawn, unscaled latents.
        seen = self.image_coder.decode(frozen[IMAGE_VAE], latents[:, : frames.shape[1]])
        return jnp.mean(absolute_error(seen, frames))

    def _reconstruction(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, made: list[Made]
    ) -> tuple[jax.Array, Metrics]:
        """Likelihood of reconstructions and, with a discriminator, the adversarial loss by its adaptive weight.

        Gradients of both losses with respect to the made clips are computed here, and reach the adaptive weight through
        the last layer alone. Their sum is handed on, so that there is one backward pass through the autoencoder.
        """
        scale, still = parameters.get(SCALES, {}).get("reconstruction"), jax.lax.stop_gradient
        clips = [one.clips for one in made]

        def errors(clips: list[jax.Array]) -> tuple[jax.Array, Metrics]:
            return self._errors(frozen, [one._replace(clips=c) for one, c in zip(made, clips, strict=True)])

        if self.adversary is None:
            error, metrics = errors(clips)
            return _likelihood(error, scale), metrics
        (error, metrics), pulls = jax.value_and_grad(errors, has_aux=True)(still(clips))
        if scale is not None:
            pulls = [pull * jnp.exp(-still(scale[0])) for pull in pulls]

        def of_last_kernel(gradients: Sequence[jax.Array]) -> jax.Array:
            return self._of_last_kernel(still(parameters[VAE]), still([one.features for one in made]), gradients)

        weight, value, pushes = self.adversary.push(parameters[DISCRIMINATOR], batch, clips, pulls, of_last_kernel)
        metrics |= {"adversarial": value, "adaptive_weight": weight}
        total = _likelihood(error, scale) + weight * value
        for clip, pull, push in zip(clips, pulls, pushes, strict=True):
            total += given_gradient(clip, pull + weight * push)
        return total, metrics

    def _of_last_kernel(
        self, vae: Parameters, features: Sequence[jax.Array], gradients: Sequence[jax.Array]
    ) -> jax.Array:
        """The gradient of the decoder's last kernel, of gradients with respect to the clips."""
        decoder = vae["decoder"]
        kernel = decoder["conv_out"]["kernel"]

        def last_layer(kernel: jax.Array, features: jax.Array) -> jax.Array:
            changed = {**vae, "decoder": {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}}
            return self.networks[VAE].apply(changed, features, method="pixels")

        total = jnp.zeros_like(kernel)
        for feature, gradient in zip(features, gradients, strict=True):
            made, pull = jax.vjp(lambda kernel, f=feature: last_layer(kernel, f), kernel)
            total += pull(gradient.astype(made.dtype))[0]
        return total

    def _errors(self, frozen: Parameters, made: list[Made]) -> tuple[jax.Array, Metrics]:
        """Absolute and perceptual errors, means over pixel values, weighted; metrics of the first clips."""
        total, metrics = jnp.float32(0), {}
        for one in made:
            frames, target = (rearrange(clip, "b f h w c -> (b f) h w c") for clip in (one.clips, one.target))
            absolute = jnp.mean(absolute_error(frames, target))
            distance = jnp.mean(self.perceptual.distance(frozen, frames, target))
            total += one.weight * (absolute + self.config.perceptual_weight * distance)
            if not metrics:
                fidelity = peak_signal_to_noise(jnp.clip(frames, -1, 1), target, data_range=2.0)
                metrics = {"l1": absolute, "psnr": Mean(jnp.sum(fidelity), jnp.float32(len(frames)))}
                if self.perceptual.measures:
                    metrics[self.perceptual.metric] = distance
        return total, metrics

    # Measures.

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Reconstruction from posterior means and, with an image VAE, how well latents are shared with it."""
        return compatibility.measure(
            self.coder, parameters[VAE], from_uint8(batch["video"]), self.perceptual, frozen,
            image_coder=self.image_coder, image_vae=frozen.get(IMAGE_VAE),
        )  # fmt: skip

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        clips = batch["video"][:4]
        shown = compatibility.views(
            self.coder, parameters[VAE], from_uint8(clips), self.image_coder, frozen.get(IMAGE_VAE)
        )
        return {"data": clips, **shown}

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


def _likelihood(error: jax.Array, log_variance: jax.Array | None) -> jax.Array:
    """`error / exp(log_variance) + log_variance`; the error itself where no scale is learned."""
    return error if log_variance is None else error * jnp.exp(-log_variance[0]) + log_variance[0]
