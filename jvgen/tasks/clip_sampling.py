"""Sampling of a text-to-video task: latents of new clips from captions, and from given frames or a given video."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.diffusion.guidance import GuidanceConfig, guided, unguided
from jvgen.diffusion.objective import slot_normal
from jvgen.diffusion.sampler import SamplerConfig, coefficients, trajectory
from jvgen.diffusion.schedule import Schedule
from jvgen.finite import Finite, rows_are_finite
from jvgen.models.video_dit.enhance import EnhanceConfig, Enhancement
from jvgen.models.video_dit.model import AttentionScale
from jvgen.nn.network import Parameters
from jvgen.tasks.given_frames import GivenPixels
from jvgen.tasks.given_latents import GivenLatents
from jvgen.tasks.text import TextEncoder
from jvgen.tasks.text_to_video_config import TextToVideoFields

# Purposes folded into the key of a step, besides those of jvgen.tasks.text_to_video; old numbers never change.
START_KEY = 18
SAMPLER_KEY = 19


class Sampled(Protocol):
    """The parts of a text-to-video task that sampling uses."""

    config: TextToVideoFields
    schedule: Schedule
    given: GivenLatents
    text: TextEncoder

    def text_embeddings(self, parameters: Parameters, frozen: Parameters, tokens: jax.Array) -> jax.Array: ...

    def encode(self, frozen: Parameters, video: jax.Array) -> jax.Array: ...

    def denoise(
        self,
        parameters: Parameters,
        noisy: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        attention_scale: AttentionScale | None = None,
        *,
        given: jax.Array | None = None,
    ) -> jax.Array: ...


class ClipSettings(NamedTuple):
    """How clips are made.

    Attributes:
      size: frames, height and width in pixels.
      sampler, guidance: see their configs.
      enhance: Enhance-A-Video's scaling of attention.
      strength: of a given video, see `jvgen.tasks.task.SampleRequest`.
    """

    size: tuple[int, int, int]
    sampler: SamplerConfig
    guidance: GuidanceConfig
    enhance: EnhanceConfig | None = None
    strength: float | None = None


def generate_latents(
    task: Sampled,
    parameters: Parameters,
    tokens: jax.Array,
    slots: jax.Array,
    key: jax.Array,
    how: ClipSettings,
    given: GivenPixels | None = None,
) -> tuple[jax.Array, Finite]:
    """Normalized latents `B F H W C` of new clips, and how far they are finite; clip i depends on the key and
    `slots[i]` only.

    Args:
      parameters: of all networks by name, trained or not.
      tokens: captions, as `jvgen.tasks.text.TextEncoder` takes them.
      given: frames that the clips are conditioned on, or a video that they start from.
    """
    config, given, (sampler, guidance) = task.config, given or GivenPixels(), (how.sampler, how.guidance)
    shape = (tokens.shape[0], *config.denoised_shape(*how.size), config.denoiser.out_channels)
    text = task.text_embeddings(parameters, {}, tokens)
    enhancement = enhancement_hook(config, task.schedule, how.enhance, sampler, guidance)
    condition = task.given.condition(parameters, given.frames, key, slots, shape[1])

    def denoise(noisy: jax.Array, timesteps: jax.Array, inputs: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        hook = None if enhancement is None else enhancement(timesteps)
        return task.denoise(parameters, noisy, timesteps, inputs[0], hook, given=inputs[1])

    text_is_finite = rows_are_finite(text)
    if guidance.kind == "none":
        step = unguided(denoise, (text, condition))
    else:
        empty = task.text_embeddings(parameters, {}, task.text.unconditional()[None])
        text_is_finite &= rows_are_finite(empty)
        without = (jnp.broadcast_to(empty, text.shape), condition)
        step = guided(denoise, (text, condition), without, rescale=guidance.rescale)
    noise = slot_normal(jax.random.fold_in(key, START_KEY), shape, slots)
    moments = None if given.video is None else task.encode(parameters, given.video)
    start, first = task.given.start(moments, noise, key, slots, sampler, how.strength)
    made = trajectory(
        step, start, schedule=task.schedule, sampler=sampler, prediction=config.objective.target,
        guidance=guidance, key=jax.random.fold_in(key, SAMPLER_KEY), slots=slots, first=first,
    )  # fmt: skip
    latents = made.result[:, -config.clip_frames(how.size[0]) :]
    return latents, Finite(text_is_finite, made.finite_steps, jnp.ones_like(text_is_finite), jnp.int32(made.steps))


def enhancement_hook(
    config: TextToVideoFields,
    schedule: Schedule,
    enhance: EnhanceConfig | None,
    sampler: SamplerConfig,
    guidance: GuidanceConfig,
) -> Callable[[jax.Array], Enhancement] | None:
    """Enhance-A-Video's hook as a function of the timesteps `B` of a sampler step; None if it is never active."""
    if enhance is None:
        return None
    strengths = jnp.asarray(enhance.strengths(config.denoiser.layers))
    visited = coefficients(sampler, schedule, config.objective.target, guidance).timesteps
    enhanced = [time for step, time in enumerate(visited) if enhance.active_in(step, len(visited))]
    if not enhanced:
        return None
    clip_size = 1 if guidance.kind == "none" else 2

    def at(timesteps: jax.Array) -> Enhancement:
        # Timesteps fall from step to step.
        active = (timesteps[0] <= np.float32(enhanced[0])) & (timesteps[0] >= np.float32(enhanced[-1]))
        return Enhancement(enhance, strengths, None if len(enhanced) == len(visited) else active, clip_size)

    return at
