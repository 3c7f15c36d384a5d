"""The next id from scores: greedy, or sampled with temperature, top-k and top-p."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jvgen.config import Config
from jvgen.value_rules import Bounds, CountOrZero

# In place of an id that no finite scores chose.
NO_ID = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How ids are chosen. The released models draw from the 100 most likely ids at temperature 1.

    Attributes:
      greedy: always the most likely id.
      temperature: scores are divided by it.
      top_k: keep this many of the most likely ids; 0 for all.
      top_p: of these keep the most likely ones whose probabilities sum to at least this (Holtzman et al. 2020).
      future_codes_only: exclude ids that are no code of a future frame, inside frames. The released models may choose
        any id, and clamp it to the first or the last code.
      parallel: Jacobi decoding: all ids of a frame are guessed and corrected until none changes: the same ids in fewer
        passes of more tokens (see `jvgen.models.ivideogpt.decoding`). For few sequences at a time.
    """

    greedy: bool = False
    temperature: Annotated[float, Bounds(above=0, at_most=1000, fix="for the most likely ids set greedy")] = 1.0
    top_k: CountOrZero = 100
    top_p: Annotated[float, Bounds(above=0, at_most=1, fix="1 keeps all")] = 1.0
    future_codes_only: bool = False
    parallel: bool = False


def choose(logits: Float[Array, "*R V"], keys: Key[Array, "*R"], sampling: SamplingConfig) -> Int[Array, "*R"]:
    """One id per row of scores, int32, sampled with the row's own key; `NO_ID` for a row with NaN or infinity.

    Sampling is the argmax of scores plus Gumbel noise: with equal keys the same id is chosen however rows are batched.
    """
    # The maximum keeps NaN; scores of -inf are excluded ids.
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), _choose(logits, keys, sampling), NO_ID)


def _choose(logits: Float[Array, "*R V"], keys: Key[Array, "*R"], sampling: SamplingConfig) -> Int[Array, "*R"]:
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores, ids = candidates(logits, sampling)
    noise = jnp.vectorize(lambda key: jax.random.gumbel(key, scores.shape[-1:]), signature="()->(k)")(keys)
    best = jnp.argmax(scores + noise, axis=-1)
    if ids is None:
        return best.astype(jnp.int32)
    return jnp.take_along_axis(ids, best[..., None], axis=-1)[..., 0].astype(jnp.int32)


def candidates(
    logits: Float[Array, "*R V"], sampling: SamplingConfig
) -> tuple[Float[Array, "*R K"], Int[Array, "*R K"] | None]:
    """Scores over temperature of the ids that may be sampled, -inf for those that may not, and the ids.

    In descending order with a `top_k` or `top_p`; otherwise all scores in the order of ids, and None.
    """
    scores = logits.astype(jnp.float32) / sampling.temperature
    count = logits.shape[-1]
    if sampling.top_p >= 1 and not 0 < sampling.top_k < count:
        return scores, None
    scores, ids = jax.lax.top_k(scores, min(sampling.top_k or count, count))
    if sampling.top_p < 1:
        shares = jax.nn.softmax(scores, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        scores = jnp.where(before < sampling.top_p, scores, -jnp.inf)
    return scores, ids
