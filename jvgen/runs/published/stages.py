"""A text-to-video pipeline in three stages, each with its own network: captions, denoising, pixels."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.diffusion.guidance import GuidanceConfig, guided, unguided
from jvgen.diffusion.sampler import SamplerConfig, advance, coefficients, step_noise, table_rows
from jvgen.finite import not_finite, rows_are_finite
from jvgen.models.cogvideox_vae.model import stream_chunks
from jvgen.models.cogvideox_vae.tiling import Tiling, tiled
from jvgen.models.video_dit.model import AttentionScale
from jvgen.nn.network import Parameters
from jvgen.runs.published.placement import Placement
from jvgen.storage import Path
from jvgen.tasks.clip_sampling import SAMPLER_KEY
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.pixels import from_uint8
from jvgen.tasks.text_to_video import TextToVideo

# Captions encoded together.
CAPTIONS = 8

# Given the timesteps of a step, float32 `B`, what scales attention in it (`TextToVideo.enhancement` makes one).
ScaleOfStep = Callable[[jax.Array], AttentionScale]


def encode_captions(
    task: TextToVideo,
    captions: Sequence[str],
    placement: Placement,
    adapter: Parameters | None = None,
    *,
    unmerged: bool = False,
) -> dict[str, np.ndarray]:
    """Embeddings `L C` of each caption, in the host's memory; the text encoder is on the devices only meanwhile.

    Args:
      task: of the pipeline.
      captions: texts.
      placement: where the text encoder is loaded to.
      adapter, unmerged: LoRA factors for its layers, as in `Denoiser`.

    Raises:
      NotFinite: embeddings with NaN or infinity.
    """
    if placement.dtype == jnp.float16:
        # The published encoder overflows in float16.
        placement = dataclasses.replace(placement, dtype=jnp.dtype(jnp.bfloat16))
    unique = list(dict.fromkeys(captions))
    tokens = np.stack([task.text.tokenize(caption) for caption in unique])
    parameters = placement.with_adapter("text_encoder", task.config.text.weights, adapter, unmerged=unmerged)
    embed = placement.jit(lambda parameters, tokens: task.text_embeddings(parameters, {}, tokens))
    batch = min(CAPTIONS, len(unique))
    embeddings = []
    for start in range(0, len(unique), batch):
        some = tokens[start : start + batch]
        # Filled up to one shape, so that there is one program.
        filled = np.concatenate([some, np.repeat(some[:1], batch - len(some), axis=0)])
        embeddings += list(np.asarray(embed(parameters, filled))[: len(some)])
    for caption, embedding in zip(unique, embeddings, strict=True):
        if not np.isfinite(embedding).all():
            raise not_finite(f"embeddings of the caption {caption!r}", "text encoder", placement.dtype, "--dtype")
    return dict(zip(unique, embeddings, strict=True))


@dataclasses.dataclass(frozen=True)
class GivenMoments:
    """Posterior moments of what clips are made from, in the host's memory; None for what is not given.

    Attributes:
      frames: of given frames, `S K H W 2C`, one row for all prompts or one per prompt.
      video: of a given clip, `F H W 2C`.
    """

    frames: np.ndarray | None = None
    video: np.ndarray | None = None


def encode_given(task: TextToVideo, given: GivenPixels | None, placement: Placement) -> GivenMoments:
    """Encode given images or a video; the autoencoder is on the devices only meanwhile.

    Args:
      given: frames `S K H W 3`, or one video `1 F H W 3`; None for nothing.

    Raises:
      NotFinite: moments with NaN or infinity.
    """
    if given is None:
        return GivenMoments()
    parameters, network = placement.load(task.config.vae_weights), task.coder.network
    encode = placement.jit(lambda p, x, cache: network.apply(p, x, cache, method="encode_chunk"))

    def moments(clip: np.ndarray) -> np.ndarray:
        pixels = from_uint8(jnp.asarray(clip)[None], placement.dtype)
        pieces = stream_chunks(
            lambda frames, cache: encode(parameters, frames, cache), pixels, task.config.vae.encode_chunk_frames
        )
        made = np.concatenate([np.asarray(piece[0], np.float32) for piece in pieces])
        if not np.isfinite(made).all():
            raise not_finite("latents of the given frames", "VAE", placement.dtype, "--dtype")
        return made

    if given.video is not None:
        return GivenMoments(video=moments(given.video[0]))
    # Each frame for itself.
    return GivenMoments(frames=np.stack([np.stack([moments(frame[None])[0] for frame in one]) for one in given.frames]))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clips that are denoised together.

    Attributes:
      text: embeddings of the captions, `B L C`.
      empty: embeddings of what guidance leads away from, `B L C`.
      start: what sampling starts from, `B F H W C` float32: standard normal noise, or a video with noise.
      slots: numbers of the clips among all, int32 `B`: their noise depends on them and not on the batch.
      condition: latents of given frames, see `jvgen.tasks.given_latents.GivenLatents.condition`.
    """

    text: np.ndarray
    empty: np.ndarray
    start: jax.Array
    slots: np.ndarray
    condition: jax.Array | None = None


class Denoiser:
    """Denoises batches of clips, step by step from the host; one program for all steps and batches.

    Args:
      task: of the pipeline.
      weights: folder of its network.
      placement: where it is loaded to.
      sampler, guidance: how clips are made.
      attention_scale: see `ScaleOfStep`; None for none.
      adapter: LoRA factors for its layers, with their scales in them; None for none.
      unmerged: keep them beside the weights, instead of merging them into these.
      first: the sampler's step that batches start with.
    """

    def __init__(
        self,
        task: TextToVideo,
        weights: Path,
        placement: Placement,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        attention_scale: ScaleOfStep | None = None,
        adapter: Parameters | None = None,
        *,
        unmerged: bool = False,
        first: int = 0,
    ):
        self._task, self._placement, self._sampler, self._guidance = task, placement, sampler, guidance
        self._attention_scale = attention_scale
        table = coefficients(sampler, task.schedule, task.config.objective.target, guidance, first=first)
        rows = jax.tree.map(np.asarray, table_rows(table))
        self._rows = [{name: column[step] for name, column in rows.items()} for step in range(sampler.steps - first)]
        self._parameters = placement.with_adapter("denoiser", weights, adapter, unmerged=unmerged)
        self._step = placement.jit(self._advance)

    def __call__(self, batch: Batch, key: jax.Array) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Noisy latents `B F H W C` after each step, the last ones are clean, and which clips are finite, `B`.

        Each step is waited for.
        """
        place = self._placement.sharding.batch(batch.start)
        given = jax.device_put((batch.text, batch.empty, batch.slots, key, batch.condition))
        noisy, previous = batch.start, jnp.zeros_like(batch.start)
        for row in self._rows:
            # Placed in the same way at every step, so that the step is compiled once.
            noisy, previous = jax.device_put((noisy, previous), place)
            noisy, previous, finite = self._step(self._parameters, noisy, previous, row, *given)
            yield noisy, np.asarray(finite)

    def _advance(
        self,
        parameters: Parameters,
        noisy: jax.Array,
        previous: jax.Array,
        row: dict[str, jax.Array],
        text: jax.Array,
        empty: jax.Array,
        slots: jax.Array,
        key: jax.Array,
        condition: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def denoise(noisy: jax.Array, timesteps: jax.Array, inputs: tuple[jax.Array, jax.Array | None]) -> jax.Array:
            scale = None if self._attention_scale is None else self._attention_scale(timesteps)
            return self._task.denoise(parameters, noisy, timesteps, inputs[0], attention_scale=scale, given=inputs[1])

        if self._guidance.kind == "none":
            predict = unguided(denoise, (text, condition))
        else:
            predict = guided(denoise, (text, condition), (empty, condition), rescale=self._guidance.rescale)
        fresh = None
        if self._sampler.needs_key:
            fresh = step_noise(jax.random.fold_in(key, SAMPLER_KEY), row["step"], noisy.shape, slots)
        arrived, clean = advance(predict, row, noisy, previous, fresh)
        return arrived, clean, rows_are_finite(arrived)


class Decoder:
    """Latents to pixels, a batch of frames at a time, or tile by tile.

    Args:
      task: of the pipeline.
      placement: where its autoencoder is loaded to.
      in_tiles: decode tiles of half the trained height and width and blend them: less memory, other numbers.

    Raises:
      ValueError: tiles that do not fit together, see `Tiling`.
    """

    def __init__(self, task: TextToVideo, placement: Placement, *, in_tiles: bool = False):
        self._config, self._dtype = task.config, placement.dtype
        self._tiling = Tiling.decoding(task.config.vae) if in_tiles else None
        self._parameters = placement.load(task.config.vae_weights)
        network = task.coder.network
        self._frames = placement.jit(lambda p, x, cache: network.apply(p, x, cache, method="decode_chunk"))
        self._whole = placement.jit(lambda p, x: network.apply(p, x, method="decode"))

    def __call__(self, latents: jax.Array) -> Iterator[jax.Array]:
        """Consecutive frames `B F H W 3`, in [-1, 1] up to the error of the network, of clean latents `B F H W C`."""
        config = self._config
        latents = (latents / config.latent_scale + config.latent_shift).astype(self._dtype)
        if self._tiling is not None and self._tiling.needed(*latents.shape[2:4]):
            yield tiled(lambda tile: self._whole(self._parameters, tile), latents, self._tiling)
            return
        yield from stream_chunks(
            lambda frames, cache: self._frames(self._parameters, frames, cache), latents, config.vae.decode_chunk_frames
        )
