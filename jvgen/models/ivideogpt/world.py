"""Tokenizer and transformer as one world model, in pure functions: reset at frames, step by one frame, roll out."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jvgen.finite import rows_are_finite
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.decoding import Cache, Decoder
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.objective import symexp
from jvgen.models.ivideogpt.sampling import NO_ID, SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer, Conditions
from jvgen.nn.network import Network, Parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of R imagined episodes.

    Attributes:
      number: int32 scalar, frames since the reset.
      frames: the last context_frames frames, `R T H W 3` in [0, 1]; the goal image and one less with `World.goal`.
      ids: those of the last frame, ids of the vocabulary, `R M`.
      keys: one per episode.
      slots: the id that opens the next frame, `R`.
      cache: keys and values of everything before the next frame.
      conditions: of the tokenizer's prediction decoder.
    """

    number: jax.Array
    frames: jax.Array
    ids: jax.Array
    keys: jax.Array
    slots: jax.Array
    cache: Cache
    conditions: Conditions


class Prediction(NamedTuple):
    """A rollout: frames `R F H W 3` in [0, 1], rewards `R F` (None without the reward head), and ids `R F M`.

    Frames are those that were decoded: all, the last one (`R 1 H W 3`), or None.

    Where a network's numbers are not finite, ids are `NO_ID`, and the frame and those after it are NaN.
    """

    frames: jax.Array | None
    rewards: jax.Array | None
    ids: jax.Array


class WorldWeights(NamedTuple):
    """The arrays of a world: parameters of the tokenizer, and of the transformer as `Decoder.prepare` returns them."""

    tokenizer: Parameters
    transformer: Parameters


@dataclasses.dataclass(frozen=True)
class World:
    """The structure of both networks, and how they roll out (arXiv 2405.15223, section 3.3).

    Attributes:
      tokenizer, transformer: configurations that belong together.
      frames: longest episode, context included.
      sampling: how ids are chosen.
      rewards_in_symlog: the transformer predicts symlog of rewards.
      dtype: of the transformer's computation.
      goal: the first frame of a context is a goal image; it stays there for all of an episode.
      dropout: the transformer's attention dropout stays on in rollouts, as in the released code.
    """

    tokenizer: CompressiveTokenizerConfig
    transformer: FrameTransformerConfig
    frames: int
    sampling: SamplingConfig = SamplingConfig()
    rewards_in_symlog: bool = True
    dtype: Any = jnp.float32
    goal: bool = False
    dropout: bool = False

    @functools.cached_property
    def layout(self) -> Layout:
        """Of the longest episode."""
        return self.tokenizer.layout(self.frames)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Of the transformer."""
        return Decoder(self.transformer, self.layout, self.sampling, dtype=self.dtype, dropout=self.dropout)

    @functools.cached_property
    def network(self) -> Network:
        """Of the tokenizer."""
        return Network.of(lambda rngs: CompressiveTokenizer(self.tokenizer, rngs=rngs))

    def prepare(self, tokenizer: Parameters, transformer: Parameters) -> WorldWeights:
        """Parameters in the form that the functions below take. Call it once, not per rollout: it copies them."""
        return WorldWeights(tokenizer, self.decoder.prepare(transformer))

    def reset(self, weights: WorldWeights, frames: Float[Array, "B T H W 3"], keys: Key[Array, "R"]) -> State:
        """Start R / B episodes from each of B contexts; rows are ordered by context, then by episode."""
        rows, samples = keys.shape[0], keys.shape[0] // frames.shape[0]
        ids, conditions = self._encode_context(weights, frames)
        return State(
            number=jnp.zeros((), jnp.int32),
            frames=jnp.repeat(frames, samples, axis=0),
            # A guess of the first frame's ids, for parallel decoding.
            ids=jnp.full((rows, self.layout.future_tokens), self.layout.context_codes, jnp.int32),
            keys=keys,
            slots=jnp.full((rows,), self.layout.future_slot, jnp.int32),
            cache=self.decoder.prefill(weights.transformer, self.layout.prompt(ids), samples, keys[::samples]),
            conditions=jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), conditions),
        )

    def step(
        self, weights: WorldWeights, state: State, actions: Float[Array, "R A"] | None
    ) -> tuple[State, Float[Array, "R H W 3"], Float[Array, "R"] | None]:
        """Predict one frame: the new state, the frame in [0, 1] (NaN as in `Prediction`), the reward of the action."""
        decoded, cache = self.decoder.frame(
            weights.transformer, state.cache, state.number, state.slots, actions, state.keys, state.ids
        )
        frame = self._frames(weights, decoded.ids[:, None], state.conditions)[:, 0]
        kept = int(self.goal)
        state = dataclasses.replace(
            state,
            number=state.number + 1,
            frames=jnp.concatenate([state.frames[:, :kept], state.frames[:, kept + 1 :], frame[:, None]], axis=1),
            ids=decoded.ids,
            slots=decoded.next_slot,
            cache=cache,
        )
        return state, frame, self._reward(decoded.reward)

    def rollout(
        self,
        weights: WorldWeights,
        frames: Float[Array, "B T H W 3"],
        actions: Float[Array, "R F A"] | None,
        keys: Key[Array, "R"],
        decoded: Literal["all", "last", "none"] = "all",
    ) -> Prediction:
        """R / B whole episodes from each context: as many frames as actions, or as the layout has.

        `decoded`: which frames are made of the ids.
        """
        samples = keys.shape[0] // frames.shape[0]
        count = self.layout.future_frames if actions is None else actions.shape[1]
        decoder = dataclasses.replace(self.decoder, layout=dataclasses.replace(self.layout, future_frames=count))
        ids, conditions = self._encode_context(weights, frames)
        ids, rewards = decoder.rollout(weights.transformer, self.layout.prompt(ids), actions, keys)
        if decoded == "none":
            return Prediction(None, self._reward(rewards), ids)
        conditions = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), conditions)
        frames = self._frames(weights, ids, conditions, last_only=decoded == "last")
        return Prediction(frames, self._reward(rewards), ids)

    def _encode_context(
        self, weights: WorldWeights, frames: Float[Array, "B T H W 3"]
    ) -> tuple[Int[Array, "B T N"], Conditions]:
        model = self.network.bind(weights.tokenizer)
        latents, _ = model.encode_context(frames)
        ids = model.context_codebook.nearest(latents)
        conditions = model.detokenize_context(ids, frames.dtype)[1]
        # NaN has a nearest code too: it is passed on to the predicted frames.
        finite = rows_are_finite(latents)
        return ids, jax.tree.map(lambda leaf: _or_nan(finite, leaf), conditions)

    def _frames(
        self, weights: WorldWeights, ids: Int[Array, "R F M"], conditions: Conditions, *, last_only: bool = False
    ) -> Float[Array, "R D H W 3"]:
        model, first = self.network.bind(weights.tokenizer), -1 if last_only else 0
        frames = model.detokenize_future(self.layout.clamp_future_codes(ids[:, first:]), conditions)
        chosen = (jnp.cumsum(jnp.any(ids == NO_ID, axis=-1), axis=1) == 0)[:, first:]
        return _or_nan(chosen, jnp.clip(frames.astype(jnp.float32), 0.0, 1.0))

    def _reward(self, reward: jax.Array | None) -> jax.Array | None:
        return symexp(reward) if reward is not None and self.rewards_in_symlog else reward


def _or_nan(valid: jax.Array, values: jax.Array) -> jax.Array:
    """Values, and NaN where `valid`, which has their first axes, is false."""
    return jnp.where(valid.reshape(*valid.shape, *[1] * (values.ndim - valid.ndim)), values, jnp.nan)
