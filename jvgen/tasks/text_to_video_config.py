"""Fields and checks of the text-to-video configuration; `text_to_video.py` adds the task that it builds."""

import dataclasses
from typing import Annotated, Literal

from jvgen.data.stream.config import BucketConfig, DataConfig
from jvgen.data.stream.source_checks import (
    check_one_encoder,
    check_pixels,
    check_text_embeddings,
    text_embeddings_of,
)
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig, check_schedule, coefficients, first_step
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.interop.architecture import check_architecture
from jvgen.interop.digest import content_digest
from jvgen.interop.from_torch import read_config
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nn.embeddings import token_grid
from jvgen.nn.lora import LoraConfig
from jvgen.storage import as_path
from jvgen.tasks.alignment import AlignmentConfig
from jvgen.tasks.clip_vae import VAEConfig, temporal_downsampling
from jvgen.tasks.given_frames import PLACES, Condition, check_condition, check_given
from jvgen.tasks.pixels import check_channels
from jvgen.tasks.task import SampleRequest, TaskConfig
from jvgen.tasks.text import TextConfig
from jvgen.value_rules import BelowOne, Bounds, Count, CountOrZero


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToVideoFields(TaskConfig):
    """A denoiser of latent clips, conditioned on captions and, for image to video, on frames of the clip.

    Attributes:
      denoiser: the trained network.
      text: the text encoder, trained (bytes) or frozen (T5).
      vae: architecture of the frozen VAE; none if latents come from the data and nothing is decoded.
      vae_weights: exported folder of the VAE's weights.
      latents: source of clean latents: cached in the data set ("data") or encoded in the step ("pixels").
      latent_scale, latent_shift: latents are (z - shift) * scale before noise is added.
      spatial_compression, temporal_compression: pixels (per side) and frames per latent; F frames give
        (F - 1) / temporal_compression + 1 latent frames.
      sample_posterior: sample latents from the VAE's posterior in every step; otherwise use its mean.
      validation_timesteps: number of fixed timesteps at which an evaluation measures the "validation_loss" of every
        clip, each with fixed noise, from posterior means and without caption dropout; 0 for none. Each costs a
        forward pass.
      caption_dropout: fraction of captions replaced by the unconditional embedding, for classifier-free guidance.
      condition: frames of the clip that are given: none, the first one, or the first and the last. Each is encoded for
        itself, and its latents are further input channels of the denoiser at its place, with zeros elsewhere. Needs
        the VAE, and pixels in the data set also with `latents` = "data" (`jvgen data build latents --keep-clips`).
      condition_dropout: fraction of clips trained with zeros in place of the given frames; 0.05 as released.
      condition_noise_mean, condition_noise_std: in training, noise is added to given frames in [-1, 1]; these are the
        mean and the standard deviation of the logarithm of its standard deviation, -3 and 0.5 as released. A mean of
        none adds no noise.
      schedule, objective: noise levels, prediction target, timesteps and loss weights.
      sampler, guidance: defaults for generated clips.
      enhance: Enhance-A-Video's scaling of attention in generated clips; none turns it off.
      visualize_clips: number of clips generated for TensorBoard; 0 for none.
      lora: train a LoRA of the denoiser (by default of its attention), of the text encoder, or of both, and nothing
        else; needs denoiser_weights, and text_encoder_weights with a byte encoder. Checkpoints, moments and EMA are of
        the LoRA alone.
      denoiser_weights: exported or published folder of the denoiser, which is not trained; none to train it.
      text_encoder_weights: exported folder of a byte encoder, which is not trained; none to train it.
      alignment: also align hidden states with the features of a frozen image encoder; none for the diffusion loss
        alone. Needs pixels in the data set, as `condition` does.
    """

    denoiser: VideoDiTConfig
    text: TextConfig
    vae: VAEConfig | None = None
    vae_weights: str | None = None
    latents: Literal["data", "pixels"] = "data"
    latent_scale: Annotated[float, Bounds(above=0, fix="1 / standard deviation of latents")] = 1.0
    latent_shift: float = 0.0
    spatial_compression: Count = 8
    temporal_compression: Count = 4
    sample_posterior: bool = True
    caption_dropout: BelowOne = 0.1
    condition: Condition = "none"
    condition_dropout: BelowOne = 0.05
    condition_noise_mean: Annotated[float, Bounds(at_least=-20, at_most=2, fix="none adds no noise")] | None = -3.0
    condition_noise_std: Annotated[float, Bounds(at_least=0, at_most=10)] = 0.5
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    enhance: EnhanceConfig | None = None
    visualize_clips: CountOrZero = 4
    validation_timesteps: Annotated[int, Bounds(at_least=0, at_most=1000)] = 10
    lora: LoraConfig | None = None
    denoiser_weights: str | None = None
    text_encoder_weights: str | None = None
    alignment: AlignmentConfig | None = None

    def validate(self) -> None:
        self.check_trained()
        check_condition(self.condition, self.denoiser, "denoiser")
        self.objective.check_schedule(self.schedule)
        check_schedule(self.sampler, self.schedule)
        if self.text.width != self.denoiser.text_width:
            raise ValueError(
                f"text.width = {self.text.width} but denoiser.text_width = {self.denoiser.text_width}: make them equal."
            )
        if self.text.length > self.denoiser.text_length:
            raise ValueError(
                f"text.length = {self.text.length} is more than denoiser.text_length = {self.denoiser.text_length}."
            )
        if self.text_encoder_weights is not None and not isinstance(self.text.encoder, ByteTextConfig):
            raise ValueError(
                f"text_encoder_weights = {self.text_encoder_weights!r}: it is for a byte encoder; name "
                "the folder of T5 in text.weights."
            )
        if self.latents == "pixels" and self.vae is None:
            raise ValueError("latents = 'pixels' needs vae (and vae_weights): pixels are encoded in the step.")
        if self.condition != "none" and self.vae is None:
            raise ValueError(
                f"condition = {self.condition!r} needs vae (and vae_weights): given frames are encoded in the step."
            )
        if self.vae is not None:
            check_channels("vae.channels", self.vae.channels)
            if self.vae.latent_channels != self.denoiser.out_channels:
                raise ValueError(
                    f"vae.latent_channels = {self.vae.latent_channels} but denoiser.out_channels = "
                    f"{self.denoiser.out_channels}: make them equal."
                )
            times = temporal_downsampling(self.vae)
            if self.temporal_compression != times:
                kind = (
                    "an image VAE, with one latent per frame" if times == 1 else f"one with {times} frames per latent"
                )
                raise ValueError(f"vae is {kind}: set temporal_compression = {times}.")
            if self.spatial_compression != self.vae.downsampling:
                raise ValueError(
                    f"spatial_compression = {self.spatial_compression}, but the VAE's is {self.vae.downsampling}."
                )
        if self.enhance is not None:
            self.enhance.check_layers(self.denoiser.layers)
        if self.alignment is not None:
            self.alignment.check_denoiser(self.denoiser)

    @property
    def given_frames(self) -> int:
        """Frames that a clip is conditioned on."""
        return len(PLACES[self.condition])

    @property
    def inverts_given_scale(self) -> bool:
        """Whether latents of given frames are divided by `latent_scale`, as CogVideoX1.5-5B-I2V was trained."""
        return bool(getattr(self.vae, "invert_scale_latents", False))

    def denoised_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """As `latent_shape`, with extra latent frames up to a multiple of the temporal patch: what the denoiser sees.

        As CogVideoX1.5 does, the first latent frame is repeated in front in training, and after sampling the first
        ones are dropped.

        Raises:
          ValueError: a size that the VAE or the patches do not divide, too short for two given frames, or not that of
            learned positions.
        """
        shape = self.latent_shape(frames, height, width)
        if self.given_frames > 1 and shape[0] < 2:
            raise ValueError(
                f"frames = {frames}: condition = {self.condition!r} needs at least two latent frames; take "
                f"{self.temporal_compression + 1} or more."
            )
        shape = (shape[0] + -shape[0] % (self.denoiser.temporal_patch or 1), *shape[1:])
        grid = token_grid(shape, self.denoiser.patch_shape)
        try:
            self.denoiser.check_grid(grid)
        except ValueError as error:
            raise ValueError(f"{frames} frames of {height}x{width} pixels are {error}") from error
        return shape

    def clip_frames(self, frames: int) -> int:
        """Latent frames of a clip of `frames` frames."""
        return (frames - 1) // self.temporal_compression + 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip in pixels.

        Raises:
          ValueError: a size that the VAE or the patches do not divide.
        """
        if isinstance(self.vae, CogVideoXVAEConfig):
            self.vae.check_clip(frames, height, width)
        if (frames - 1) % self.temporal_compression:
            nearest = frames - (frames - 1) % self.temporal_compression
            raise ValueError(
                f"frames = {frames}: with temporal_compression = {self.temporal_compression} a clip has "
                f"{self.temporal_compression}n + 1 frames; take {nearest} or {nearest + self.temporal_compression}."
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
            raise ValueError(f"views = {bucket.views}: this task supports one view per clip; set views = 1.")
        self.denoised_shape(bucket.frames, bucket.height, bucket.width)

    def check_trained(self) -> None:
        """Raise `ValueError` if nothing of the denoiser would be trained."""
        if self.lora is None and self.denoiser_weights is not None:
            raise ValueError(
                f"denoiser_weights = {self.denoiser_weights!r} with lora = none: nothing of the denoiser would be "
                "trained. Set lora; or leave denoiser_weights none, and make a run that starts with these weights by "
                "`jvgen import`."
            )

    def check_weights(self) -> None:
        self.text.check_files()
        for field, folder, config in (
            ("denoiser_weights", self.denoiser_weights, self.denoiser.plain),
            ("text_encoder_weights", self.text_encoder_weights, self.text.encoder),
        ):
            if folder is not None:
                check_architecture(folder, config, f"task.{field}")
            elif self.lora is not None and (field == "denoiser_weights" or isinstance(config, ByteTextConfig)):
                raise ValueError(f"task.{field} = none: a LoRA leaves this network as it is; name its exported folder.")
        if self.alignment is not None:
            self.alignment.check_weights()
        if self.vae is None:
            return
        if self.vae_weights is None:
            raise ValueError("task.vae_weights = none: name the exported folder of the VAE (`jvgen export`).")
        check_architecture(self.vae_weights, self.vae, "task.vae_weights")

    def with_vae(self, folder: str) -> "TextToVideoFields":
        if self.vae is not None:
            raise ValueError(f"--vae {folder}: the run's config names a VAE, task.vae_weights = {self.vae_weights!r}.")
        vae = read_config(as_path(folder))
        if not isinstance(vae, VAEConfig):
            raise ValueError(f"--vae {folder}: holds a {type(vae).__name__}, not an autoencoder of images or clips.")
        if isinstance(vae, CogVideoXVAEConfig) and vae.scaling_factor != self.latent_scale:
            raise ValueError(
                f"--vae {folder}: its scaling_factor is {vae.scaling_factor}, the run was trained on latents times "
                f"{self.latent_scale} (task.latent_scale); give the VAE that made them."
            )
        found = self.replace(vae=vae, vae_weights=str(folder))
        try:
            found.validate()
        except ValueError as error:
            raise ValueError(f"--vae {folder}: does not fit the run's latents: {error}") from error
        return found

    def without_lora(self) -> "TextToVideoFields":
        return self.replace(lora=None, denoiser_weights=None, text_encoder_weights=None) if self.lora else self

    def for_prompts(self) -> "TextToVideoFields":
        text = self.text
        if text.embeddings is None or text.weights is None or text.tokenizer is None:
            return self
        return self.replace(text=text.replace(embeddings=None))

    def check_data(self, data: DataConfig) -> None:
        if self.text.embeddings is not None:
            check_text_embeddings(data, text_embeddings_of(self.text.embeddings))
        if self.latents == "pixels" or self.given_frames or self.alignment is not None:
            for source in (*data.sources, *data.evaluation_sources):
                check_pixels(source)
        if self.latents == "data":
            check_one_encoder(data, None if self.vae_weights is None else content_digest(self.vae_weights))

    @property
    def supports_sampling(self) -> bool:
        return self.vae is not None

    def check_request(self, request: SampleRequest) -> None:
        if self.vae is None:
            raise ValueError("task.vae = none: clips cannot be decoded; give --vae DIR, the VAE that made the latents.")
        BucketConfig(frames=request.frames, height=request.height, width=request.width, batch_size=1).validate()
        self.denoised_shape(request.frames, request.height, request.width)
        check_given(self.condition, request.given_frames)
        if request.strength is not None and self.condition != "none":
            raise ValueError(
                f"--video: these weights make clips from images (condition = {self.condition!r}); give weights of a "
                "text-to-video network, or --image without --video."
            )
        sampler, _ = self.sampling(request)
        if request.strength is not None:
            first_step(sampler.steps, request.strength)
        if request.enhance is not None:
            request.enhance.validate()
            request.enhance.check_layers(self.denoiser.layers)

    def sampling(self, request: SampleRequest) -> tuple[SamplerConfig, GuidanceConfig]:
        """Sampler and guidance of a request.

        Raises:
          ValueError: a number of steps that the sampler or the guidance does not support.
        """
        sampler, guidance = self.sampler, self.guidance
        if request.steps is not None:
            sampler = sampler.replace(steps=request.steps)
        if request.guidance is not None:
            kind = "none" if request.guidance == 1 else "constant" if guidance.kind == "none" else guidance.kind
            guidance = guidance.replace(kind=kind, scale=request.guidance)
        coefficients(sampler, self.schedule.build(), self.objective.target, guidance)
        return sampler, guidance
