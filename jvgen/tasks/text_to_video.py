"""The text-to-video task: a diffusion transformer trained on VAE latents (CogVideoX, arXiv 2408.06072)."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.stream.config import BucketConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import (
    draw_noise,
    draw_timesteps,
    loss_by_band,
    loss_per_sample,
    slot_keys,
    validation_timesteps,
)
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.finite import Clips, Finite
from jvgen.interop import schedulers
from jvgen.interop.digest import content_digest
from jvgen.interop.from_torch import import_folder
from jvgen.models.video_dit import conditioned_start
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.models.video_dit.flops import forward_flops
from jvgen.models.video_dit.model import AttentionScale, VideoDiT
from jvgen.nn import lora
from jvgen.nn.adaptation import Adaptation
from jvgen.nn.embeddings import token_grid
from jvgen.nn.network import Network, Parameters, run_frozen
from jvgen.tasks import clip_batches, clip_sampling, given_frames, text_to_video_lora
from jvgen.tasks.alignment import ENCODER, PROJECTION, Alignment
from jvgen.tasks.clip_sampling import ClipSettings
from jvgen.tasks.clip_vae import ClipVAE
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.given_latents import GivenLatents
from jvgen.tasks.layer_analysis import analyze_layers
from jvgen.tasks.pixels import to_clips, unit_from_signed
from jvgen.tasks.task import (
    ArraySpec,
    Batch,
    Generated,
    Mean,
    Metrics,
    SampleRequest,
    Task,
    activation_dtype,
)
from jvgen.tasks.text import TextEncoder
from jvgen.tasks.text_to_video_config import TextToVideoFields

# Purposes folded into the key of a step, besides those of jvgen.diffusion.objective; old numbers never change.
CAPTION_KEY = 16
POSTERIOR_KEY = 17
# 18 and 19 are those of jvgen.tasks.clip_sampling.
VALIDATION_KEY = 21
# 22 and 23 are those of jvgen.tasks.text_to_video_lora.


class TextToVideo(Task):
    """See `TextToVideoConfig`. Trains "denoiser" and "text_encoder" unless they are frozen, or "lora" instead."""

    def __init__(self, config: TextToVideoFields):
        self.config = config
        self.schedule = config.schedule.build()
        self.text = TextEncoder(config.text)
        self.denoiser_network = Network.of(lambda rngs: VideoDiT(config.denoiser.plain, rngs=rngs))
        self.networks = {"denoiser": self.denoiser_network}
        self.network_configs = {"denoiser": config.denoiser.plain}
        self.frozen_networks = {}
        if self.text.network is not None:
            place = self.frozen_networks if self.text.frozen else self.networks
            place["text_encoder"] = self.text.network
        if not self.text.frozen:
            self.network_configs["text_encoder"] = config.text.encoder
        if config.vae is not None:
            self.coder = ClipVAE(config.vae)
            self.frozen_networks["vae"] = self.coder.network
        self.given = GivenLatents(config, self.schedule, None if config.vae is None else self.coder)
        self._folders = {
            name: folder
            for name, folder in (("denoiser", config.denoiser_weights), ("text_encoder", config.text_encoder_weights))
            if folder is not None
        }
        for name in tuple(self.networks) if config.lora is not None else self._folders:
            if name in self.networks:
                self.frozen_networks[name] = self.networks.pop(name)
                del self.network_configs[name]
        self.alignment = None
        if config.alignment is not None:
            self.alignment = Alignment(config.alignment, config.denoiser.width)
            self.frozen_networks[ENCODER] = self.alignment.encoder
        if config.lora is not None:
            self.backward_passes = 1
            networks = {"denoiser": self.denoiser_network, "text_encoder": self.text.network}
            layers = text_to_video_lora.targets(config.lora, networks, self.frozen_networks)
            self.base_networks = text_to_video_lora.base_networks(config)
            self.networks[lora.TREE] = Network.of(lambda rngs: lora.Factors(layers, rank=config.lora.rank, rngs=rngs))
        if self.alignment is not None:
            self.networks[PROJECTION] = self.alignment.projection

    def adapted_parameters(self) -> Mapping[str, Adaptation]:
        if self.config.condition == "none":
            return {}
        found = conditioned_start.adaptations(self.config.denoiser)
        return {f"denoiser/{path}": adaptation for path, adaptation in found.items()}

    def load_frozen(self) -> Parameters:
        frozen: Parameters = {}
        if "text_encoder" in self.frozen_networks and self.text.frozen:
            frozen["text_encoder"] = self.text.load()
        if self.config.vae is not None:
            frozen["vae"] = import_folder(self.config.vae_weights)[1]
        if self.alignment is not None:
            frozen[ENCODER] = self.alignment.load()
        return frozen | {name: import_folder(folder)[1] for name, folder in self._folders.items()}

    def frozen_digest(self) -> str:
        text = [self.text.digest()] if self.text.frozen and (self.text.cached or self.config.text.weights) else []
        vae = [] if self.config.vae_weights is None else [content_digest(self.config.vae_weights)]
        others = [*self._folders.values(), *((self.config.alignment.weights,) if self.alignment is not None else ())]
        return "+".join(["+".join([*text, *vae]), *(content_digest(folder) for folder in others)])

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        return clip_batches.fields(self.config, bucket) | self.text.fields()

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        return clip_batches.prepare(self.config, example) | self.text.of_example(example)

    # Loss.

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        config, slots = self.config, batch["slot"]
        clean = self.given.padded(self.clean_latents(frozen, batch, key))
        given = self.given.training_condition(frozen, batch, key, clean.shape[1])
        noise = draw_noise(key, clean.shape, slots)
        size = token_grid(clean.shape[1:4], config.denoiser.patch_shape)
        timesteps = draw_timesteps(
            key, clean.shape[0], config.objective.timesteps, self.schedule, size=size, slots=slots
        )
        dropout_keys, text_keys = text_to_video_lora.dropout_keys(config.lora, batch, key)
        captions = self.drop_captions(batch[self.text.field], key, slots)
        text = self.text_embeddings(parameters, frozen, captions, dropout_keys=text_keys)
        if self.alignment is None or "step" not in batch:
            weighted, plain = self.sample_errors(
                parameters, frozen, batch, key, clean, noise, timesteps, text, given, dropout_keys=dropout_keys
            )
            aligned, metrics = 0.0, {}
        else:
            noisy, weights = self.schedule.add_noise(clean, noise, timesteps), {**frozen, **parameters}
            prediction, hidden = self.denoise(
                weights, noisy, timesteps, text, given=given, dropout_keys=dropout_keys,
                hidden_after=config.alignment.layer,
            )  # fmt: skip
            weighted, plain = loss_per_sample(prediction, clean, noise, timesteps, config.objective, self.schedule)
            aligned, metrics = self.alignment.loss(weights, hidden, self.aligned_frames(batch), size, batch["step"][0])
        bands = loss_by_band(plain, timesteps, config.objective.bands)
        return jnp.mean(weighted) + aligned, {name: Mean(*pair) for name, pair in bands.items()} | metrics

    def aligned_frames(self, batch: Batch) -> jax.Array:
        """For each frame of tokens the last recorded frame that it stands for, uint8 `B F H W 3`."""
        patch = self.config.denoiser.temporal_patch or 1
        return self.given.padded(clip_batches.latent_pixels(self.config, batch))[:, patch - 1 :: patch]

    def sample_errors(
        self,
        parameters: Parameters,
        frozen: Parameters,
        batch: Batch,
        key: jax.Array,
        clean: jax.Array,
        noise: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        given: jax.Array | None = None,
        *,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Weighted and unweighted squared error `B` of the denoiser, float32, of latents with this noise added.

        `given` is what `GivenLatents.condition` returns; `dropout_keys` are those of a LoRA, one per sample.
        """
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        weights = {**frozen, **parameters}
        prediction = self.denoise(weights, noisy, timesteps, text, given=given, dropout_keys=dropout_keys)
        return loss_per_sample(prediction, clean, noise, timesteps, self.config.objective, self.schedule)

    def evaluate(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """The training loss of held-out clips, as "loss" with its bands, and the `validation_loss`."""
        return super().evaluate(parameters, frozen, batch, key) | self.validation_loss(parameters, frozen, batch, key)

    def validation_loss(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> Metrics:
        """Unweighted loss at fixed timesteps, of posterior means, with fixed noise and no caption dropped.

        "validation_loss" is the mean over all timesteps, "validation_loss_t0050" that at timestep 50. The same numbers
        are drawn in every evaluation of a run, so what changes is the network.
        """
        config = self.config
        if not config.validation_timesteps:
            return {}
        rows = self.rows(batch)
        clean = self.given.padded(self.clean_latents(frozen, rows, key, sampled=False))
        frames = self.given.batch_frames(rows)
        given = self.given.condition(frozen, frames, key, rows["slot"], clean.shape[1], sampled=False)
        text = self.text_embeddings(parameters, frozen, batch[self.text.field])
        fixed = validation_timesteps(config.validation_timesteps, self.schedule)

        def at(timestep: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(key, VALIDATION_KEY), timestep.astype(jnp.int32))
            noise = draw_noise(own, clean.shape, rows["slot"])
            timesteps = jnp.full(len(clean), timestep)
            plain = self.sample_errors(parameters, frozen, batch, key, clean, noise, timesteps, text, given)[1]
            return jnp.sum(plain)

        # One timestep after the other: the memory of one forward pass.
        totals, count = jax.lax.map(at, jnp.asarray(fixed)), jnp.float32(len(clean))
        by_timestep = {
            f"validation_loss_t{int(timestep):04d}": Mean(total, count)
            for timestep, total in zip(fixed, totals, strict=True)
        }
        return {"validation_loss": Mean(jnp.sum(totals), count * len(fixed)), **by_timestep}

    def rows(self, batch: Batch) -> Batch:
        """The batch with one clip per row; a task of several views has one row per view."""
        return batch

    def clean_latents(self, frozen: Parameters, batch: Batch, key: jax.Array, sampled: bool | None = None) -> jax.Array:
        """Normalized clean latents `B F H W C`, float32, cached or encoded in the step.

        Args:
          sampled: draw from the posterior, or take its mean; by default as `sample_posterior` says.
        """
        if self.config.latents == "data":
            moments = batch["latents"]
        else:
            moments = self.encode(frozen, batch["video"])
        latents = self.given.drawn(moments, jax.random.fold_in(key, POSTERIOR_KEY), batch["slot"], sampled)
        return self.given.normalized(latents)

    def encode(self, frozen: Parameters, video: jax.Array) -> jax.Array:
        """Posterior moments `B F H W 2C` of uint8 clips."""
        return run_frozen(lambda: self.coder.encode(frozen["vae"], video), len(video))

    def decode(self, frozen: Parameters, latents: jax.Array) -> Clips:
        """Clips of normalized latents `B F H W C`."""
        return to_clips(self.decode_pixels(frozen["vae"], latents))

    def decode_pixels(self, vae: Parameters, latents: jax.Array) -> jax.Array:
        """Clips in [-1, 1], up to the error of the VAE, of normalized latents `B F H W C`."""
        return self.coder.decode(vae, latents / self.config.latent_scale + self.config.latent_shift)

    def drop_captions(self, captions: jax.Array, key: jax.Array, slots: jax.Array) -> jax.Array:
        """Replace the captions of random slots by the unconditional one."""
        keys = slot_keys(jax.random.fold_in(key, CAPTION_KEY), slots)
        drop = jax.vmap(lambda k: jax.random.bernoulli(k, self.config.caption_dropout))(keys)
        return jnp.where(drop.reshape(-1, *[1] * (captions.ndim - 1)), self.text.unconditional(), captions)

    def text_embeddings(
        self,
        parameters: Parameters,
        frozen: Parameters,
        captions: jax.Array,
        *,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Embeddings `B L C` of captions: of token ids, or of cached embeddings as batches have them.

        `dropout_keys` are those of a LoRA of the text encoder, one per sample.
        """
        weights, adapted = {**frozen, **parameters}, None
        if "text_encoder" in weights.get(lora.TREE, {}):
            adapted = lora.bind(self.text.network, "text_encoder", weights, self.config.lora, dropout_keys)
        return self.text.embed(weights.get("text_encoder"), captions, adapted=adapted)

    def denoise(
        self,
        parameters: Parameters,
        noisy: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        attention_scale: AttentionScale | None = None,
        *,
        given: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        hidden_after: int | None = None,
    ) -> Any:
        """The denoiser's prediction for noisy latents, in the compute dtype of the parameters.

        `parameters` holds "denoiser" and "lora", trained or not; `given` is what `GivenLatents.condition` returns. With
        `hidden_after`, a block, its tokens are returned too, see `VideoDiT`.
        """
        dtype = activation_dtype(parameters["denoiser"])
        denoiser = self.bound_denoiser(parameters, dropout_keys)
        noisy = self.with_given(noisy, given).astype(dtype)
        offsets = self.offsets(timesteps)
        return denoiser(
            noisy, text.astype(dtype), timesteps, offsets=offsets, attention_scale=attention_scale,
            hidden_after=hidden_after,
        )  # fmt: skip

    def bound_denoiser(self, parameters: Parameters, dropout_keys: jax.Array | None = None) -> VideoDiT:
        """The denoiser with its parameters, and those of a LoRA beside its layers; for calls in a traced function."""
        return lora.bind(self.denoiser_network, "denoiser", parameters, self.config.lora, dropout_keys)

    def with_given(self, noisy: jax.Array, given: jax.Array | None) -> jax.Array:
        """The denoiser's input: noisy latents and, for image to video, those of the given frames, along channels."""
        return noisy if given is None else jnp.concatenate([noisy, given.astype(noisy.dtype)], axis=-1)

    def offsets(self, timesteps: jax.Array) -> jax.Array | None:
        """The offset of each clip, for a denoiser that embeds one."""
        return None if self.config.denoiser.offset_width is None else jnp.full_like(timesteps, given_frames.OFFSET)

    def analyze_layers(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
    ) -> dict[str, jax.Array]:
        return analyze_layers(self, parameters, frozen, batch, key, timestep)

    def recorded_clips(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> jax.Array:
        latents = self.clean_latents(frozen, self.rows(batch), key, sampled=False)
        return unit_from_signed(self.decode_pixels(frozen["vae"], latents))

    # Sampling.

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        if self.text.cached:
            raise ValueError(
                f"task.text.embeddings = {self.config.text.embeddings!r}: prompts need the text encoder; the run's "
                "config has to name task.text.weights and task.text.tokenizer too, which training does not read."
            )
        return np.stack([self.text.tokenize(prompt) for prompt in prompts])

    def truncated_text(self, prompt: str) -> str:
        return self.text.truncated_text(prompt)

    def generate(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        slots: jax.Array,
        key: jax.Array,
        request: SampleRequest,
        given: GivenPixels | None = None,
    ) -> Generated:
        sampler, guidance = self.config.sampling(request)
        size = (request.frames, request.height, request.width)
        latents, finite = self.generate_latents(
            parameters, frozen, tokens, slots, key, size=size, sampler=sampler, guidance=guidance,
            enhance=request.enhance or self.config.enhance, given=given, strength=request.strength,
        )  # fmt: skip
        clips = self.decode(frozen, latents)
        return Generated(clips.pixels, finite._replace(pixels=clips.finite))

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
        given: GivenPixels | None = None,
        strength: float | None = None,
    ) -> tuple[jax.Array, Finite]:
        """See `jvgen.tasks.clip_sampling.generate_latents`."""
        how = ClipSettings(size, sampler, guidance, enhance, strength)
        return clip_sampling.generate_latents(self, {**frozen, **parameters}, tokens, slots, key, how, given)

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        count = self.config.visualize_clips
        if self.config.vae is None or not count:
            return {}
        some = {name: value[:count] for name, value in batch.items()}
        real = self.clean_latents(frozen, some, key)
        frames, height, width = real.shape[1:4]
        size = (
            (frames - 1) * self.config.temporal_compression + 1,
            height * self.config.spatial_compression,
            width * self.config.spatial_compression,
        )
        given = GivenPixels(frames=self.given.batch_frames(some))
        made = self.generate(parameters, frozen, some[self.text.field], some["slot"], key, SampleRequest(*size), given)
        return {"data": self.decode(frozen, real), "sample": Clips(made.pixels, made.finite.all())}

    def exported_files(self) -> dict[str, str]:
        config = self.config
        scheduler = schedulers.to_diffusers(
            schedulers.Scheduler(config.schedule, config.objective.target, config.sampler)
        )
        return {"scheduler/scheduler_config.json": json.dumps(scheduler, indent=2) + "\n"} if scheduler else {}

    def sequence_length(self, bucket: BucketConfig) -> int:
        shape = self.config.denoised_shape(bucket.frames, bucket.height, bucket.width)
        return math.prod(token_grid(shape, self.config.denoiser.patch_shape))

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        shape = self.config.denoised_shape(bucket.frames, bucket.height, bucket.width)
        parts = forward_flops(self.config.denoiser, shape, self.config.text.length)
        parts["text_encoder"] = self.text.flops()
        if self.config.latents == "pixels":
            parts["vae"] = self.coder.encode_flops(bucket.frames, bucket.height, bucket.width)
        if self.config.given_frames:
            given = self.config.given_frames * self.coder.encode_flops(1, bucket.height, bucket.width)
            parts["vae"] = parts.get("vae", 0.0) + given
        if self.alignment is not None:
            parts |= self.alignment.flops(
                token_grid(shape, self.config.denoiser.patch_shape), self.config.denoiser.width
            )
        return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToVideoConfig(TextToVideoFields):
    """The configuration of `TextToVideo`: all fields are those of `TextToVideoFields`."""

    def build(self) -> TextToVideo:
        return TextToVideo(self)
