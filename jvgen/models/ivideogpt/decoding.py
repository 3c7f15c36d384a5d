"""Rollouts of the transformer: a cache of keys and values, forced slots, a whole rollout in one program.

The sequence of a rollout is a prompt (the context frames) and the generated frames. Each part has its own keys and
values: several samples of one context share the prompt's, and only the short generated part is written to.

A frame is decoded one id after another (`frame_length` passes), or, with `SamplingConfig.parallel`, by Jacobi
iteration (Song et al. 2021, arXiv 2002.03629): guess all its ids (those of the frame before) and choose them again
from one pass over all of them until none changes. A choice is a function of scores and a key, so the fixed point is
the sequential result.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key

from jvgen.models.ivideogpt.config import FrameTransformerConfig
from jvgen.models.ivideogpt.layout import Layout
from jvgen.models.ivideogpt.sampling import SamplingConfig, choose
from jvgen.models.ivideogpt.transformer import FrameTransformer, unstack
from jvgen.nn.attention import attention
from jvgen.nn.dropout import attention_with_dropout, dropout, folded
from jvgen.nn.network import Network, Parameters
from jvgen.parallel.axes import ACTIVATION_HEADS, BATCH, constrain
from jvgen.precision import product_precision

# Purpose of keys of dropout, to which the layer is added; ids of a sequence are drawn with smaller numbers.
_DROPOUT = 2**24

# (ids `R T` of a frame, place of the first in it) -> embeddings `R T C`.
Embed = Callable[[jax.Array, Any], jax.Array]


class KeyValue(NamedTuple):
    """Rotated keys, and values, of one layer: `B N P D` of prompts, `R N G D` of generated tokens."""

    key: jax.Array
    value: jax.Array


class Cache(NamedTuple):
    """Keys and values of all layers: of B prompts, and of the tokens that R = B x samples rows generate."""

    prompt: tuple[KeyValue, ...]
    generated: tuple[KeyValue, ...]


class Frame(NamedTuple):
    """One decoded frame: ids of the vocabulary `R M`, reward `R` (None without the head), and the slot after it `R`."""

    ids: jax.Array
    reward: jax.Array | None
    next_slot: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes frames of one layout with one transformer; all methods are pure functions of arrays.

    Attributes:
      config: of the transformer.
      layout: of the sequence; the cache has room for its future frames.
      sampling: how ids are chosen.
      forced_slots: put S2 before each frame. The released action-free models choose it like any other id.
      dtype: of the computation.
      dropout: of the attention's weights stays on, as in training: what the released rollouts do.
    """

    config: FrameTransformerConfig
    layout: Layout
    sampling: SamplingConfig = SamplingConfig()
    forced_slots: bool = True
    dtype: Any = jnp.float32
    dropout: bool = False

    @functools.cached_property
    def network(self) -> Network:
        """The transformer with one module per layer."""
        return Network.of(lambda rngs: FrameTransformer(self.config, unstacked=True, rngs=rngs))

    def prepare(self, parameters: Parameters) -> Parameters:
        """Parameters of `FrameTransformer` layer by layer, in the dtype of the computation; norms stay float32.

        All other methods take these. Call it once, not per rollout: it copies the parameters.
        """

        def cast(path: tuple, leaf: jax.Array) -> jax.Array:
            return leaf if path[-1].key == "scale" else leaf.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(cast, unstack(parameters, self.config.layers))

    def prefill(
        self,
        parameters: Parameters,
        prompt: Int[Array, "B P"],
        samples: int = 1,
        keys: Key[Array, "B"] | None = None,
    ) -> Cache:
        """The cache of prompts (`Layout.prompt`), from each of which `samples` sequences can be generated.

        Rows R = B x samples of everything generated are ordered by prompt, then by sample. Keys are for dropout.

        Raises:
          ValueError: ids outside the vocabulary (not checked while a program is traced).
        """
        if not isinstance(prompt, jax.core.Tracer):
            self.layout.check_ids(prompt)
        model = self.network.bind(parameters)
        x, positions = model.embed(prompt, self.layout, dtype=self.dtype), jnp.arange(prompt.shape[1])
        layers = tuple(_Prompt(dropped=self._dropped(keys, layer)) for layer in range(self.config.layers))
        _, prompts = model.decode(x, positions, layers)
        generated_length = self.layout.future_frames * self.layout.frame_length
        shape = (prompt.shape[0] * samples, self.config.heads, generated_length, self.config.head_width)
        empty = constrain(jnp.zeros(shape, self.dtype), BATCH, ACTIVATION_HEADS, None, None)
        return Cache(tuple(layer.kept for layer in prompts), (KeyValue(empty, empty),) * self.config.layers)

    def frame(
        self,
        parameters: Parameters,
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
          actions: the action that leads to it, one per row; None for a model without actions.
          keys: one per sequence, the same for all its frames.
          guess: ids that parallel decoding starts from.
        """
        model = self.network.bind(parameters)
        start = number * self.layout.frame_length

        def embed(ids: jax.Array, first: Any, opens: bool = False) -> jax.Array:
            return model.embed_frame(ids, first, self.layout, actions, opens=opens, dtype=self.dtype)

        slot = embed(slots[:, None], 0, opens=True)
        decode = self._parallel if self.sampling.parallel else self._sequential
        ids, last, cache = decode(model, embed, cache, slot, start, keys, guess)
        reward = None if model.reward is None else model.rewards(last)
        slots = jnp.full_like(slots, self.layout.future_slot)
        if not self.forced_slots:
            slots = choose(model.logits(last), folded(keys, start + self.layout.future_tokens), self.sampling)
        return Frame(ids, reward, slots), cache

    def rollout(
        self,
        parameters: Parameters,
        prompt: Int[Array, "B P"],
        actions: Float[Array, "R F A"] | None,
        keys: Key[Array, "R"],
    ) -> tuple[Int[Array, "R F M"], Float[Array, "R F"] | None]:
        """Ids of all future frames of the layout, and their rewards; R / B samples of each prompt."""
        samples = keys.shape[0] // prompt.shape[0]
        cache = self.prefill(parameters, prompt, samples, keys[::samples])
        rows, frames = keys.shape[0], self.layout.future_frames
        slots = jnp.full((rows,), self.layout.future_slot, jnp.int32)
        guess = jnp.full((rows, self.layout.future_tokens), self.layout.context_codes, jnp.int32)

        def step(carry: tuple, scanned: tuple) -> tuple[tuple, tuple]:
            cache, slots, guess = carry
            number, action = scanned
            frame, cache = self.frame(parameters, cache, number, slots, action, keys, guess)
            return (cache, frame.next_slot, frame.ids), (frame.ids, frame.reward)

        by_frame = None if actions is None else rearrange(actions, "r f a -> f r a")
        _, (ids, rewards) = jax.lax.scan(step, (cache, slots, guess), (jnp.arange(frames), by_frame))
        return rearrange(ids, "f r m -> r f m"), None if rewards is None else rearrange(rewards, "f r -> r f")

    def _sequential(
        self,
        model: FrameTransformer,
        embed: Embed,
        cache: Cache,
        slot: jax.Array,
        start: Any,
        keys: jax.Array,
        guess: Any,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Ids `R M` of a frame, hidden states `R C` of its last id, and the cache with the frame in it."""

        def step(carry: tuple, offset: jax.Array) -> tuple[tuple, jax.Array]:
            cache, x = carry
            hidden, cache = self._pass(model, cache, x, start + offset, keys)
            ids = choose(self._frame_logits(model, hidden[:, 0]), folded(keys, start + offset), self.sampling)
            return (cache, embed(ids[:, None], offset + 1)), ids

        (cache, x), ids = jax.lax.scan(step, (cache, slot), jnp.arange(self.layout.future_tokens))
        # The last id is read for its keys and values, and for the reward.
        hidden, cache = self._pass(model, cache, x, start + self.layout.future_tokens, keys)
        return rearrange(ids, "m r -> r m"), hidden[:, 0], cache

    def _parallel(
        self,
        model: FrameTransformer,
        embed: Embed,
        cache: Cache,
        slot: jax.Array,
        start: Any,
        keys: jax.Array,
        guess: Any,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """As `_sequential`, by Jacobi iteration from a guess of the ids."""
        count = self.layout.future_tokens
        folded_keys = jnp.stack([folded(keys, start + offset) for offset in range(count)], axis=1)

        def unfinished(carry: tuple) -> jax.Array:
            iteration, changed, *_ = carry
            # Iteration n leaves the first n - 1 ids final: never more iterations than ids, and one to read the last.
            return changed & (iteration <= count)

        def iterate(carry: tuple) -> tuple:
            iteration, _, ids, _, cache = carry
            x = jnp.concatenate([slot, embed(ids, 1)], axis=1)
            hidden, cache = self._pass(model, cache, x, start, keys)
            chosen = choose(self._frame_logits(model, hidden[:, :-1]), folded_keys, self.sampling)
            return iteration + 1, jnp.any(chosen != ids), chosen, hidden[:, -1], cache

        first = (jnp.int32(0), jnp.bool_(True), guess, jnp.zeros_like(slot[:, 0]), cache)
        _, _, ids, last, cache = jax.lax.while_loop(unfinished, iterate, first)
        return ids, last, cache

    def _pass(
        self,
        model: FrameTransformer,
        cache: Cache,
        x: Float[Array, "R T C"],
        start: Int[Array, ""] | int,
        keys: Key[Array, "R"],
    ) -> tuple[Float[Array, "R T C"], Cache]:
        """Hidden states of T tokens that follow on the first `start` generated ones, and the cache with them in it."""
        keys = folded(keys, start) if self.dropout else None
        layers = tuple(
            _Layer(*kept, start, self._dropped(keys, layer))
            for layer, kept in enumerate(zip(cache.prompt, cache.generated, strict=True))
        )
        positions = self.layout.prompt_length + start + jnp.arange(x.shape[1])
        hidden, layers = model.decode(x, positions, layers)
        return hidden, Cache(cache.prompt, tuple(layer.generated for layer in layers))

    def _dropped(self, keys: Key[Array, "R"] | None, layer: int) -> "_Dropped | None":
        if not self.dropout or keys is None:
            return None
        return _Dropped(folded(keys, _DROPOUT + layer), self.config.attention_dropout)

    def _frame_logits(self, model: FrameTransformer, hidden: Float[Array, "*R C"]) -> Float[Array, "*R V"]:
        """Scores of the ids within a frame; with `future_codes_only` -inf for ids that a future frame cannot hold."""
        logits = model.logits(hidden)
        if not self.sampling.future_codes_only:
            return logits
        ids, first = jnp.arange(logits.shape[-1]), self.layout.context_codes
        return jnp.where((ids >= first) & (ids < first + self.layout.future_codes), logits, -jnp.inf)


class _Dropped(NamedTuple):
    """Dropout of one layer's attention weights: a key per sequence, and the rate."""

    keys: jax.Array
    rate: float


class _Prompt(NamedTuple):
    """The cache of one layer while prompts are read: empty before, `kept` after."""

    kept: KeyValue | None = None
    dropped: _Dropped | None = None

    def attend(
        self, query: Float[Array, "B P N D"], key: Float[Array, "B P N D"], value: Float[Array, "B P N D"]
    ) -> tuple[Float[Array, "B P N D"], "_Prompt"]:
        kept = KeyValue(*(rearrange(array, "b p n d -> b n p d") for array in (key, value)))
        if self.dropped is not None:
            return attention_with_dropout(query, key, value, *self.dropped, causal=True), _Prompt(kept)
        return attention(query, key, value, causal=True), _Prompt(kept)


class _Layer(NamedTuple):
    """The cache of one layer while frames are decoded, with `start` generated tokens in it."""

    prompt: KeyValue
    generated: KeyValue
    start: Int[Array, ""] | int
    dropped: _Dropped | None = None

    def attend(
        self, query: Float[Array, "R T N D"], key: Float[Array, "R T N D"], value: Float[Array, "R T N D"]
    ) -> tuple[Float[Array, "R T N D"], "_Layer"]:
        generated = KeyValue(
            *(
                jax.lax.dynamic_update_slice(old, rearrange(new, "r t n d -> r n t d"), (0, 0, self.start, 0))
                for old, new in zip(self.generated, (key, value), strict=True)
            )
        )
        length, tokens = generated.key.shape[2], query.shape[1]
        visible = jnp.arange(length) <= (self.start + jnp.arange(tokens))[:, None]
        mixed = _attend(query, self.prompt, generated, visible, self.dropped)
        return mixed, self._replace(generated=generated)


def _attend(
    query: Float[Array, "R T N D"],
    prompt: KeyValue,
    generated: KeyValue,
    visible: Bool[Array, "T G"],
    dropped: _Dropped | None,
) -> Float[Array, "R T N D"]:
    """Attention over prompts that several rows share and over the visible tokens that each row generated."""
    batch, count = prompt.key.shape[0], query.shape[1]
    query = query * query.shape[-1] ** -0.5
    # All samples of a prompt read it in one matrix product.
    shared = rearrange(query, "(b s) t n d -> b n (s t) d", b=batch)
    product = functools.partial(jnp.einsum, precision=product_precision(query.dtype))
    to_prompt = product("bnqd,bnpd->bnqp", shared, prompt.key, preferred_element_type=jnp.float32)
    to_prompt = rearrange(to_prompt, "b n (s t) p -> (b s) n t p", t=count)
    to_generated = product("rtnd,rngd->rntg", query, generated.key, preferred_element_type=jnp.float32)
    scores = jnp.concatenate([to_prompt, jnp.where(visible, to_generated, -jnp.inf)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = (weights if dropped is None else dropout(weights, *dropped)).astype(query.dtype)
    of_prompt, of_generated = jnp.split(weights, [prompt.key.shape[2]], axis=-1)
    of_prompt = rearrange(of_prompt, "(b s) n t p -> b n (s t) p", b=batch)
    mixed = product("bnqp,bnpd->bnqd", of_prompt, prompt.value)
    mixed = rearrange(mixed, "b n (s t) d -> (b s) t n d", t=count)
    return mixed + product("rntg,rngd->rtnd", of_generated, generated.value)
