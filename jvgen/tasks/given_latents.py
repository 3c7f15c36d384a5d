"""Latents of what is given beside captions: of frames that clips are conditioned on, of videos that they start from."""

import jax
import jax.numpy as jnp
from einops import rearrange

from jvgen.diffusion.objective import slot_normal
from jvgen.diffusion.sampler import SamplerConfig, first_step, partly_noised
from jvgen.diffusion.schedule import Schedule
from jvgen.models.image_vae import posterior
from jvgen.nn.network import Parameters, run_frozen
from jvgen.tasks import given_frames
from jvgen.tasks.clip_vae import ClipVAE
from jvgen.tasks.pixels import from_uint8
from jvgen.tasks.task import Batch
from jvgen.tasks.text_to_video_config import TextToVideoFields


class GivenLatents:
    """Makes latents of given frames and videos; its methods are pure and are traced under `jax.jit`.

    Args:
      config: of the task.
      schedule: its noise levels.
      coder: its VAE; None only if nothing is ever given.
    """

    def __init__(self, config: TextToVideoFields, schedule: Schedule, coder: ClipVAE | None):
        self._config, self._schedule, self._coder = config, schedule, coder

    def drawn(self, moments: jax.Array, key: jax.Array, slots: jax.Array, sampled: bool | None = None) -> jax.Array:
        """Latents `B F H W C` as the VAE makes them, float32, of posterior moments.

        Args:
          sampled: draw from the posterior, or take its mean; by default as `sample_posterior` says.
        """
        moments = moments.astype(jnp.float32)
        latents = posterior.mode(moments)
        if self._config.sample_posterior if sampled is None else sampled:
            latents = posterior.sample(moments, slot_normal(key, latents.shape, slots))
        return latents

    def normalized(self, latents: jax.Array) -> jax.Array:
        """Latents of the VAE as the denoiser takes them."""
        return (latents - self._config.latent_shift) * self._config.latent_scale

    def padded(self, latents: jax.Array) -> jax.Array:
        """Latents `B F ...` with the first frame repeated in front, up to a multiple of the temporal patch."""
        missing = -latents.shape[1] % (self._config.denoiser.temporal_patch or 1)
        return jnp.concatenate([jnp.repeat(latents[:, :1], missing, axis=1), latents], axis=1) if missing else latents

    def batch_frames(self, rows: Batch) -> jax.Array | None:
        """Frames `B K H W 3`, uint8, that the clips of a batch are conditioned on; None without a condition."""
        if not self._config.given_frames:
            return None
        return rows["given"] if "given" in rows else given_frames.of_clip(rows["video"], self._config.condition, axis=1)

    def training_condition(self, frozen: Parameters, rows: Batch, key: jax.Array, count: int) -> jax.Array | None:
        """`condition` of a batch's frames with noise, and with zeros for clips that are dropped."""
        config, slots, frames = self._config, rows["slot"], self.batch_frames(rows)
        if frames is None:
            return None
        frames = given_frames.noised(
            from_uint8(frames), key, slots, mean=config.condition_noise_mean, std=config.condition_noise_std
        )
        latents = self.condition(frozen, frames, key, slots, count)
        return given_frames.dropped(latents, key, slots, config.condition_dropout)

    def condition(
        self,
        frozen: Parameters,
        frames: jax.Array | None,
        key: jax.Array,
        slots: jax.Array,
        count: int,
        *,
        sampled: bool | None = None,
    ) -> jax.Array | None:
        """Latents `B F H W C` that the denoiser takes beside the noisy ones, float32; None without given frames.

        Args:
          frames: `B K H W 3`, uint8, or floats in [-1, 1]; each is encoded for itself.
          count: latent frames F, with padding.
          sampled: see `drawn`.
        """
        if frames is None:
            return None
        frames = from_uint8(frames) if frames.dtype == jnp.uint8 else frames
        single = given_frames.one_by_one(frames)
        moments = run_frozen(lambda: self._coder.moments(frozen["vae"], single), len(single))
        moments = rearrange(moments, "(b k) 1 h w c -> b k h w c", b=len(frames))
        return self.condition_of_moments(moments, key, slots, count, sampled=sampled)

    def condition_of_moments(
        self, moments: jax.Array, key: jax.Array, slots: jax.Array, count: int, *, sampled: bool | None = None
    ) -> jax.Array:
        """`condition` of the posterior moments `B K H W 2C` of the given frames."""
        config = self._config
        latents = self.drawn(moments, jax.random.fold_in(key, given_frames.FRAME_POSTERIOR_KEY), slots, sampled)
        scale = 1 / config.latent_scale if config.inverts_given_scale else config.latent_scale
        return given_frames.placed((latents - config.latent_shift) * scale, config.condition, count)

    def start(
        self,
        moments: jax.Array | None,
        noise: jax.Array,
        key: jax.Array,
        slots: jax.Array,
        sampler: SamplerConfig,
        strength: float | None,
    ) -> tuple[jax.Array, int]:
        """What sampling starts from, `B F H W C` float32, and the sampler's step that it is the input of.

        Args:
          moments: posterior moments of given clips, `B f H W 2C`; None to start from the noise.
          noise: standard normal.
          strength: see `jvgen.tasks.task.SampleRequest`.
        """
        if moments is None or strength is None:
            return noise, 0
        first = first_step(sampler.steps, strength)
        latents = self.drawn(moments, jax.random.fold_in(key, given_frames.VIDEO_POSTERIOR_KEY), slots)
        clean = self.padded(self.normalized(latents))
        return partly_noised(clean, noise, sampler=sampler, schedule=self._schedule, first=first), first
