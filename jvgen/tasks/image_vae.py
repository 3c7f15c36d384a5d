"""Training an image VAE: reconstruct frames through a Gaussian bottleneck (AutoencoderKL, arXiv 2112.10752)."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.source_checks import check_pixels
from jvgen.diffusion.objective import slot_keys, slot_normal
from jvgen.evaluation.reconstruction import WINDOW, peak_signal_to_noise, structural_similarity
from jvgen.finite import Clips
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.losses.reconstruction import absolute_error, squared_error
from jvgen.models.image_vae import flops as image_vae_flops
from jvgen.models.image_vae import posterior
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.tasks.perceptual import PerceptualDistance, check_weights
from jvgen.tasks.pixels import check_channels, from_uint8, to_clips, unit_from_signed, unit_from_uint8
from jvgen.tasks.task import ArraySpec, Batch, Mean, Metrics, Task, TaskConfig, activation_dtype
from jvgen.value_rules import Bounds, Weight

# Purposes of random keys; a number never changes its meaning.
POSTERIOR_KEY = 17
FRAMES_KEY = 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageVAETaskConfig(TaskConfig):
    """The loss of an image VAE: reconstruction, perceptual distance, KL.

    Attributes:
      network: the autoencoder.
      reconstruction: error per element: "l1" or "l2".
      perceptual: distance added to the error.
      perceptual_weight: of that distance.
      kl_weight: of the KL divergence in nats per latent element. Stable Diffusion's 1e-6 weighs a sum over latent
        elements against a sum over pixel values; for means it is 1e-6 x latent elements / pixel values.
      frames_per_clip: frames of each clip that a step uses, drawn at random; 0 for all.
    """

    network: ImageVAEConfig
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: PerceptualConfig = PerceptualConfig()
    perceptual_weight: Weight = 1.0
    kl_weight: Weight = 1e-6
    frames_per_clip: Annotated[int, Bounds(at_least=0, at_most=100_000, fix="0 for all")] = 0

    def validate(self) -> None:
        check_channels("network.channels", self.network.channels)

    def check_bucket(self, bucket: BucketConfig) -> None:
        step = self.network.downsampling
        for name in ("height", "width"):
            size = getattr(bucket, name)
            if size < WINDOW:
                raise ValueError(f"{name} = {size}: must be at least {WINDOW}, the window of the SSIM metric.")
            if size % step:
                near = max(size // step * step, step)
                raise ValueError(
                    f"{name} = {size}: must be a multiple of {step} (network.block_channels); take {near}."
                )
        if bucket.frames < self.frames_per_clip:
            raise ValueError(
                f"frames = {bucket.frames}: fewer than task.frames_per_clip = {self.frames_per_clip}; lower that, or "
                "use 0 for all."
            )

    def check_weights(self) -> None:
        check_weights(self.perceptual)

    def check_data(self, data: DataConfig) -> None:
        for source in (*data.sources, *data.evaluation_sources):
            check_pixels(source)

    def build(self) -> "ImageVAETask":
        return ImageVAETask(self)


class ImageVAETask(Task):
    """See `ImageVAETaskConfig`. Trains "vae"."""

    def __init__(self, config: ImageVAETaskConfig):
        self.config = config
        self.networks = {"vae": Network.of(lambda rngs: ImageVAE(config.network, rngs=rngs))}
        self.network_configs = {"vae": config.network}
        self.perceptual = PerceptualDistance(config.perceptual)
        self.frozen_networks = dict(self.perceptual.networks)

    def load_frozen(self) -> Parameters:
        return self.perceptual.load()

    def frozen_digest(self) -> str:
        return self.perceptual.digest()

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        shape: tuple[int, ...] = (bucket.frames, bucket.height, bucket.width, 3)
        names: axes.Axes = (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
        if bucket.views > 1:
            shape, names = (bucket.views, *shape), (axes.VIEWS, *names)
        return {"video": ArraySpec(shape, np.dtype(np.uint8), names)}

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        if "video" not in example:
            raise ValueError("the data set holds cached latents and no pixels: an image VAE needs pixels.")
        return {"video": example["video"]}

    # Loss.

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        config, dtype = self.config, activation_dtype(parameters["vae"])
        video = batch["video"]
        if config.frames_per_clip:
            video = self._draw_frames(video, batch["slot"], key)
        images = self._images(video)
        moments = self.networks["vae"].apply(parameters["vae"], from_uint8(images, dtype), method="encode")
        frames = images.shape[0] // video.shape[0]
        noise = slot_normal(
            jax.random.fold_in(key, POSTERIOR_KEY),
            (video.shape[0], frames, *posterior.mode(moments).shape[1:]),
            batch["slot"],
        )
        latents = posterior.sample(moments, rearrange(noise, "b f h w c -> (b f) h w c"))
        decoded = self.networks["vae"].apply(parameters["vae"], latents, method="decode")
        target = from_uint8(images)
        error = absolute_error if config.reconstruction == "l1" else squared_error
        reconstruction = jnp.mean(error(decoded, target))
        perceptual = jnp.mean(self.perceptual.distance(frozen, decoded, target))
        elements = posterior.mode(moments)[0].size
        divergence = jnp.mean(posterior.kl_divergence(moments)) / elements
        total = reconstruction + config.perceptual_weight * perceptual + config.kl_weight * divergence
        count = jnp.float32(images.shape[0])
        metrics: Metrics = {
            "reconstruction": reconstruction,
            self.perceptual.metric_name: perceptual,
            "kl_per_element": divergence,
            "psnr": Mean(
                jnp.sum(peak_signal_to_noise(unit_from_signed(decoded), unit_from_uint8(images), data_range=1.0)), count
            ),
        }
        if not self.perceptual.enabled:
            del metrics[self.perceptual.metric_name]
        return total, metrics

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Reconstruction from the posterior mean: PSNR and SSIM on [0, 1], L1 on [-1, 1], of clipped pixels; perceptual
        distance."""
        images = self._images(batch["video"])
        decoded, moments = self.reconstruct(parameters, images)
        decoded = jnp.clip(decoded.astype(jnp.float32), -1.0, 1.0)
        target, count = from_uint8(images), jnp.float32(images.shape[0])
        unit = unit_from_signed(decoded), unit_from_uint8(images)
        metrics: Metrics = {
            "psnr": Mean(jnp.sum(peak_signal_to_noise(*unit, data_range=1.0)), count),
            "ssim": Mean(jnp.sum(structural_similarity(*unit, data_range=1.0)), count),
            "l1": Mean(jnp.sum(absolute_error(decoded, target)), count),
        }
        if self.perceptual.enabled:
            distance = self.perceptual.distance(frozen, decoded, target)
            metrics[self.perceptual.metric_name] = Mean(jnp.sum(distance), count)
        mean, _ = posterior.split_moments(moments)
        metrics["latent_mean"] = Mean(jnp.mean(mean) * count, count)
        metrics["latent_square"] = Mean(jnp.mean(jnp.square(mean)) * count, count)
        return metrics

    def reconstruct(self, parameters: Parameters, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decoded posterior means in [-1, 1] (not clipped) and the moments, of uint8 images `B H W 3`."""
        pixels = from_uint8(images, activation_dtype(parameters["vae"]))
        moments = self.networks["vae"].apply(parameters["vae"], pixels, method="encode")
        return self.networks["vae"].apply(parameters["vae"], posterior.mode(moments), method="decode"), moments

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        clips = batch["video"][:4]
        clips = clips if clips.ndim == 5 else clips[:, 0]
        decoded, _ = self.reconstruct(parameters, self._images(clips))
        decoded = rearrange(decoded, "(b f) h w c -> b f h w c", b=clips.shape[0])
        return {"data": clips, "reconstruction": to_clips(decoded)}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        frames = min(self.config.frames_per_clip or bucket.frames, bucket.frames) * bucket.views
        parts = image_vae_flops.reconstruct(self.config.network, bucket.height, bucket.width)
        return {name: frames * value for name, value in parts.items()}

    def _images(self, video: jax.Array) -> jax.Array:
        if video.ndim == 6:
            return rearrange(video, "b v f h w c -> (b v f) h w c")
        return rearrange(video, "b f h w c -> (b f) h w c")

    def _draw_frames(self, video: jax.Array, slots: jax.Array, key: jax.Array) -> jax.Array:
        """`frames_per_clip` different frames of each clip, the same in all its views, drawn by the key of its slot."""
        keys = slot_keys(jax.random.fold_in(key, FRAMES_KEY), slots)
        frames, count = video.shape[-4], self.config.frames_per_clip
        chosen = jax.vmap(lambda k: jax.random.permutation(k, frames)[:count])(keys)
        if video.ndim == 6:
            chosen = chosen[:, None]
        return jnp.take_along_axis(video, chosen[..., None, None, None], axis=-4)
