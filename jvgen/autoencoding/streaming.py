"""Autoencoders over videos of any length, part by part in bounded memory: uint8 frames to latents, and back.

How a video is cut is each network's own rule. Networks that remember (`CVVAEConfig.streams`, CogVideoX's) give what the
whole video would; the published CV-VAEs are coded in the chunks and tiles that belong to them; images one by one.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.interop.from_torch import import_folder, read_config
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cogvideox_vae.model import frame_batches
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.tiling import chunk_bounds
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.compute_dtype import cast
from jvgen.nn.network import Parameters
from jvgen.tasks.clip_coder import ClipCoder, CoderConfig, temporal_downsampling
from jvgen.tasks.pixels import from_uint8, to_uint8
from jvgen.tasks.task import activation_dtype

# A step of coding: (parameters, frames, what is remembered) -> (result, what to remember).
Step = Callable[[Parameters, jax.Array, Any], tuple[jax.Array, Any]]


class VideoCoder:
    """The autoencoder in a folder, for videos one after another.

    Args:
      folder: as `jvgen export` or diffusers write it.
      part: frames that are coded together where the network leaves it open; rounded to what it can take.
      compute_dtype: of activations and of matrices; "bfloat16" takes half of the memory.

    Raises:
      ValueError: a folder without an autoencoder, or `part` below 1.
    """

    def __init__(self, folder: str | Path, *, part: int = 16, compute_dtype: str = "float32"):
        config = read_config(folder)
        if not isinstance(config, CoderConfig):
            raise ValueError(f"--vae {folder}: holds a {type(config).__name__}, not an autoencoder of images or clips.")
        if part < 1:
            raise ValueError(f"--chunk-frames {part}: must be at least 1.")
        self.config = config
        self.group = temporal_downsampling(config)
        self._coder = ClipCoder(config)
        loaded, axes = import_folder(folder)[1], self._coder.network.axes
        self._parameters = jax.jit(lambda tree: cast(tree, axes, jnp.dtype(compute_dtype)))(loaded)
        self._part = max(part // self.group, 1)  # latent frames
        # What is remembered of a part is as large as the network's activations: the next part takes its place.
        self._encode, self._decode = (jax.jit(step, donate_argnums=2) for step in self._steps())

    @property
    def side(self) -> int:
        """Pixels along a side of one latent."""
        return self.config.downsampling

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.config.latent_channels

    def padded(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The size that a video has to have, at least its own: whole groups of frames after the first, whole latents.

        `encode` repeats the last frame, row and column up to it; whoever decodes cuts them off again.
        """
        groups = -(-(frames - 1) // self.group)
        return 1 + groups * self.group, *(math.ceil(size / self.side) * self.side for size in (height, width))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Frames, height, width and channels of the latents of a video."""
        frames, height, width = self.padded(frames, height, width)
        return (frames - 1) // self.group + 1, height // self.side, width // self.side, self.latent_channels

    def encode(self, frames: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
        """Latents (posterior means, as the decoder takes them) of `count` frames, float32 parts `f h w z`.

        Raises:
          ValueError: fewer frames than `count`.
        """
        for moments in self.moments(frames, count):
            yield moments[..., : self.latent_channels]

    def moments(self, frames: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
        """Mean and raw log variance of the latents of `count` frames, float32 parts `f h w 2z`; see `encode`."""
        whole, past = self.padded(count, 1, 1)[0], None
        frames = self._filled(frames, count, whole)
        held: list[np.ndarray] = []
        for start, stop, drop in self._bounds(whole, of_latents=False):
            # What a chunk shares with the one before is kept from there.
            held = held[len(held) - drop :] if drop else []
            held += [next(frames) for _ in range(stop - start - drop)]
            moments, past = self._encode(self._parameters, jnp.asarray(np.stack(held)[None]), past)
            yield np.asarray(moments[0, drop:], np.float32)

    def decode(self, latents: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
        """uint8 parts `F H W 3` of a video, from `count` latent frames `h w z` one by one."""
        past, held = None, []
        for start, stop, drop in self._bounds(count, of_latents=True):
            held = held[len(held) - drop :] if drop else []
            held += [next(latents) for _ in range(stop - start - drop)]
            made, past = self._decode(self._parameters, jnp.asarray(np.stack(held)[None]), past)
            yield np.asarray(made[0, drop:])

    def _filled(self, frames: Iterator[np.ndarray], count: int, whole: int) -> Iterator[np.ndarray]:
        """Frames with rows and columns repeated up to whole latents, the last frame up to whole groups."""
        last = None
        for number in range(count):
            frame = next(frames, None)
            if frame is None:
                raise ValueError(f"the video ends after {number} of {count} frames: it is damaged.")
            _, height, width = self.padded(1, *frame.shape[:2])
            last = np.pad(frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), mode="edge")
            yield last
        for _ in range(whole - count):
            yield last

    def _bounds(self, frames: int, *, of_latents: bool) -> list[tuple[int, int, int]]:
        """First frame and end of each part, and how many frames of its beginning the part before had too."""
        group = 1 if of_latents else self.group
        if isinstance(self.config, CVVAEConfig) and not self.config.streams:
            size = self.config.tile_frames or self._part * self.group
            bounds = chunk_bounds(frames, size // (self.group if of_latents else 1))
            return [(start, stop, int(start > 0)) for start, stop in bounds]
        if isinstance(self.config, CogVideoXVAEConfig):
            size = self.config.decode_batch if of_latents else self.config.encode_batch
            return [(start, stop, 0) for start, stop in frame_batches(frames, size)]
        # The first part has one frame more, which has a latent of its own.
        ends = [*range(1 + self._part * group, frames, self._part * group), frames]
        return [(start, stop, 0) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]

    def _steps(self) -> tuple[Step, Step]:
        coder, config = self._coder, self.config
        if isinstance(config, ImageVAEConfig) or (isinstance(config, CVVAEConfig) and not config.streams):
            return _alone(coder.encode), _alone(lambda p, z: to_uint8(coder.decode(p, z)))
        apply = coder.network.apply
        names = (
            ("encode_part", "decode_part") if isinstance(config, CVVAEConfig) else ("encode_frames", "decode_frames")
        )

        def encode_on(parameters: Parameters, frames: jax.Array, past: Any) -> tuple[jax.Array, Any]:
            return apply(parameters, from_uint8(frames, activation_dtype(parameters)), past, method=names[0])

        def decode_on(parameters: Parameters, latents: jax.Array, past: Any) -> tuple[jax.Array, Any]:
            made, past = apply(parameters, latents.astype(activation_dtype(parameters)), past, method=names[1])
            return to_uint8(made), past

        return encode_on, decode_on


def _alone(function: Callable[[Parameters, jax.Array], jax.Array]) -> Step:
    """A step that remembers nothing."""
    return lambda parameters, frames, past: (function(parameters, frames), None)
