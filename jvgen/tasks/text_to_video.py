"""Training a text-to-video diffusion transformer on VAE latents (CogVideoX, arXiv 2408.06072)."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.source_checks import check_latents, check_pixels
from jvgen.diffusion.guidance import GuidanceConfig, guided, unguided
from jvgen.diffusion.objective import (
    ObjectiveConfig,
    draw_noise,
    draw_timesteps,
    loss_by_band,
    loss_per_sample,
    slot_keys,
    slot_normal,
)
from jvgen.diffusion.sampler import SamplerConfig, coefficients, sample
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.interop import schedulers
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import content_digest
from jvgen.interop.from_torch import import_folder
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.image_vae import posterior
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.models.video_dit.flops import forward_flops
from jvgen.models.video_dit.model import AttentionScale, VideoDiT
from jvgen.nn.embeddings import token_grid
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.tasks.clip_coder import ClipCoder, CoderConfig, temporal_downsampling
from jvgen.tasks.layer_analysis import look_at_layers
from jvgen.tasks.pixels import to_uint8
from jvgen.tasks.task import ArraySpec, Batch, Mean, Metrics, SampleRequest, Task, TaskConfig, activation_dtype
from jvgen.tasks.text import TextConfig, TextEncoder

# Purposes of a step's key beyond those of jvgen.diffusion.objective; numbers never change their meaning.
CAPTION_KEY = 16
POSTERIOR_KEY = 17
START_KEY = 18
SAMPLER_KEY = 19


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToVideoConfig(TaskConfig):
    """A denoiser over latent clips, conditioned on captions.

    Attributes:
      denoiser: the network that is trained.
      text: the text encoder, trained along (bytes) or frozen (T5).
      vae: architecture of the frozen VAE; none where latents come from the data and nothing has to be decoded.
      vae_weights: exported folder of that VAE's weights.
      latents: where clean latents come from: cached in the data set ("data") or encoded in the step ("pixels").
      latent_scale, latent_shift: latents are (z - shift) * scale before noise is added.
      spatial_compression, temporal_compression: pixels and frames a latent; F frames give (F - 1) / temporal + 1.
      sample_posterior: draw latents from the VAE's posterior in every step; otherwise use its mean.
      caption_dropout: share of captions replaced by the empty one, for classifier-free guidance.
      schedule, objective: noise levels, prediction target, timesteps and weights.
      sampler, guidance: how clips are generated unless a command says otherwise.
      enhance: Enhance-A-Video's scaling of attention in generated clips; none for none.
      visualize_clips: clips generated for TensorBoard.
    """

    denoiser: VideoDiTConfig
    text: TextConfig
    vae: CoderConfig | None = None
    vae_weights: str | None = None
    latents: Literal["data", "pixels"] = "data"
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    spatial_compression: int = 8
    temporal_compression: int = 4
    sample_posterior: bool = True
    caption_dropout: float = 0.1
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    enhance: EnhanceConfig | None = None
    visualize_clips: int = 4

    def validate(self) -> None:
        self.objective.check_schedule(self.schedule)
        if self.text.width != self.denoiser.text_width:
            raise ValueError(
                f"text.width = {self.text.width} but denoiser.text_width = {self.denoiser.text_width}: make them equal."
            )
        if self.text.length > self.denoiser.text_length:
            raise ValueError(
                f"text.length = {self.text.length} is more than denoiser.text_length = {self.denoiser.text_length}."
            )
        if self.latents == "pixels" and self.vae is None:
            raise ValueError("latents = 'pixels' needs vae (and vae_weights): pixels are encoded in the step.")
        if self.vae is not None:
            if self.vae.latent_channels != self.denoiser.out_channels:
                raise ValueError(
                    f"vae.latent_channels = {self.vae.latent_channels} but denoiser.out_channels = "
                    f"{self.denoiser.out_channels}: make them equal."
                )
            times = temporal_downsampling(self.vae)
            if self.temporal_compression != times:
                kind = "an image VAE, which keeps every frame" if times == 1 else f"one of {times} frames a latent"
                raise ValueError(f"vae is {kind}: set temporal_compression = {times}.")
            if self.spatial_compression != self.vae.downsampling:
                raise ValueError(
                    f"spatial_compression = {self.spatial_compression}, but the VAE's is {self.vae.downsampling}."
                )
        if self.enhance is not None:
            self.enhance.check_layers(self.denoiser.layers)
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout = {self.caption_dropout}: a share from 0 up to 1.")
        if self.latent_scale <= 0:
            raise ValueError(
                f"latent_scale = {self.latent_scale}: must be positive (1 / standard deviation of latents)."
            )

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip in pixels.

        Raises:
          ValueError: a size that the VAE or the patches do not divide.
        """
        shape = self._clip_shape(frames, height, width)
        token_grid(shape, self.denoiser.patch_shape)
        return shape

    def sampled_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """As `latent_shape`, with as many latent frames more as patches of several frames need.

        A clip is what remains without the first of them, as CogVideoX1.5 is sampled from.
        """
        shape = self._clip_shape(frames, height, width)
        shape = (shape[0] + -shape[0] % (self.denoiser.temporal_patch or 1), *shape[1:])
        token_grid(shape, self.denoiser.patch_shape)
        return shape

    def clip_frames(self, frames: int) -> int:
        """Latent frames of a clip."""
        return (frames - 1) // self.temporal_compression + 1

    def _clip_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        if isinstance(self.vae, CogVideoXVAEConfig):
            self.vae.check_clip(frames, height, width)
        if (frames - 1) % self.temporal_compression:
            raise ValueError(
                f"frames = {frames}: with temporal_compression = {self.temporal_compression} a clip has "
                f"{self.temporal_compression}n + 1 frames; take {frames - (frames - 1) % self.temporal_compression}."
            )
        step = self.spatial_compression * self.denoiser.patch
        for name, size in (("height", height), ("width", width)):
            if size % step:
                raise ValueError(
                    f"{name} = {size}: must be a multiple of {step} (VAE {self.spatial_compression} x patch "
                    f"{self.denoiser.patch}); take {size // step * step or step}."
                )
        return (
            self.clip_frames(frames),
            height // self.spatial_compression,
            width // self.spatial_compression,
        )

    def check_bucket(self, bucket: BucketConfig) -> None:
        if bucket.views != 1:
            raise ValueError(f"views = {bucket.views}: this task sees one camera at a time; set views = 1.")
        self.latent_shape(bucket.frames, bucket.height, bucket.width)

    def check_weights(self) -> None:
        self.text.check_files()
        if self.vae is None:
            return
        if self.vae_weights is None:
            raise ValueError("task.vae_weights = none: name the exported folder of the VAE (`jvgen export`).")
        check_architecture(self.vae_weights, self.vae, "task.vae_weights")

    def check_data(self, data: DataConfig) -> None:
        if self.latents == "pixels":
            for source in (*data.sources, *data.evaluation_sources):
                check_pixels(source)
        elif self.vae_weights is not None:
            digest = content_digest(self.vae_weights)
            for path in sorted({source.path for source in (*data.sources, *data.evaluation_sources)}):
                check_latents(path, digest)

    def check_request(self, request: SampleRequest) -> None:
        if self.vae is None:
            raise ValueError("task.vae = none: clips cannot be decoded; set task.vae and task.vae_weights.")
        BucketConfig(frames=request.frames, height=request.height, width=request.width, batch_size=1).validate()
        self.sampled_shape(request.frames, request.height, request.width)
        self.sampling(request)
        if request.enhance is not None:
            request.enhance.validate()
            request.enhance.check_layers(self.denoiser.layers)

    def sampling(self, request: SampleRequest) -> tuple[SamplerConfig, GuidanceConfig]:
        """Sampler and guidance, with what a request says of them.

        Raises:
          ValueError: a number of steps that the sampler or the guidance cannot take.
        """
        sampler, guidance = self.sampler, self.guidance
        if request.steps is not None:
            sampler = sampler.replace(steps=request.steps)
        if request.guidance is not None:
            kind = "none" if request.guidance == 1 else "constant" if guidance.kind == "none" else guidance.kind
            guidance = guidance.replace(kind=kind, scale=request.guidance)
        coefficients(sampler, self.schedule.build(), self.objective.target, guidance)
        return sampler, guidance

    def build(self) -> "TextToVideo":
        return TextToVideo(self)


class TextToVideo(Task):
    """See `TextToVideoConfig`. Trains "denoiser" and, unless it is frozen, "text_encoder"."""

    def __init__(self, config: TextToVideoConfig):
        self.config = config
        self.schedule = config.schedule.build()
        self.text = TextEncoder(config.text)
        self.networks = {"denoiser": Network.of(lambda rngs: VideoDiT(config.denoiser, rngs=rngs))}
        self.network_configs = {"denoiser": config.denoiser}
        self.frozen_networks = {}
        place = self.frozen_networks if self.text.frozen else self.networks
        place["text_encoder"] = self.text.network
        if not self.text.frozen:
            self.network_configs["text_encoder"] = config.text.encoder
        if config.vae is not None:
            self.coder = ClipCoder(config.vae)
            self.frozen_networks["vae"] = self.coder.network

    def load_frozen(self) -> Parameters:
        frozen: Parameters = {}
        if self.text.frozen:
            frozen["text_encoder"] = self.text.load()
        if self.config.vae is not None:
            frozen["vae"] = import_folder(self.config.vae_weights)[1]
        return frozen

    def frozen_digest(self) -> str:
        folders = [self.config.text.weights if self.text.frozen else None, self.config.vae_weights]
        return "+".join(content_digest(folder) for folder in folders if folder is not None)

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        frames, height, width = self.config.latent_shape(bucket.frames, bucket.height, bucket.width)
        tokens = ArraySpec((self.config.text.length,), np.dtype(np.int32), (None,))
        if self.config.latents == "data":
            channels = 2 * self.config.denoiser.out_channels
            shape, names = (frames, height, width, channels), (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
            return {"latents": ArraySpec(shape, np.dtype(np.float32), names), "tokens": tokens}
        shape, names = (bucket.frames, bucket.height, bucket.width, 3), (axes.FRAMES, axes.HEIGHT, axes.WIDTH, None)
        return {"video": ArraySpec(shape, np.dtype(np.uint8), names), "tokens": tokens}

    def prepare(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        tokens = self.text.tokenize(example["caption"])
        if self.config.latents == "pixels":
            if "video" not in example:
                raise ValueError(
                    "task.latents = 'pixels', but the data set holds cached latents only: set it to 'data'."
                )
            return {"video": example["video"], "tokens": tokens}
        if "latents" not in example:
            raise ValueError(
                "task.latents = 'data', but the data set holds pixels: cache latents with `jvgen data build latents`, "
                "or set task.latents = 'pixels'."
            )
        return {"latents": example["latents"], "tokens": tokens}

    # Loss.

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        config, slots = self.config, batch["slot"]
        clean = self.clean_latents(frozen, batch, key)
        noise = draw_noise(key, clean.shape, slots)
        size = token_grid(clean.shape[1:4], config.denoiser.patch_shape)
        timesteps = draw_timesteps(
            key, clean.shape[0], config.objective.timesteps, self.schedule, size=size, slots=slots
        )
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        text = self.text_embeddings(parameters, frozen, self.drop_captions(batch["tokens"], key, slots))
        prediction = self.denoise(parameters, noisy, timesteps, text)
        weighted, plain = loss_per_sample(prediction, clean, noise, timesteps, config.objective, self.schedule)
        bands = loss_by_band(plain, timesteps, config.objective.bands)
        return jnp.mean(weighted), {name: Mean(*pair) for name, pair in bands.items()}

    def clean_latents(self, frozen: Parameters, batch: Batch, key: jax.Array) -> jax.Array:
        """Normalised clean latents `B F H W C`, float32, cached or encoded now."""
        if self.config.latents == "data":
            moments = batch["latents"]
        else:
            moments = self.encode(frozen, batch["video"])
        moments = moments.astype(jnp.float32)
        latents = posterior.mode(moments)
        if self.config.sample_posterior:
            noise = slot_normal(jax.random.fold_in(key, POSTERIOR_KEY), latents.shape, batch["slot"])
            latents = posterior.sample(moments, noise)
        return (latents - self.config.latent_shift) * self.config.latent_scale

    def encode(self, frozen: Parameters, video: jax.Array) -> jax.Array:
        """Moments `B F H W 2C` of uint8 clips."""
        return self.coder.encode(frozen["vae"], video)

    def decode(self, frozen: Parameters, latents: jax.Array) -> jax.Array:
        """uint8 clips of normalised latents `B F H W C`."""
        return to_uint8(self.decode_pixels(frozen["vae"], latents))

    def decode_pixels(self, vae: Parameters, latents: jax.Array) -> jax.Array:
        """Clips in [-1, 1], up to the error of the VAE, of normalised latents `B F H W C`."""
        return self.coder.decode(vae, latents / self.config.latent_scale + self.config.latent_shift)

    def drop_captions(self, tokens: jax.Array, key: jax.Array, slots: jax.Array) -> jax.Array:
        """Replace some captions by the empty one, slot by slot."""
        keys = slot_keys(jax.random.fold_in(key, CAPTION_KEY), slots)
        drop = jax.vmap(lambda k: jax.random.bernoulli(k, self.config.caption_dropout))(keys)
        return jnp.where(drop[:, None], self.text.null_tokens(), tokens)

    def text_embeddings(self, parameters: Parameters, frozen: Parameters, tokens: jax.Array) -> jax.Array:
        """Embeddings `B L C` of token ids."""
        return self.text.embed((frozen if self.text.frozen else parameters)["text_encoder"], tokens)

    def denoise(
        self,
        parameters: Parameters,
        noisy: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        attention_scale: AttentionScale | None = None,
    ) -> jax.Array:
        """The denoiser's prediction for noisy latents, in the compute dtype of the parameters."""
        dtype = activation_dtype(parameters["denoiser"])
        return self.networks["denoiser"].apply(
            parameters["denoiser"], noisy.astype(dtype), text.astype(dtype), timesteps, attention_scale=attention_scale
        )

    def look_at_layers(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
    ) -> dict[str, jax.Array]:
        return look_at_layers(self, parameters, frozen, batch, key, timestep)

    # Sampling.

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        return np.stack([self.text.tokenize(prompt) for prompt in prompts])

    def generate(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        slots: jax.Array,
        key: jax.Array,
        request: SampleRequest,
    ) -> jax.Array:
        sampler, guidance = self.config.sampling(request)
        size = (request.frames, request.height, request.width)
        latents = self.generate_latents(
            parameters, frozen, tokens, slots, key, size=size, sampler=sampler, guidance=guidance,
            enhance=request.enhance or self.config.enhance,
        )  # fmt: skip
        return self.decode(frozen, latents)

    def generate_latents(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        slots: jax.Array,
        key: jax.Array,
        *,
        size: tuple[int, int, int],
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        enhance: EnhanceConfig | None = None,
    ) -> jax.Array:
        """Normalised latents `B F H W C` of new clips of `size` (frames, height, width in pixels); see `generate`."""
        shape = (tokens.shape[0], *self.config.sampled_shape(*size), self.config.denoiser.out_channels)
        text = self.text_embeddings(parameters, frozen, tokens)
        enhancement = self.enhancement(enhance, sampler, guidance)

        def denoise(noisy: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
            hook = None if enhancement is None else enhancement(timesteps)
            return self.denoise(parameters, noisy, timesteps, text, hook)

        if guidance.kind == "none":
            step = unguided(denoise, text)
        else:
            empty = self.text_embeddings(parameters, frozen, self.text.null_tokens()[None])
            step = guided(denoise, text, jnp.broadcast_to(empty, text.shape), rescale=guidance.rescale)
        start = slot_normal(jax.random.fold_in(key, START_KEY), shape, slots)
        latents = sample(
            step, start, schedule=self.schedule, sampler=sampler, prediction=self.config.objective.target,
            guidance=guidance, key=jax.random.fold_in(key, SAMPLER_KEY), slots=slots,
        )  # fmt: skip
        return latents[:, -self.config.clip_frames(size[0]) :]

    def enhancement(
        self, enhance: EnhanceConfig | None, sampler: SamplerConfig, guidance: GuidanceConfig
    ) -> Callable[[jax.Array], Enhancement] | None:
        """What scales attention, given the timesteps `B` of a step; None where nothing does."""
        if enhance is None:
            return None
        strengths = jnp.asarray(enhance.strengths(self.config.denoiser.layers))
        visited = coefficients(sampler, self.schedule, self.config.objective.target, guidance).timesteps
        acting = [time for step, time in enumerate(visited) if enhance.acts(step, len(visited))]
        if not acting:
            return None
        clip_size = 1 if guidance.kind == "none" else 2

        def at(timesteps: jax.Array) -> Enhancement:
            # Timesteps fall from step to step.
            active = (timesteps[0] <= np.float32(acting[0])) & (timesteps[0] >= np.float32(acting[-1]))
            return Enhancement(enhance, strengths, None if len(acting) == len(visited) else active, clip_size)

        return at

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        if self.config.vae is None:
            return {}
        count = self.config.visualize_clips
        some = {name: value[:count] for name, value in batch.items()}
        real = self.clean_latents(frozen, some, key)
        frames, height, width = real.shape[1:4]
        size = (
            (frames - 1) * self.config.temporal_compression + 1,
            height * self.config.spatial_compression,
            width * self.config.spatial_compression,
        )
        made = self.generate(parameters, frozen, some["tokens"], some["slot"], key, SampleRequest(*size))
        return {"data": self.decode(frozen, real), "sample": made}

    def exported_files(self) -> dict[str, str]:
        config = self.config
        scheduler = schedulers.to_diffusers(
            schedulers.Scheduler(config.schedule, config.objective.target, config.sampler)
        )
        return {"scheduler/scheduler_config.json": json.dumps(scheduler, indent=2) + "\n"} if scheduler else {}

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        shape = self.config.latent_shape(bucket.frames, bucket.height, bucket.width)
        return forward_flops(self.config.denoiser, shape, self.config.text.length)
