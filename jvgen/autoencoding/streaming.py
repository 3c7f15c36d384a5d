"""Autoencoders over videos of any length, chunk by chunk in bounded memory: uint8 frames to latents, and back.

How a video is cut into chunks depends on the network. Networks with a cache (causal CV-VAEs, CogVideoX's) give what the
whole video would; published CV-VAEs are coded in their published chunks and tiles; image VAEs code frames separately.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.finite import Clips, NotFinite, not_finite
from jvgen.interop.from_torch import import_folder, read_config
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig, frame_chunks
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.tiling import chunk_bounds
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.compute_dtype import cast
from jvgen.nn.network import Parameters
from jvgen.parallel import axes
from jvgen.parallel.rules import Sharding
from jvgen.storage import Path
from jvgen.tasks.clip_vae import ClipVAE, VAEConfig, temporal_downsampling
from jvgen.tasks.pixels import from_uint8, to_clips
from jvgen.tasks.task import activation_dtype

# Codes one chunk: (parameters, frames or latents, cache) -> (moments or `Clips`, cache for the next chunk).
ChunkStep = Callable[[Parameters, jax.Array, Any], tuple[Any, Any]]
# Lengths that the last chunk of a padded clip may have.
_CHUNK_PARTS = 4


class StreamingVAE:
    """The autoencoder in a folder, for any number of videos.

    Args:
      folder: as `jvgen export` or diffusers write it.
      chunk_frames: frames that are coded together, rounded to what the network takes; networks whose result depends on
        the chunks have their own number.
      compute_dtype: of activations and matrices; "bfloat16" halves the memory.
      sharding: of clips that are encoded together; None for one device.

    Raises:
      ValueError: a folder without an autoencoder, or `chunk_frames` below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        chunk_frames: int = 16,
        compute_dtype: str = "float32",
        sharding: Sharding | None = None,
    ):
        config = read_config(folder)
        if not isinstance(config, VAEConfig):
            raise ValueError(f"--vae {folder}: holds a {type(config).__name__}, not an autoencoder of images or clips.")
        if chunk_frames < 1:
            raise ValueError(f"--chunk-frames {chunk_frames}: must be at least 1.")
        self.config, self._folder, self._dtype = config, folder, jnp.dtype(compute_dtype)
        self.frames_per_latent = temporal_downsampling(config)
        self._vae = ClipVAE(config)
        loaded, names = import_folder(folder)[1], self._vae.network.axes
        self._sharding, whole = sharding, None if sharding is None else sharding.replicated
        self._parameters = jax.jit(lambda tree: cast(tree, names, jnp.dtype(compute_dtype)), out_shardings=whole)(
            loaded
        )
        self._chunk_latents = max(chunk_frames // self.frames_per_latent, 1)
        # A cache is as large as the network's activations, so the next one reuses its memory.
        self._encode, self._decode = (jax.jit(self._partitioned(step), donate_argnums=2) for step in self._steps())

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.config.latent_channels

    def padded_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The smallest size of whole latents that a video of this size fits into, and that decodes to itself.

        `encode` repeats the last frame, row and column up to it; crop what `decode` returns to the size of the video.
        """
        config, side = self.config, self.config.downsampling
        step = config.frame_step if isinstance(config, CogVideoXVAEConfig) else self.frames_per_latent
        return 1 + -(-(frames - 1) // step) * step, *(math.ceil(size / side) * side for size in (height, width))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Frames, height, width and channels of the latents of a video."""
        frames, height, width = self.padded_size(frames, height, width)
        side = self.config.downsampling
        return (frames - 1) // self.frames_per_latent + 1, height // side, width // side, self.latent_channels

    def encode(self, frames: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
        """Latents (posterior means, unscaled) of `count` frames `H W 3`, in float32 chunks `f h w z`.

        Raises:
          ValueError: fewer frames than `count`.
          NotFinite: latents with NaN or infinity.
        """
        for moments in self.moments(frames, count, self.padded_size(count, 1, 1)[0]):
            yield moments[..., : self.latent_channels]

    def moments(self, frames: Iterator[np.ndarray], count: int, padded: int | None = None) -> Iterator[np.ndarray]:
        """Mean and raw log variance of the latents of `count` frames, in float32 chunks `f h w 2z`; see `encode`.

        They are padded to whole latents, or to `padded` frames.
        """
        whole, cache = 1 + -(-(count - 1) // self.frames_per_latent) * self.frames_per_latent, None
        padded = whole if padded is None else padded
        frames = self._padded(frames, count, padded)
        chunk: list[np.ndarray] = []
        for start, stop, shared in self._bounds(padded, of_latents=False):
            chunk = chunk[len(chunk) - shared :] if shared else []
            chunk += [next(frames) for _ in range(stop - start - shared)]
            moments, cache = self._encode(self._parameters, jnp.asarray(np.stack(chunk)[None]), cache)
            moments = np.asarray(moments[0, shared:], np.float32)
            if not np.isfinite(moments).all():
                raise self._not_finite(f"latents of frames {start} to {stop - 1}")
            yield moments

    def padded_frames(self, count: int) -> int:
        """A number of frames that clips of many lengths, of whole latents, can be padded to at their ends.

        Their own latents stay what they are. Clips whose latents depend on the frames after them are not padded.
        """
        config = self.config
        if isinstance(config, CogVideoXVAEConfig) or (isinstance(config, CVVAEConfig) and not config.is_causal):
            return count
        # Parts of a chunk, so that there are few programs and little padding.
        step = max(self._chunk_latents // _CHUNK_PARTS, 1) * self.frames_per_latent
        return 1 + -(-(count - 1) // step) * step

    def begin(self, clips: np.ndarray) -> list[tuple[jax.Array, int]]:
        """Begin to encode clips `B F H W 3`, uint8, of whole latents, and do not wait for it.

        Returns:
          Moments in chunks `B f h w 2z`, with the number of latent frames at the start of each that do not count.
        """
        cache, made = None, []
        place = None
        if self._sharding is not None:
            place = self._sharding.activation((axes.BATCH, None, None, None, None), clips.shape)
        for start, stop, shared in self._bounds(clips.shape[1], of_latents=False):
            chunk = jax.device_put(clips[:, start:stop], place)
            moments, cache = self._encode(self._parameters, chunk, cache)
            made.append((moments, shared))
        return made

    def decode(self, latents: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
        """uint8 chunks `F H W 3` of a video, from `count` latent frames `h w z`.

        Raises:
          NotFinite: latents, or pixels, with NaN or infinity.
        """
        cache, chunk = None, []
        for start, stop, shared in self._bounds(count, of_latents=True):
            chunk = chunk[len(chunk) - shared :] if shared else []
            chunk += [next(latents) for _ in range(stop - start - shared)]
            given = np.stack(chunk)[None]
            clips, cache = self._decode(self._parameters, jnp.asarray(given), cache)
            if not np.asarray(clips.finite).all():
                if not np.isfinite(given).all():
                    raise NotFinite(
                        f"latent frames {start} to {stop - 1} hold NaN or infinity; encode the video again."
                    )
                raise self._not_finite(f"pixels of the latent frames {start} to {stop - 1}")
            yield np.asarray(clips.pixels[0, shared:])

    def _not_finite(self, what: str) -> NotFinite:
        return not_finite(what, f"VAE {self._folder}", self._dtype, "--compute-dtype")

    def _padded(self, frames: Iterator[np.ndarray], count: int, padded: int) -> Iterator[np.ndarray]:
        """Frames padded to whole latents by repeating the last row, column and frame, up to `padded` frames."""
        last = None
        for number in range(count):
            frame = next(frames, None)
            if frame is None:
                raise ValueError(f"the video ends after {number} of {count} frames: it is corrupt.")
            _, height, width = self.padded_size(1, *frame.shape[:2])
            last = np.pad(frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), mode="edge")
            yield last
        for _ in range(padded - count):
            yield last

    def _bounds(self, frames: int, *, of_latents: bool) -> list[tuple[int, int, int]]:
        """(start, stop, frames that it shares with the chunk before) of each chunk."""
        config = self.config
        per_step = 1 if of_latents else self.frames_per_latent
        if isinstance(config, CVVAEConfig) and not config.is_causal:
            size = config.tile_frames or self._chunk_latents * self.frames_per_latent
            bounds = chunk_bounds(frames, size // (self.frames_per_latent if of_latents else 1))
            return [(start, stop, int(start > 0)) for start, stop in bounds]
        if isinstance(config, CogVideoXVAEConfig):
            size = config.decode_chunk_frames if of_latents else config.encode_chunk_frames
            return [(start, stop, 0) for start, stop in frame_chunks(frames, size)]
        # The first chunk has one frame more, which has a latent of its own.
        size = self._chunk_latents * per_step
        ends = [*range(1 + size, frames, size), frames]
        return [(start, stop, 0) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]

    def _partitioned(self, step: ChunkStep) -> ChunkStep:
        def placed(parameters: Parameters, chunk: jax.Array, cache: Any) -> tuple[Any, Any]:
            with axes.partitioned(self._sharding):
                return step(parameters, chunk, cache)

        return placed

    def _steps(self) -> tuple[ChunkStep, ChunkStep]:
        vae, config = self._vae, self.config
        if isinstance(config, ImageVAEConfig) or (isinstance(config, CVVAEConfig) and not config.is_causal):
            return _without_cache(vae.encode), _without_cache(lambda p, z: to_clips(vae.decode(p, z)))
        apply = vae.network.apply

        def encode(parameters: Parameters, frames: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            pixels = from_uint8(frames, activation_dtype(parameters))
            return apply(parameters, pixels, cache, method="encode_chunk")

        def decode(parameters: Parameters, latents: jax.Array, cache: Any) -> tuple[Clips, Any]:
            latents = latents.astype(activation_dtype(parameters))
            frames, cache = apply(parameters, latents, cache, method="decode_chunk")
            return to_clips(frames), cache

        return encode, decode


def _without_cache(function: Callable[[Parameters, jax.Array], Any]) -> ChunkStep:
    return lambda parameters, chunk, cache: (function(parameters, chunk), None)
