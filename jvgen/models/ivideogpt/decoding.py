"""Rolling frames out: keys and values kept, slots forced, a whole rollout in one program.

The sequence of a rollout is a prompt (the context frames) and what is generated. Both parts keep their own keys and
values: several samples of one context share the prompt's, and only the short second part is written to.

A frame is decoded one id after the other (`frame_length` passes), or, with `SamplingConfig.parallel`, by guessing all
its ids (those of the frame before) and choosing them again from one pass over all of them until nothing changes (Song
et al. 2021, arXiv 2002.03629, Jacobi iteration). A choice is a function of scores and a key, so the fixed point is what
one after the other gives.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.sampling import SamplingConfig, choose
from jvgen.nn.attention import attention
from jvgen.nn.dropout import folded
from jvgen.nn.network import Parameters
from jvgen.nn.rope import line_rotation, rotate_halves
from jvgen.parallel.axes import ACTIVATION_HEADS, BATCH, constrain


class LayerWeights(NamedTuple):
    """One layer's matrices, fused where they read the same input."""

    attention_norm: jax.Array
    query_key_value: jax.Array
    attention_output: jax.Array
    feed_forward_norm: jax.Array
    gate_hidden: jax.Array
    feed_forward_output: jax.Array


class Weights(NamedTuple):
    """A transformer's parameters as decoding reads them; action and reward are (kernel, bias), or None."""

    embedding: jax.Array
    layers: tuple[LayerWeights, ...]
    final_norm: jax.Array
    head: jax.Array
    action: tuple[jax.Array, jax.Array] | None
    reward: tuple[jax.Array, jax.Array] | None


class Cache(NamedTuple):
    """Rotated keys, and values, of every layer: of the prompts, `B N P D`, and of what was generated, `R N G D`."""

    prompt: tuple[tuple[jax.Array, jax.Array], ...]
    generated: tuple[tuple[jax.Array, jax.Array], ...]


class Frame(NamedTuple):
    """One decoded frame: ids of the vocabulary `R M`, reward `R` (None without the head), and the slot after it `R`."""

    ids: jax.Array
    reward: jax.Array | None
    next_slot: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A transformer and a layout, ready to decode; all methods are pure functions of arrays.

    Attributes:
      config: of the transformer.
      layout: of the sequence; its future frames are the room that the cache has.
      sampling: how ids are chosen.
      forced_slots: put S2 before each frame. The released action-free models choose it like any other id.
      dtype: of the computation.
    """

    config: FrameTransformerConfig
    layout: Layout
    sampling: SamplingConfig = SamplingConfig()
    forced_slots: bool = True
    dtype: Any = jnp.float32

    # Weights.

    def weights(self, parameters: Parameters) -> Weights:
        """Parameters of `FrameTransformer` fused and unstacked. Worth doing once, not in every call."""

        def cast(leaf: jax.Array) -> jax.Array:
            return leaf.astype(self.dtype)

        def pair(name: str) -> tuple[jax.Array, jax.Array] | None:
            layer = parameters.get(name)
            return None if layer is None else (cast(layer["kernel"]), cast(layer["bias"]))

        stacked = parameters["blocks"]["layers"]
        attention_, feed_forward = stacked["attention"], stacked["feed_forward"]
        into = jnp.concatenate([attention_[name]["kernel"] for name in ("query", "key", "value")], axis=-1)
        gate_hidden = jnp.concatenate([feed_forward[name]["kernel"] for name in ("gate", "hidden")], axis=-1)
        layers = tuple(
            LayerWeights(
                stacked["attention_norm"]["scale"][i],
                cast(into[i]),
                cast(attention_["output"]["kernel"][i]),
                stacked["feed_forward_norm"]["scale"][i],
                cast(gate_hidden[i]),
                cast(feed_forward["output"]["kernel"][i]),
            )
            for i in range(self.config.layers)
        )
        return Weights(
            cast(parameters["embedding"]["table"]),
            layers,
            parameters["final_norm"]["scale"],
            cast(parameters["head"]["kernel"]),
            pair("action"),
            pair("reward"),
        )

    # The prompt.

    def prefill(self, weights: Weights, prompt: Int[Array, "B P"], samples: int = 1) -> Cache:
        """Read prompts (`Layout.prompt`); `samples` sequences can then be generated from each.

        Rows R = B x samples of everything generated are ordered by prompt, then by sample.

        Raises:
          ValueError: ids that are none of the vocabulary (not seen while a program is traced).
        """
        if not isinstance(prompt, jax.core.Tracer):
            self.layout.check_ids(prompt)
        x, kept = jnp.take(weights.embedding, prompt, axis=0), []
        rotation = self._rotation(jnp.arange(prompt.shape[1]))
        for layer in weights.layers:
            query, key, value = self._project(layer, x, rotation)
            kept.append(tuple(rearrange(array, "b p n d -> b n p d") for array in (key, value)))
            x = self._finish(layer, x, attention(query, key, value, causal=True))
        rows = prompt.shape[0] * samples
        room = (rows, self.config.heads, self.layout.future_frames * self.layout.frame_length, self.config.head_width)
        empty = _placed(jnp.zeros(room, self.dtype))
        return Cache(tuple(kept), tuple((empty, empty) for _ in weights.layers))

    # Frames.

    def frame(
        self,
        weights: Weights,
        cache: Cache,
        number: Int[Array, ""] | int,
        slots: Int[Array, "R"],
        actions: Float[Array, "R A"] | None,
        keys: Key[Array, "R"],
        guess: Int[Array, "R M"] | None = None,
    ) -> tuple[Frame, Cache]:
        """Decode future frame `number` (from 0), which follows on those in the cache.

        Args:
          slots: the id that opens the frame; S2 where slots are forced.
          actions: what leads to it, one a row; None for a model without actions.
          keys: one a sequence, the same for all its frames.
          guess: ids to begin from, for parallel decoding.
        """
        start = number * self.layout.frame_length
        slot = jnp.take(weights.embedding, slots, axis=0)
        if actions is not None:
            assert weights.action is not None, "actions for a model without them"
            slot = slot + actions.astype(self.dtype) @ weights.action[0] + weights.action[1]
        decode = self._parallel if self.sampling.parallel else self._sequential
        ids, last, cache = decode(weights, cache, slot, start, keys, guess)
        reward = None
        if weights.reward is not None:
            reward = (last @ weights.reward[0] + weights.reward[1])[:, 0].astype(jnp.float32)
        slots = jnp.full_like(slots, self.layout.future_slot)
        if not self.forced_slots:
            where = folded(keys, start + self.layout.future_tokens)
            slots = choose(self._logits(weights, last, future=False), where, self.sampling)
        return Frame(ids, reward, slots), cache

    def rollout(
        self,
        weights: Weights,
        prompt: Int[Array, "B P"],
        actions: Float[Array, "R F A"] | None,
        keys: Key[Array, "R"],
    ) -> tuple[Int[Array, "R F M"], Float[Array, "R F"] | None]:
        """Ids of all future frames of the layout, and their rewards; R / B samples of each prompt."""
        cache = self.prefill(weights, prompt, keys.shape[0] // prompt.shape[0])
        rows, frames = keys.shape[0], self.layout.future_frames
        slots = jnp.full((rows,), self.layout.future_slot, jnp.int32)
        guess = jnp.full((rows, self.layout.future_tokens), self.layout.context_codes, jnp.int32)

        def step(carry: tuple, scanned: tuple) -> tuple[tuple, tuple]:
            cache, slots, guess = carry
            number, action = scanned
            made, cache = self.frame(weights, cache, number, slots, action, keys, guess)
            return (cache, made.next_slot, made.ids), (made.ids, made.reward)

        by_frame = None if actions is None else rearrange(actions, "r f a -> f r a")
        _, (ids, rewards) = jax.lax.scan(step, (cache, slots, guess), (jnp.arange(frames), by_frame))
        return rearrange(ids, "f r m -> r f m"), None if rewards is None else rearrange(rewards, "f r -> r f")

    def _sequential(
        self, weights: Weights, cache: Cache, slot: jax.Array, start: Any, keys: jax.Array, guess: Any
    ) -> tuple[jax.Array, jax.Array, Cache]:
        def step(carry: tuple, offset: jax.Array) -> tuple[tuple, jax.Array]:
            cache, x = carry
            hidden, cache = self._advance(weights, cache, x[:, None], start + offset)
            ids = choose(self._logits(weights, hidden[:, 0]), folded(keys, start + offset), self.sampling)
            return (cache, jnp.take(weights.embedding, ids, axis=0)), ids

        (cache, x), ids = jax.lax.scan(step, (cache, slot), jnp.arange(self.layout.future_tokens))
        # The last id is read for its keys and values, and for the reward.
        hidden, cache = self._advance(weights, cache, x[:, None], start + self.layout.future_tokens)
        return rearrange(ids, "m r -> r m"), hidden[:, 0], cache

    def _parallel(
        self, weights: Weights, cache: Cache, slot: jax.Array, start: Any, keys: jax.Array, guess: jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache]:
        count = self.layout.future_tokens
        where = jnp.stack([folded(keys, start + offset) for offset in range(count)], axis=1)

        def again(carry: tuple) -> jax.Array:
            turn, changed, *_ = carry
            # In turn n the first n - 1 ids are what they will be: never more turns than ids, and one to read the last.
            return changed & (turn <= count)

        def turn(carry: tuple) -> tuple:
            turn, _, ids, _, cache = carry
            x = jnp.concatenate([slot[:, None], jnp.take(weights.embedding, ids, axis=0)], axis=1)
            hidden, cache = self._advance(weights, cache, x, start)
            chosen = choose(self._logits(weights, hidden[:, :-1]), where, self.sampling)
            return turn + 1, jnp.any(chosen != ids), chosen, hidden[:, -1], cache

        last = jnp.zeros_like(slot)
        first = (jnp.int32(0), jnp.bool_(True), guess, last, cache)
        _, _, ids, last, cache = jax.lax.while_loop(again, turn, first)
        return ids, last, cache

    # One pass.

    def _advance(
        self, weights: Weights, cache: Cache, x: Float[Array, "R T C"], start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "R T C"], Cache]:
        """Hidden states of T tokens that follow on the `start` generated ones in the cache, after the last norm."""
        count = x.shape[1]
        rotation = self._rotation(self.layout.prompt_length + start + jnp.arange(count))
        room = cache.generated[0][0].shape[2]
        seen = jnp.arange(room) <= (start + jnp.arange(count))[:, None]
        generated = []
        for layer, prompt, own in zip(weights.layers, cache.prompt, cache.generated, strict=True):
            query, key, value = self._project(layer, x, rotation)
            own = tuple(
                jax.lax.dynamic_update_slice(old, rearrange(new, "r t n d -> r n t d"), (0, 0, start, 0))
                for old, new in zip(own, (key, value), strict=True)
            )
            generated.append(own)
            x = self._finish(layer, x, _read(query, prompt, own, seen))
        return self._norm(x, weights.final_norm), Cache(cache.prompt, tuple(generated))

    def _project(self, layer: LayerWeights, x: jax.Array, rotation: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        fused = self._norm(x, layer.attention_norm) @ layer.query_key_value
        query, key, value = rearrange(fused, "b l (three n d) -> three b l n d", three=3, n=self.config.heads)
        return rotate_halves(query, rotation), rotate_halves(key, rotation), value

    def _finish(self, layer: LayerWeights, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = x + rearrange(mixed, "b l n d -> b l (n d)") @ layer.attention_output
        gate, hidden = jnp.split(self._norm(x, layer.feed_forward_norm) @ layer.gate_hidden, 2, axis=-1)
        return x + (jax.nn.silu(gate) * hidden) @ layer.feed_forward_output

    def _logits(self, weights: Weights, hidden: Float[Array, "*R C"], future: bool = True) -> Float[Array, "*R V"]:
        """Scores of the next id; with `future_codes_only` -inf for what a future frame cannot hold."""
        logits = (hidden @ weights.head).astype(jnp.float32)
        if not (future and self.sampling.future_codes_only):
            return logits
        ids, first = jnp.arange(logits.shape[-1]), self.layout.context_codes
        return jnp.where((ids >= first) & (ids < first + self.layout.future_codes), logits, -jnp.inf)

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)

    def _rotation(self, positions: jax.Array) -> Any:
        return line_rotation(positions, head_width=self.config.head_width, theta=self.config.rope_theta)


def _read(
    query: Float[Array, "R T N D"],
    prompt: tuple[Float[Array, "B N P D"], Float[Array, "B N P D"]],
    own: tuple[Float[Array, "R N G D"], Float[Array, "R N G D"]],
    seen: Array,
) -> Float[Array, "R T N D"]:
    """Attention over a prompt that several rows share and over what each row generated, where `seen` (T, G) says so."""
    batch, count = prompt[0].shape[0], query.shape[1]
    query = query * query.shape[-1] ** -0.5
    # All samples of a prompt read it in one matrix product.
    shared = rearrange(query, "(b s) t n d -> b n (s t) d", b=batch)
    to_prompt = jnp.einsum("bnqd,bnpd->bnqp", shared, prompt[0], preferred_element_type=jnp.float32)
    to_prompt = rearrange(to_prompt, "b n (s t) p -> (b s) n t p", t=count)
    to_own = jnp.einsum("rtnd,rngd->rntg", query, own[0], preferred_element_type=jnp.float32)
    scores = jnp.concatenate([to_prompt, jnp.where(seen, to_own, -jnp.inf)], axis=-1)
    shares = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    of_prompt, of_own = jnp.split(shares, [prompt[0].shape[2]], axis=-1)
    of_prompt = rearrange(of_prompt, "(b s) n t p -> b n (s t) p", b=batch)
    mixed = jnp.einsum("bnqp,bnpd->bnqd", of_prompt, prompt[1])
    mixed = rearrange(mixed, "b n (s t) d -> (b s) t n d", t=count)
    return mixed + jnp.einsum("rntg,rngd->rtnd", of_own, own[1])


def _placed(cache: jax.Array) -> jax.Array:
    return constrain(cache, BATCH, ACTIVATION_HEADS, None, None)
