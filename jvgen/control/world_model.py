"""A world model to act in: reset at frames, then step with actions, each giving the next frame and a reward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jvgen.finite import NotFinite, not_finite
from jvgen.models.ivideogpt.config import MAX_ACTION, CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import NO_ID, SamplingConfig
from jvgen.models.ivideogpt.tokenizer import Tokens
from jvgen.models.ivideogpt.world import Prediction, State, World
from jvgen.nn.network import Parameters
from jvgen.tasks.pixels import unit_from_uint8, unit_to_uint8


class WorldModel:
    """A tokenizer and a transformer as a world model (iVideoGPT, arXiv 2405.15223, section 3.3).

    `reset`, `step` and `rollout` are compiled, work on batches, and can be traced under `jax.vmap`, `jax.jit` or
    `lax.scan`; values are not checked there.

    Args:
      tokenizer, transformer: the configurations.
      tokenizer_parameters, transformer_parameters: their parameters.
      frames: longest episode, context included. Quality drops beyond the length that the transformer was trained with.
      sampling: how ids are chosen.
      rewards_in_symlog: the transformer predicts symlog of rewards, as `jvgen.tasks.world_model` trains it.
      dtype: of the transformer's computation.
      goal: the model was trained with a goal image as first frame of the context (`WorldModelConfig.goal`).

    Raises:
      ValueError: networks that do not belong together, or more frames than max_positions holds.
    """

    def __init__(
        self,
        tokenizer: CompressiveTokenizerConfig,
        tokenizer_parameters: Parameters,
        transformer: FrameTransformerConfig,
        transformer_parameters: Parameters,
        *,
        frames: int,
        sampling: SamplingConfig | None = None,
        rewards_in_symlog: bool = True,
        dtype: Any = jnp.float32,
        goal: bool = False,
    ):
        transformer.check_tokenizer(tokenizer, frames)
        if goal and tokenizer.context_frames < 2:
            raise ValueError("goal: needs a goal image and a current frame, but the tokenizer's context is 1 frame.")
        sampling = sampling or SamplingConfig()
        sampling.validate()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.world = World(tokenizer, transformer, frames, sampling, rewards_in_symlog, dtype, goal)
        self.weights = jax.jit(self.world.prepare)(tokenizer_parameters, transformer_parameters)
        self._reset = jax.jit(self.world.reset)
        self._step = jax.jit(self.world.step)
        self._rollout = jax.jit(self.world.rollout)
        self._tokenize = jax.jit(lambda parameters, video: self.world.network.bind(parameters).tokenize(video))

    @property
    def horizon(self) -> int:
        """Frames that can be predicted after a reset."""
        return self.world.layout.future_frames

    @property
    def context_frames(self) -> int:
        """Frames that a reset needs."""
        return self.tokenizer.context_frames

    @property
    def action_width(self) -> int:
        """Components of an action; 0 for a world without actions."""
        return self.transformer.action_width

    def reset(self, frames: Any, key: Key[Array, ""] | int = 0, *, samples: int = 1) -> State:
        """Start episodes at given frames.

        Args:
          frames: `B T H W 3`, T = context_frames, uint8, or floats in [0, 1]. A goal-conditioned model takes the goal
            first and then the current frame.
          key: random key, or a seed.
          samples: episodes per context; R = B x samples, ordered by context.

        Raises:
          ValueError: frames of another shape or range.
        """
        frames = self.check_frames(frames)
        return self._reset(self.weights, frames, row_keys(key, frames.shape[0] * samples))

    def step(
        self, state: State, actions: Any = None
    ) -> tuple[State, Float[Array, "R H W 3"], Float[Array, "R"] | None]:
        """Predict one frame: the new state, the frame in [0, 1], and the action's reward (None without that head).

        Args:
          state: of `reset` or `step`.
          actions: `R A`; None for a world without actions.

        Raises:
          ValueError: actions of another shape, not finite or too large; an episode at its horizon (see `refresh`).

        Frames of networks whose numbers are not finite are NaN, which `observed` refuses.
        """
        actions = self.check_actions(actions, (state.slots.shape[0],))
        if _is_known(state.number) and int(state.number) >= self.horizon:
            raise ValueError(
                f"the episode is {int(state.number)} frames long, the horizon of this world: reset it, or continue "
                "from its last frames with refresh(state)."
            )
        return self._step(self.weights, state, actions)

    def observed(
        self, state: State, frame: Float[Array, "R H W 3"], reward: Float[Array, "R"] | None, number: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Frame and reward of a `step` in host memory: uint8 `R H W 3`, and `R`.

        Args:
          state, frame, reward: what `step` returned.
          number: of the step, from 1, for the message.

        Raises:
          NotFinite: NaN or infinity in them; names the network.
        """
        frame, reward = np.asarray(frame), None if reward is None else np.asarray(reward)
        if not np.isfinite(frame).all() or not (reward is None or np.isfinite(reward).all()):
            ids_chosen = (np.asarray(state.ids) != NO_ID).all()
            if ids_chosen and not np.isfinite(frame).all():
                raise not_finite(f"frame of step {number}", "tokenizer", state.frames.dtype)
            what = "reward" if ids_chosen else "scores of the ids"
            raise not_finite(f"{what} of step {number}", "transformer", self.world.dtype)
        return to_pixels(frame), reward

    @staticmethod
    def pixels(frames: Any) -> np.ndarray:
        """Predicted frames in [0, 1] as uint8 host arrays; raises `NotFinite` for NaN and infinity."""
        return to_pixels(frames)

    def refresh(self, state: State) -> State:
        """The same episodes with their last frames as a new context, for `horizon` more frames. A goal image stays.

        Predicted frames are tokenized again as context, which costs quality each time.
        """
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.number))(state.keys)
        return self._reset(self.weights, state.frames, keys)

    def rollout(
        self, frames: Any, actions: Any = None, key: Key[Array, ""] | int = 0, *, samples: int = 1
    ) -> Prediction:
        """Whole episodes in one program: `horizon` frames, or as many as there are actions.

        Args:
          frames: `B T H W 3`, as in `reset`.
          actions: `R F A` with R = B x samples (the samples of a context are adjacent); None without actions.
          key, samples: as in `reset`. Episode r samples the same ids as with `step`.

        Raises:
          ValueError: as `reset` and `step`.
        """
        frames = self.check_frames(frames)
        count = self.horizon if actions is None else np.shape(actions)[1] if np.ndim(actions) == 3 else 0
        if not 1 <= count <= self.horizon:
            raise ValueError(
                f"actions {np.shape(actions)}: give 1..{self.horizon} actions per episode (R F A), the horizon of "
                "this world."
            )
        actions = self.check_actions(actions, (frames.shape[0] * samples, count))
        return self._rollout(self.weights, frames, actions, row_keys(key, frames.shape[0] * samples))

    def tokenize(self, video: Any) -> Tokens:
        """Token ids of clips: the context frames' `B T N` and the later frames' `B F M`, each in its own codebook.

        Args:
          video: `B T+F H W 3`, uint8, or floats in [0, 1].

        Raises:
          ValueError: frames of another shape or range.
        """
        shape, count = tuple(np.shape(video)), self.context_frames
        side, channels = self.tokenizer.resolution, self.tokenizer.channels
        if len(shape) != 5 or shape[1] <= count or shape[2:] != (side, side, channels):
            raise ValueError(
                f"video {shape}: expected (batch, frames, {side}, {side}, {channels}) with more than {count} frames. "
                "Crop and resize them first."
            )
        return self._tokenize(self.weights.tokenizer, as_floats(video))

    def check_frames(self, frames: Any) -> Float[Array, "B T H W 3"]:
        """Frames as floats in [0, 1]; raises `ValueError` for another shape, dtype or range."""
        side, count = self.tokenizer.resolution, self.context_frames
        shape = tuple(np.shape(frames))
        if len(shape) != 5 or shape[1:] != (count, side, side, self.tokenizer.channels):
            raise ValueError(
                f"frames {shape}: this world starts from {count} frames of {side}x{side}: (batch, {count}, {side}, "
                f"{side}, {self.tokenizer.channels}). Crop and resize them first."
            )
        return as_floats(frames)

    def check_actions(self, actions: Any, leading: tuple[int, ...]) -> Float[Array, "..."] | None:
        """Actions as float32; raises `ValueError` for another shape, or values that are not finite or too large."""
        if not self.action_width:
            if actions is not None:
                raise ValueError("actions were given to a world without actions: pass None.")
            return None
        wanted = (*leading, self.action_width)
        if actions is None:
            raise ValueError(f"no actions: this world takes actions of {self.action_width} components, shape {wanted}.")
        actions = jnp.asarray(actions)
        if actions.shape != wanted:
            raise ValueError(f"actions {actions.shape}: expected {wanted}, {self.action_width} components per action.")
        actions = actions.astype(jnp.float32)
        if _is_known(actions):
            largest = float(jnp.max(jnp.abs(actions)))
            if not largest <= MAX_ACTION:
                raise ValueError(
                    f"actions reach {largest:g}: they must be finite and at most {MAX_ACTION:g}; give them in the "
                    "units that the world was trained with."
                )
        return actions


def to_pixels(frames: Any) -> np.ndarray:
    """Frames in [0, 1] as uint8 host arrays.

    Raises:
      NotFinite: frames with NaN or infinity: the world model's numbers were not finite.
    """
    frames = np.asarray(frames)
    if not np.isfinite(frames).all():
        raise NotFinite(
            "predicted frames hold NaN or infinity, from the transformer or the tokenizer of the world model: their "
            "weights are damaged, or what they were given is."
        )
    return np.asarray(unit_to_uint8(jnp.asarray(frames)))


def as_floats(frames: Any) -> jax.Array:
    """Frames, uint8 or floats in [0, 1], as float32 in [0, 1]; raises `ValueError` for another dtype or range."""
    frames = jnp.asarray(frames)
    if frames.dtype == jnp.uint8:
        return unit_from_uint8(frames)
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"frames of {frames.dtype}: give uint8 in 0..255, or floats in [0, 1].")
    if _is_known(frames):
        low, high = float(jnp.min(frames)), float(jnp.max(frames))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"frames from {low:g} to {high:g}: floats must be in [0, 1]; divide 0..255 by 255.")
    return frames.astype(jnp.float32)


def row_keys(key: Any, count: int) -> jax.Array:
    """One random key per row, from a key or a seed: a row's is the same however many there are."""
    key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def _is_known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
