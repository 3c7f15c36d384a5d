"""Collaborative Video Diffusion (CVD, arXiv 2405.17414): the task of denoising several views of a scene jointly."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from jvgen.data.stream.config import BucketConfig
from jvgen.data.stream.pairs import HomographyConfig
from jvgen.diffusion import collaborative
from jvgen.diffusion.collaborative import PairingConfig
from jvgen.diffusion.guidance import GuidanceConfig, guided, unguided
from jvgen.diffusion.objective import (
    draw_noise,
    draw_timesteps,
    loss_by_band,
    loss_per_sample,
    slot_keys,
    slot_normal,
)
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.finite import Clips, Finite, rows_are_finite
from jvgen.geometry.cameras import Cameras
from jvgen.models.multiview.config import MultiViewDiTConfig
from jvgen.models.multiview.flops import forward_flops
from jvgen.models.multiview.model import MultiViewDiT, MultiViewModules, attention_factors
from jvgen.models.multiview.view_conditioning import ViewConditioning, camera_conditioning, homography_conditioning
from jvgen.models.video_dit.model import AttentionScale
from jvgen.nn import lora
from jvgen.nn.embeddings import token_grid
from jvgen.nn.network import Network, Parameters
from jvgen.tasks import text_to_video_lora, view_batches
from jvgen.tasks.clip_sampling import SAMPLER_KEY, START_KEY
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.task import ArraySpec, Batch, Generated, Mean, Metrics, SampleRequest, activation_dtype
from jvgen.tasks.text_to_video import TextToVideo, TextToVideoConfig
from jvgen.tasks.view_batches import ViewKind
from jvgen.value_rules import Scale

# One more purpose of a step's key (see jvgen.tasks.text_to_video); numbers keep their meaning across versions.
NORMALS_KEY = 20
# View v of the example in slot i draws its random numbers as slot i * MAX_VIEWS + v.
MAX_VIEWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewConfig(TextToVideoConfig):
    """Joint denoising of several views of a scene, from cameras and a caption.

    Single clips of kind "static" are folded into two views (2N - 1 frames make two of N), those of kind "dynamic" are
    paired with a warped copy; buckets with views are used as recorded. The weights of the buckets are the mixture
    (7 : 3 in the paper). Rays and the LoRA adapter are active for views with cameras, not for warped copies.

    Attributes:
      denoiser: the transformer and its multi-view modules; denoiser_weights are those of the single-view transformer.
      homography: strength of the warp of copies.
      one_timestep: all views of an example share one timestep; the released training draws one per view.
      pairing: how views are paired in sampling.
      adapter_scale: scale of the adapter in sampling: 1 for static scenes, which it is trained on, 0 for others.
      lora: train a LoRA of the transformer or the text encoder beside the modules between the blocks. It is active for
        all data, unlike denoiser.adapter_rank, the paper's adapter, which is for views with cameras alone.
    """

    denoiser: MultiViewDiTConfig
    homography: HomographyConfig = HomographyConfig()
    one_timestep: bool = False
    pairing: PairingConfig = PairingConfig()
    adapter_scale: Scale = 0.0

    def check_bucket(self, bucket: BucketConfig) -> None:
        if bucket.views > MAX_VIEWS:
            raise ValueError(f"views = {bucket.views}: must be at most {MAX_VIEWS}.")
        kind = view_batches.kind_of(bucket)
        frames = view_batches.clip_frames(bucket)
        if kind is ViewKind.WARPED and self.vae is None:
            raise ValueError("kinds = ('dynamic',): copies are warped as pixels; set task.vae and task.vae_weights.")
        if kind is ViewKind.FOLDED and self.latents == "data" and self.temporal_compression > 1:
            raise ValueError(
                f"kinds = ('static',): latents of {self.temporal_compression} frames each cannot be reversed; set "
                "task.latents = 'pixels'."
            )
        self.denoised_shape(frames, bucket.height, bucket.width)

    @property
    def supports_views(self) -> bool:
        return True

    def frames_of(self, bucket: BucketConfig) -> int:
        return view_batches.clip_frames(bucket)

    def check_trained(self) -> None:
        if self.alignment is not None:
            raise ValueError("alignment: not supported for several views; leave it none.")
        if self.enhance is not None:
            raise ValueError("enhance: views are generated without it; leave it none.")

    def build(self) -> "MultiView":
        return MultiView(self)


class MultiView(TextToVideo):
    """See `MultiViewConfig`. Trains "views" and, unless they are frozen, "denoiser" and "text_encoder", or "lora"."""

    def __init__(self, config: MultiViewConfig):
        super().__init__(config)
        self.config: MultiViewConfig = config
        self.multi_view_network = Network.of(lambda rngs: MultiViewDiT(config.denoiser, rngs=rngs))
        self.networks["views"] = Network.of(lambda rngs: MultiViewModules(config.denoiser, rngs=rngs))
        self.network_configs["views"] = config.denoiser

    # Batches.

    def fields(self, bucket: BucketConfig) -> dict[str, ArraySpec]:
        config = self.config
        latent = config.latent_shape(view_batches.clip_frames(bucket), bucket.height, bucket.width)
        channels = 2 * config.denoiser.out_channels
        return view_batches.fields(
            bucket, latent, channels=channels, from_pixels=config.latents == "pixels", text=self.text.fields(),
            given=config.given_frames,
        )  # fmt: skip

    def preprocess(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        config = self.config
        arrays = view_batches.prepare(
            example,
            config.homography,
            from_pixels=config.latents == "pixels",
            spatial=config.spatial_compression,
            temporal=config.temporal_compression,
            condition=config.condition,
        )
        return {**arrays, **self.text.of_example(example)}

    # Loss.

    def loss(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        config, slots = self.config, batch["slot"]
        rows = self.rows(batch)
        views = rows["slot"].shape[0] // slots.shape[0]
        clean = self.given.padded(self.clean_latents(frozen, rows, key))
        given = self.given.training_condition(frozen, rows, key, clean.shape[1])
        noise = draw_noise(key, clean.shape, rows["slot"])
        size = token_grid(clean.shape[1:4], config.denoiser.patch_shape)
        drawn = {"config": config.objective.timesteps, "schedule": self.schedule, "size": size}
        if config.one_timestep:
            timesteps = jnp.repeat(draw_timesteps(key, len(slots), slots=slots, **drawn), views)
        else:
            places = jnp.ravel(slots[:, None] * views + jnp.arange(views))
            timesteps = draw_timesteps(key, clean.shape[0], slots=rows["slot"], places=places, **drawn)
        text_keys = text_to_video_lora.dropout_keys(config.lora, batch, key)[1]
        dropout_keys = text_to_video_lora.dropout_keys(config.lora, {**batch, "slot": rows["slot"]}, key)[0]
        captions = self.drop_captions(batch[self.text.field], key, slots)
        text = self.text_embeddings(parameters, frozen, captions, dropout_keys=text_keys)
        weighted, plain = self.sample_errors(
            parameters, frozen, batch, key, clean, noise, timesteps, text, given, dropout_keys=dropout_keys
        )
        adapter = float(_has_cameras(batch))
        metrics = {name: Mean(*pair) for name, pair in loss_by_band(plain, timesteps, config.objective.bands).items()}
        for kind, share in (("cameras", adapter), ("warped", 1.0 - adapter)):
            metrics[f"loss_{kind}"] = Mean(jnp.sum(plain) * share, jnp.float32(plain.size * share))
        return jnp.mean(weighted), metrics

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
        """See `TextToVideo.sample_errors`; one row per view, but one per example in the text."""
        rows, config = self.rows(batch), self.config
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        text = repeat(text, "b l c -> (b v) l c", v=len(clean) // len(text))
        conditioning = self.view_conditioning(batch, clean.shape, key)
        weights, adapter = {**frozen, **parameters}, float(_has_cameras(batch))
        prediction = self.denoise(
            weights, noisy, timesteps, text, given=given, views=conditioning, adapter=adapter,
            dropout_keys=dropout_keys,
        )  # fmt: skip
        if "valid" in rows:
            # Pixels outside a warped copy have zero error, but count in the mean, as released.
            target = self.schedule.target(clean, noise, timesteps, config.objective.target)
            valid = self.given.padded(rows["valid"])[..., None] > 0
            prediction = jnp.where(valid, prediction, target.astype(prediction.dtype))
        return loss_per_sample(prediction, clean, noise, timesteps, config.objective, self.schedule)

    def rows(self, batch: Batch) -> dict[str, jax.Array]:
        """Clips (or latents), masks and slots of a batch, one row per view: `B V ...` to `(B V) ...`."""
        views = next(batch[name] for name in ("video", "latents") if name in batch).shape[1]
        rows = {
            name: rearrange(batch[name], "b v ... -> (b v) ...")
            for name in ("video", "latents", "valid", "given")
            if name in batch
        }
        return {**rows, "slot": view_slots(batch["slot"], views)}

    def clean_latents(self, frozen: Parameters, batch: Batch, key: jax.Array, sampled: bool | None = None) -> jax.Array:
        # Warped copies are pixels even if the latents of other clips are cached.
        if "latents" in batch or self.config.latents == "pixels":
            return super().clean_latents(frozen, batch, key, sampled)
        moments = self.encode(frozen, batch["video"])
        return super().clean_latents(frozen, {**batch, "latents": moments}, key, sampled)

    def view_conditioning(self, batch: Batch, latents: tuple[int, ...], key: jax.Array) -> ViewConditioning:
        """Conditioning of a batch whose latents have a shape `(B V) F H W C`: by cameras, or by homographies."""
        keys = slot_keys(jax.random.fold_in(key, NORMALS_KEY), batch["slot"])
        if not _has_cameras(batch):
            return homography_conditioning(
                self.config.denoiser, self.given.padded(batch["homographies"]), keys, latents,
                pixels_per_latent=self.config.spatial_compression,
            )  # fmt: skip
        cameras = Cameras(batch["intrinsics"], batch["extrinsics"])
        missing = latents[1] - self.config.clip_frames(cameras.intrinsics.shape[2])
        cameras = _repeat_first(cameras, missing * self.config.temporal_compression)
        views = cameras.intrinsics.shape[1]
        partner = jnp.arange(views - 1, -1, -1) if views == 2 else (jnp.arange(views) + 1) % views
        return self._camera_conditioning(cameras, partner, keys, latents)

    def _camera_conditioning(
        self, cameras: Cameras, partner: jax.Array, keys: jax.Array, latents: tuple[int, ...], copies: int = 1
    ) -> ViewConditioning:
        return camera_conditioning(
            self.config.denoiser, cameras, partner, keys, latents, copies=copies,
            frames_per_latent=self.config.temporal_compression, pixels_per_latent=self.config.spatial_compression,
        )  # fmt: skip

    def denoise(
        self,
        parameters: Parameters,
        noisy: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        attention_scale: AttentionScale | None = None,
        *,
        given: jax.Array | None = None,
        views: ViewConditioning | None = None,
        adapter: float = 0.0,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """The prediction for noisy latents; `parameters` holds "denoiser", "views" and "lora", trained or not.

        Args:
          given: what `GivenLatents.condition` returns, one row per view.
          views: conditioning on views, see `MultiViewDiT`.
          adapter: scale of the adapter for views with cameras.
          dropout_keys: those of a LoRA, one per row.
        """
        dtype = activation_dtype(parameters["denoiser"])
        whole = {**parameters, "denoiser": {**parameters["denoiser"], "views": parameters["views"]}}
        module = lora.bind(self.multi_view_network, "denoiser", whole, self.config.lora, dropout_keys)
        if self.config.denoiser.adapter_rank and adapter:
            lora.attach(module, attention_factors(parameters["views"]["adapter"]), float(adapter))
        return module(
            self.with_given(noisy, given).astype(dtype), text.astype(dtype), timesteps, views=views,
            offsets=self.offsets(timesteps), attention_scale=attention_scale,
        )  # fmt: skip

    def analyze_layers(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
    ) -> dict[str, jax.Array]:
        raise ValueError(
            "a run of several views: layers with modules between them are not analyzed; give a run of single clips."
        )

    def recorded_clips(self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array) -> jax.Array:
        clips = super().recorded_clips(parameters, frozen, batch, key)
        return rearrange(clips, "(b v) ... -> b v ...", b=len(batch["slot"]))

    # Sampling.

    def generate_views(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        cameras: Cameras,
        slots: jax.Array,
        key: jax.Array,
        request: SampleRequest,
        given: GivenPixels | None = None,
    ) -> Generated:
        """New clips of several views, uint8 `B V F H W 3`; example i depends on the key and `slots[i]` only.

        Args:
          tokens: `B L`, one caption per example.
          cameras: `B V F 4` and `B V F 3 4`, one per frame of each view.
          given: frames `B V K H W 3` that each view is conditioned on.
        """
        sampler, guidance = self.config.sampling(request)
        size = (request.frames, request.height, request.width)
        latents, finite = self.generate_view_latents(
            parameters, frozen, tokens, cameras, slots, key, size=size, sampler=sampler, guidance=guidance, given=given
        )
        clips, examples = self.decode(frozen, latents), tokens.shape[0]
        by_view = functools.partial(rearrange, pattern="(b v) ... -> b v ...", b=examples)
        # An example is as finite as the least finite of its views.
        finite = finite._replace(
            text=jnp.all(by_view(finite.text), axis=1),
            steps=jnp.min(by_view(finite.steps), axis=1),
            pixels=jnp.all(by_view(clips.finite), axis=1),
        )
        return Generated(by_view(clips.pixels), finite)

    def generate_view_latents(
        self,
        parameters: Parameters,
        frozen: Parameters,
        tokens: jax.Array,
        cameras: Cameras,
        slots: jax.Array,
        key: jax.Array,
        *,
        size: tuple[int, int, int],
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        given: GivenPixels | None = None,
    ) -> tuple[jax.Array, Finite]:
        """Normalized latents `(B V) F H W C` of new clips, see `generate_views`, and how far they are finite."""
        config, parameters = self.config, {**frozen, **parameters}
        views, kept = cameras.intrinsics.shape[1], config.clip_frames(size[0])
        latent = config.denoised_shape(*size)
        cameras = _repeat_first(cameras, (latent[0] - kept) * config.temporal_compression)
        shape = (tokens.shape[0] * views, *latent, config.denoiser.out_channels)
        text = repeat(self.text_embeddings(parameters, frozen, tokens), "b l c -> (b v) l c", v=views)
        empty = self.text_embeddings(parameters, frozen, self.text.unconditional()[None])
        guide, rows = guidance.kind != "none", view_slots(slots, views)
        frames = None if given is None or given.frames is None else rearrange(given.frames, "b v ... -> (b v) ...")
        condition = self.given.condition(frozen, frames, key, rows, latent[0])

        def pair(
            noisy: jax.Array, timesteps: jax.Array, scale: jax.Array, partner: jax.Array, key: jax.Array
        ) -> jax.Array:
            conditioning = self._camera_conditioning(
                cameras, partner, slot_keys(key, slots), shape, copies=2 if guide else 1
            )

            def denoise(
                noisy: jax.Array, timesteps: jax.Array, inputs: tuple[jax.Array, jax.Array | None]
            ) -> jax.Array:
                return self.denoise(
                    parameters, noisy, timesteps, inputs[0], given=inputs[1], views=conditioning,
                    adapter=config.adapter_scale,
                )  # fmt: skip

            if not guide:
                return unguided(denoise, (text, condition))(noisy, timesteps, scale)
            without = (jnp.broadcast_to(empty, text.shape), condition)
            return guided(denoise, (text, condition), without, rescale=guidance.rescale)(noisy, timesteps, scale)

        text_is_finite = rows_are_finite(text) & rows_are_finite(empty) if guide else rows_are_finite(text)
        made = collaborative.trajectory(
            pair, slot_normal(jax.random.fold_in(key, START_KEY), shape, rows), views=views, schedule=self.schedule,
            sampler=sampler, prediction=config.objective.target, pairing=config.pairing, guidance=guidance,
            key=jax.random.fold_in(key, SAMPLER_KEY), slots=rows,
        )  # fmt: skip
        finite = Finite(text_is_finite, made.finite_steps, jnp.ones_like(text_is_finite), jnp.int32(made.steps))
        return made.result[:, -kept:], finite

    def visualize(
        self, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array | Clips]:
        config = self.config
        if config.vae is None or not config.visualize_clips:
            return {}
        part = {name: value[: max(config.visualize_clips // 2, 1)] for name, value in batch.items()}
        real = self.clean_latents(frozen, self.rows(part), key)
        shown = {"data": self.decode(frozen, real)}
        if not _has_cameras(batch):
            return shown
        pixels = config.spatial_compression
        frames, height, width = part["intrinsics"].shape[2], real.shape[2] * pixels, real.shape[3] * pixels
        generated, finite = self.generate_view_latents(
            parameters, frozen, part[self.text.field], Cameras(part["intrinsics"], part["extrinsics"]), part["slot"],
            key, size=(frames, height, width), sampler=config.sampler, guidance=config.guidance,
            given=GivenPixels(frames=self._view_frames(part)),
        )  # fmt: skip
        made = self.decode(frozen, generated)
        return {**shown, "sample": Clips(made.pixels, finite._replace(pixels=made.finite).all())}

    def sequence_length(self, bucket: BucketConfig) -> int:
        shape = self.config.denoised_shape(view_batches.clip_frames(bucket), bucket.height, bucket.width)
        return view_batches.views_of(bucket) * math.prod(token_grid(shape, self.config.denoiser.patch_shape))

    def _view_frames(self, batch: Batch) -> jax.Array | None:
        """Frames `B V K H W 3` that the views of a batch are conditioned on; None without a condition."""
        frames = self.given.batch_frames(self.rows(batch))
        return None if frames is None else rearrange(frames, "(b v) ... -> b v ...", b=len(batch["slot"]))

    def flops(self, bucket: BucketConfig) -> dict[str, float]:
        views, size = view_batches.views_of(bucket), (view_batches.clip_frames(bucket), bucket.height, bucket.width)
        parts = forward_flops(self.config.denoiser, self.config.denoised_shape(*size), views, self.config.text.length)
        parts = {name: views * value for name, value in parts.items()}
        parts["text_encoder"] = self.text.flops()
        if "video" in self.fields(bucket):
            parts["vae"] = views * self.coder.encode_flops(*size)
        if self.config.given_frames:
            given = views * self.config.given_frames * self.coder.encode_flops(1, *size[1:])
            parts["vae"] = parts.get("vae", 0.0) + given
        return parts


def view_slots(slots: jax.Array, views: int) -> jax.Array:
    """Slots `(B V)` of the views of examples in slots `B`."""
    return (slots[:, None] * MAX_VIEWS + jnp.arange(views, dtype=slots.dtype)).reshape(-1)


def _has_cameras(batch: Batch) -> bool:
    return "extrinsics" in batch


def _repeat_first(cameras: Cameras, frames: int) -> Cameras:
    """The cameras with the first one repeated in front of them."""
    return Cameras(*(jnp.concatenate([jnp.repeat(part[:, :, :1], frames, axis=2), part], axis=2) for part in cameras))
