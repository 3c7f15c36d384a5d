"""How well a video VAE reconstructs, and how well it shares its latents with an image VAE (CV-VAE, section 4)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvgen.evaluation.reconstruction import peak_signal_to_noise, structural_similarity
from jvgen.losses.frame_mapping import map_frames
from jvgen.losses.reconstruction import absolute_error
from jvgen.models.image_vae import posterior
from jvgen.nn.network import Parameters
from jvgen.tasks.clip_coder import ClipCoder
from jvgen.tasks.perceptual import Perceptual
from jvgen.tasks.pixels import to_uint8
from jvgen.tasks.task import Mean, Metrics

# Clips by how they were made; the first has no prefix in metrics.
OWN = ""
IMAGE_DECODER = "image_decoder/"  # the image VAE's decoder of the video VAE's latents
IMAGE_LATENTS = "image_latents/"  # the video VAE's decoder of the image VAE's latents
IMAGE_ALONE = "image_alone/"  # the image VAE's decoder of its own latents


def reconstructions(
    coder: ClipCoder,
    vae: Parameters,
    video: Float[Array, "B F H W C"],
    image_coder: ClipCoder | None,
    image_vae: Parameters | None,
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
    """Clips (made, wanted) by how they were made, in [-1, 1] and float32, and posterior means by whose they are.

    Means are decoded, nothing is drawn. What an image VAE sees of a clip is the newest frame of each latent frame.
    """
    mean = posterior.mode(coder.moments(vae, video))
    clips = {OWN: (coder.decode(vae, mean), video)}
    means = {"latent": mean}
    if image_coder is not None:
        group = (video.shape[1] - 1) // max(mean.shape[1] - 1, 1)
        frames = map_frames(video, "slice", group)
        theirs = posterior.mode(image_coder.moments(image_vae, frames))
        clips |= {
            IMAGE_DECODER: (image_coder.decode(image_vae, mean), frames),
            IMAGE_LATENTS: (coder.decode(vae, theirs), video),
            IMAGE_ALONE: (image_coder.decode(image_vae, theirs), frames),
        }
        means["image_latent"] = theirs
    return {name: (made.astype(jnp.float32), wanted) for name, (made, wanted) in clips.items()}, means


def fidelity(
    clips: Mapping[str, tuple[jax.Array, jax.Array]], perceptual: Perceptual, frozen: Parameters
) -> dict[str, jax.Array]:
    """PSNR, SSIM, L1 and perceptual distance of each kind of reconstruction: means over frames, one a clip."""
    found: dict[str, jax.Array] = {}
    for prefix, (made, wanted) in clips.items():
        batch = len(made)
        made, wanted = (rearrange(clip, "b f h w c -> (b f) h w c") for clip in (jnp.clip(made, -1, 1), wanted))
        measures = {
            "psnr": peak_signal_to_noise(made, wanted, data_range=2.0),
            "ssim": structural_similarity(made, wanted, data_range=2.0),
            "l1": absolute_error(made, wanted),
        }
        if perceptual.measures:
            measures[perceptual.metric] = perceptual.distance(frozen, made, wanted)
        for name, values in measures.items():
            found[f"{prefix}{name}"] = jnp.mean(rearrange(values, "(b f) -> b f", b=batch), axis=1)
    return found


def statistics(means: Mapping[str, jax.Array]) -> Metrics:
    """Mean and mean square of each channel of latents, and the squared distance of the two kinds if there are two."""
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


def measure(
    coder: ClipCoder,
    vae: Parameters,
    video: Float[Array, "B F H W C"],
    perceptual: Perceptual,
    frozen: Parameters,
    *,
    image_coder: ClipCoder | None,
    image_vae: Parameters | None,
) -> Metrics:
    """`fidelity` and `statistics` of a batch.

    Args:
      coder, vae: the video VAE.
      video: clips in [-1, 1].
      perceptual, frozen: the distance and where its parameters are.
      image_coder, image_vae: the image VAE; None without.
    """
    clips, means = reconstructions(coder, vae, video, image_coder, image_vae)
    found = fidelity(clips, perceptual, frozen)
    count = jnp.float32(len(video))
    return {name: Mean(jnp.sum(values), count) for name, values in found.items()} | statistics(means)


def views(
    coder: ClipCoder,
    vae: Parameters,
    video: Float[Array, "B F H W C"],
    image_coder: ClipCoder | None,
    image_vae: Parameters | None,
) -> dict[str, jax.Array]:
    """uint8 clips to look at; see `shown`."""
    return shown(reconstructions(coder, vae, video, image_coder, image_vae)[0])


def shown(clips: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    """uint8 clips of `reconstructions`, by how they were made; single frames are held until the next one."""
    names = {OWN: "reconstruction", IMAGE_DECODER: "image_decoder", IMAGE_LATENTS: "image_latents"}
    frames, found = clips[OWN][1].shape[1], {}
    for prefix, name in names.items():
        if prefix in clips:
            made = to_uint8(clips[prefix][0])
            group = (frames - 1) // max(made.shape[1] - 1, 1)
            found[name] = jnp.concatenate([made[:, :1], jnp.repeat(made[:, 1:], group, axis=1)], axis=1)
    return found
