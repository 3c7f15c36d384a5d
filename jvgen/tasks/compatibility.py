"""Metrics of a video VAE: its reconstructions, and how well it shares latents with an image VAE (CV-VAE, section 4)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvgen.evaluation.reconstruction import peak_signal_to_noise, structural_similarity
from jvgen.finite import Clips
from jvgen.losses.frame_mapping import map_frames
from jvgen.losses.reconstruction import absolute_error
from jvgen.models.image_vae import posterior
from jvgen.nn.network import Parameters
from jvgen.tasks.clip_vae import ClipVAE
from jvgen.tasks.perceptual import PerceptualDistance
from jvgen.tasks.pixels import to_clips, unit_from_signed
from jvgen.tasks.task import Mean, Metrics

# How a clip was reconstructed: prefixes of metric names.
OWN = ""
IMAGE_DECODER = "image_decoder/"  # latents of the video VAE, decoder of the image VAE
IMAGE_LATENTS = "image_latents/"  # latents of the image VAE, decoder of the video VAE
IMAGE_ALONE = "image_alone/"  # latents and decoder of the image VAE

# By prefix: reconstructed and original clips, float32 in [-1, 1].
Reconstructions = dict[str, tuple[jax.Array, jax.Array]]


def reconstructions(
    vae: ClipVAE,
    parameters: Parameters,
    video: Float[Array, "B F H W C"],
    image_vae: ClipVAE | None,
    image_parameters: Parameters | None,
) -> tuple[Reconstructions, dict[str, jax.Array]]:
    """Reconstructions from posterior means, and the means by the VAE that they are of.

    The image VAE encodes the last frame of those that share a latent frame.
    """
    mean = posterior.mode(vae.moments(parameters, video))
    clips = {OWN: (vae.decode(parameters, mean), video)}
    means = {"latent": mean}
    if image_vae is not None:
        group = (video.shape[1] - 1) // max(mean.shape[1] - 1, 1)
        frames = map_frames(video, "slice", group)
        image_mean = posterior.mode(image_vae.moments(image_parameters, frames))
        clips |= {
            IMAGE_DECODER: (image_vae.decode(image_parameters, mean), frames),
            IMAGE_LATENTS: (vae.decode(parameters, image_mean), video),
            IMAGE_ALONE: (image_vae.decode(image_parameters, image_mean), frames),
        }
        means["image_latent"] = image_mean
    return {name: (clip.astype(jnp.float32), target) for name, (clip, target) in clips.items()}, means


def fidelity(clips: Reconstructions, perceptual: PerceptualDistance, frozen: Parameters) -> dict[str, jax.Array]:
    """PSNR and SSIM on [0, 1], L1 on [-1, 1] and perceptual distance per clip, means over its frames, of each kind of
    reconstruction."""
    values: dict[str, jax.Array] = {}
    for prefix, (clip, target) in clips.items():
        batch = len(clip)
        frames, target = (rearrange(x, "b f h w c -> (b f) h w c") for x in (jnp.clip(clip, -1, 1), target))
        unit = unit_from_signed(frames), unit_from_signed(target)
        metrics = {
            "psnr": peak_signal_to_noise(*unit, data_range=1.0),
            "ssim": structural_similarity(*unit, data_range=1.0),
            "l1": absolute_error(frames, target),
        }
        if perceptual.enabled:
            metrics[perceptual.metric_name] = perceptual.distance(frozen, frames, target)
        for name, per_frame in metrics.items():
            values[f"{prefix}{name}"] = jnp.mean(rearrange(per_frame, "(b f) -> b f", b=batch), axis=1)
    return values


def statistics(means: Mapping[str, jax.Array]) -> Metrics:
    """Mean and mean square of each latent channel, and with an image VAE the mean squared distance of the latents."""
    metrics: Metrics = {}
    for name, mean in means.items():
        mean = mean.astype(jnp.float32)
        count = jnp.float32(mean[..., 0].size)
        for channel in range(mean.shape[-1]):
            values = mean[..., channel]
            metrics[f"{name}/mean_{channel}"] = Mean(jnp.sum(values), count)
            metrics[f"{name}/square_{channel}"] = Mean(jnp.sum(jnp.square(values)), count)
    if len(means) == 2:
        gap = jnp.square(means["latent"].astype(jnp.float32) - means["image_latent"].astype(jnp.float32))
        metrics["latent/squared_distance"] = Mean(jnp.sum(gap), jnp.float32(gap.size))
    return metrics


def evaluate(
    vae: ClipVAE,
    parameters: Parameters,
    video: Float[Array, "B F H W C"],
    perceptual: PerceptualDistance,
    frozen: Parameters,
    *,
    image_vae: ClipVAE | None,
    image_parameters: Parameters | None,
) -> Metrics:
    """`fidelity` and `statistics` of a batch.

    Args:
      vae, parameters: the video VAE.
      video: clips in [-1, 1].
      perceptual, frozen: the distance, and the frozen networks that hold its weights.
      image_vae, image_parameters: the image VAE; None for none.
    """
    clips, means = reconstructions(vae, parameters, video, image_vae, image_parameters)
    values = fidelity(clips, perceptual, frozen)
    count = jnp.float32(len(video))
    return {name: Mean(jnp.sum(per_clip), count) for name, per_clip in values.items()} | statistics(means)


def reconstructed_clips(
    vae: ClipVAE,
    parameters: Parameters,
    video: Float[Array, "B F H W C"],
    image_vae: ClipVAE | None,
    image_parameters: Parameters | None,
) -> dict[str, Clips]:
    """uint8 clips of the `reconstructions` of a batch; see `uint8_clips`."""
    return uint8_clips(reconstructions(vae, parameters, video, image_vae, image_parameters)[0])


def uint8_clips(clips: Reconstructions) -> dict[str, Clips]:
    """Reconstructions as uint8 clips of equal length: frames of the image decoder are repeated."""
    names = {OWN: "reconstruction", IMAGE_DECODER: "image_decoder", IMAGE_LATENTS: "image_latents"}
    frames, found = clips[OWN][1].shape[1], {}
    for prefix, name in names.items():
        if prefix in clips:
            clip, finite = to_clips(clips[prefix][0])
            group = (frames - 1) // max(clip.shape[1] - 1, 1)
            found[name] = Clips(jnp.concatenate([clip[:, :1], jnp.repeat(clip[:, 1:], group, axis=1)], axis=1), finite)
    return found
