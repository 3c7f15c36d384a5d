"""Sampling any number of views with a pairwise network (Kuang et al. 2024, CVD, section 4.3 and algorithm 1).

At each step the views are paired, the network denoises every view with its partner, and each view's predictions are
averaged over several pairings. A step may be repeated: its result is noised back to the noise level of its start, so
that information from one partner reaches the others. Partners are an array: one compiled program for every pairing.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jvgen.config import Config
from jvgen.diffusion.guidance import Denoise, GuidanceConfig
from jvgen.diffusion.objective import slot_normal
from jvgen.diffusion.sampler import (
    SamplerConfig,
    Trajectory,
    advance,
    coefficients,
    grid,
    run_steps,
    step_noise,
    table_rows,
)
from jvgen.diffusion.schedule import Prediction, Schedule
from jvgen.value_rules import Count

# Purposes folded into the sampler's key; numbers keep their meaning across versions.
MATCHING_KEY = 0
RENOISE_KEY = 1
STEP_KEY = 2
NETWORK_KEY = 3

# (noisy `R ...`, timesteps `R`, guidance scale, partner `V`, key of this evaluation) -> prediction `R ...`.
PairDenoise = Callable[[Array, Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairingConfig(Config):
    """How views are paired.

    Attributes:
      kind: "matching" (random pairs, redrawn at every evaluation) or "exhaustive" (all pairs).
      matchings: number of random matchings whose predictions are averaged; ignored by "exhaustive".
      repeats: number of times that each sampler step but the last runs, with renoising in between.
    """

    kind: Literal["matching", "exhaustive"] = "matching"
    matchings: Count = 1
    repeats: Count = 1

    def rounds(self, views: int) -> int:
        """Evaluations of the network per sampler step and repeat."""
        return len(exhaustive(views).partner) if self.kind == "exhaustive" else self.matchings

    def evaluations(self, views: int, steps: int) -> int:
        """Evaluations of the network per sample: the last step runs once."""
        return ((steps - 1) * self.repeats + 1) * self.rounds(views)


class Rounds(NamedTuple):
    """Q pairings of the views.

    Attributes:
      partner: int32 `Q V`, the view that each view attends to.
      weight: float32 `Q V`, weight of the prediction in the view's average; columns sum to 1.
    """

    partner: Array
    weight: Array


def partners_of(order: Int[Array, "V"]) -> Int[Array, "V"]:
    """Partners when the first half of an order is matched elementwise with the second half.

    With an odd number of views the last view attends to the first, which attends to another: both predictions are still
    those of pairs.
    """
    half = order.shape[0] // 2
    first, second = order[:half], order[half : 2 * half]
    partner = jnp.zeros_like(order).at[first].set(second).at[second].set(first)
    return partner.at[order[-1]].set(order[0]) if order.shape[0] % 2 else partner


def random_matchings(key: Key[Array, ""], views: int, count: int) -> Rounds:
    """`count` independent matchings, each uniform over all matchings."""
    orders = jax.vmap(lambda k: jax.random.permutation(k, views))(jax.random.split(key, count))
    weight = jnp.full((count, views), 1.0 / count, jnp.float32)
    return Rounds(jax.vmap(partners_of)(orders.astype(jnp.int32)), weight)


def exhaustive(views: int) -> Rounds:
    """The fewest rounds that contain every pair once: V - 1 for even V; V for odd V, each with one idle view.

    This is round-robin scheduling by the circle method. An idle view attends to itself with a weight of 0.
    """
    slots = max(views + views % 2, 2)
    rounds, circle = [], list(range(slots))
    for _ in range(slots - 1):
        partner = np.arange(slots)
        for first, second in zip(circle, reversed(circle), strict=True):
            partner[first] = second
        rounds.append(partner)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    partner = np.array(rounds)[:, :views]
    idle = partner >= views
    partner = np.where(idle, np.arange(views), partner).astype(np.int32)
    if views == 1:
        idle = np.zeros_like(idle)
    weight = np.where(idle, 0.0, 1.0) / np.maximum((~idle).sum(axis=0), 1)
    return Rounds(partner, weight.astype(np.float32))


class Repeats(NamedTuple):
    """The sampler's table with its repeats written out, one row per inner step, float64.

    Attributes:
      step: row of the sampler's table.
      keep, fresh: factors of the result and of fresh noise after the step: 1 and 0 at the last of its repeats.
    """

    step: np.ndarray
    keep: np.ndarray
    fresh: np.ndarray


def repeated(sampler: SamplerConfig, schedule: Schedule, repeats: int) -> Repeats:
    """Every step but the last `repeats` times.

    From levels (alpha', sigma') back to (alpha, sigma) by x <- a x + sqrt(sigma^2 - a^2 sigma'^2) noise with
    a = alpha / alpha'. With variance-preserving schedules that is sqrt(r) x + sqrt(1 - r) noise with r the ratio of
    alpha_bar, as released; with rectified flow a = (1 - t) / (1 - t').

    Raises:
      ValueError: repeats of a multistep sampler.
    """
    if repeats > 1 and sampler.kind in ("dpm_solver_sde", "dpm_solver"):
        raise ValueError(f"repeats = {repeats}: {sampler.kind} is a multistep sampler; use ddim or euler.")
    levels = grid(sampler, schedule)
    step = np.repeat(np.arange(sampler.steps), np.append(np.full(sampler.steps - 1, repeats), 1))
    last = np.append(step[1:] != step[:-1], True)
    ratio = levels.alpha / np.maximum(levels.next_alpha, 1e-12)
    noise_scale = np.sqrt(np.maximum(levels.sigma**2 - ratio**2 * levels.next_sigma**2, 0.0))
    return Repeats(step, np.where(last, 1.0, ratio[step]), np.where(last, 0.0, noise_scale[step]))


def sample(
    denoise: PairDenoise,
    noise: Float[Array, "R ..."],
    *,
    views: int,
    schedule: Schedule,
    sampler: SamplerConfig,
    prediction: Prediction,
    pairing: PairingConfig,
    key: Key[Array, ""],
    guidance: GuidanceConfig | None = None,
    slots: Int[Array, "R"] | None = None,
    matchings: Callable[[Array], Rounds] | None = None,
    fresh_noise: Callable[[Array], Array] | None = None,
) -> Float[Array, "R ..."]:
    """Run a sampler over the views of one or more scenes. A pure function, for tracing under `jax.jit`.

    Args:
      denoise: see `PairDenoise`.
      noise: standard normal initial noise, `examples x views` rows, views fastest.
      views: V.
      schedule, sampler, prediction, guidance: see `jvgen.diffusion.sampler.sample`.
      pairing: how views are paired, and how often steps are repeated.
      key: for matchings, noise between repeats, a stochastic sampler, and the network's own random numbers.
      slots: indices of the rows in a larger set, which determine their noise; default 0..R-1.
      matchings: function of the inner step that returns its rounds, in place of random ones.
      fresh_noise: function of the inner step that returns the noise after it, in place of random noise.

    Returns:
      Clean clips, float32.

    Raises:
      ValueError: see `repeated` and `jvgen.diffusion.sampler.coefficients`.
    """
    return trajectory(
        denoise, noise, views=views, schedule=schedule, sampler=sampler, prediction=prediction, pairing=pairing,
        key=key, guidance=guidance, slots=slots, matchings=matchings, fresh_noise=fresh_noise,
    ).result  # fmt: skip


def trajectory(
    denoise: PairDenoise,
    noise: Float[Array, "R ..."],
    *,
    views: int,
    schedule: Schedule,
    sampler: SamplerConfig,
    prediction: Prediction,
    pairing: PairingConfig,
    key: Key[Array, ""],
    guidance: GuidanceConfig | None = None,
    slots: Int[Array, "R"] | None = None,
    matchings: Callable[[Array], Rounds] | None = None,
    fresh_noise: Callable[[Array], Array] | None = None,
    keep: bool = False,
) -> Trajectory:
    """As `sample`, with the number of finite inner steps; with `keep` also the input, the clean prediction and the
    output of every inner step."""
    if noise.shape[0] % views:
        raise ValueError(f"{noise.shape[0]} clips are not examples of {views} views; give a multiple.")
    repeats = repeated(sampler, schedule, pairing.repeats)
    rows = {name: column[repeats.step] for name, column in
            table_rows(coefficients(sampler, schedule, prediction, guidance)).items()}  # fmt: skip
    rows |= {name: jnp.asarray(getattr(repeats, name).astype(np.float32)) for name in ("keep", "fresh")}
    rows["inner"] = jnp.arange(len(repeats.step))
    keys = {name: jax.random.fold_in(key, name) for name in (MATCHING_KEY, RENOISE_KEY, STEP_KEY, NETWORK_KEY)}

    def rounds_of(inner: Array) -> Rounds:
        if matchings is not None:
            return matchings(inner)
        if pairing.kind == "exhaustive":
            return Rounds(*(jnp.asarray(part) for part in exhaustive(views)))
        return random_matchings(jax.random.fold_in(keys[MATCHING_KEY], inner), views, pairing.matchings)

    def averaged(row: dict[str, Array]) -> Denoise:
        rounds, network_key = rounds_of(row["inner"]), jax.random.fold_in(keys[NETWORK_KEY], row["inner"])
        count = rounds.partner.shape[0]

        def mean(noisy: Array, timesteps: Array, scale: Array) -> Array:
            def add(total: Array, one: tuple[Array, Array, Array]) -> tuple[Array, None]:
                partner, weight, number = one
                predicted = denoise(noisy, timesteps, scale, partner, jax.random.fold_in(network_key, number))
                share = jnp.tile(weight, noisy.shape[0] // views).reshape(-1, *[1] * (noisy.ndim - 1))
                # With a weight of 0 not even a NaN may enter the sum.
                return total + jnp.where(share > 0, share * predicted.astype(jnp.float32), 0.0), None

            return jax.lax.scan(add, jnp.zeros_like(noisy), (*rounds, jnp.arange(count)), unroll=count == 1)[0]

        return mean

    def step(carry: tuple[Array, Array], row: dict[str, Array]) -> tuple[tuple[Array, Array], tuple | None]:
        noisy, inner = carry[0], row["inner"]
        random = step_noise(keys[STEP_KEY], inner, noise.shape, slots) if sampler.needs_key else None
        advanced, clean = advance(averaged(row), row, *carry, random)
        kept = (noisy, clean, advanced) if keep else None
        if pairing.repeats == 1:
            return (advanced, clean), kept
        fresh = (
            slot_normal(jax.random.fold_in(keys[RENOISE_KEY], inner), noise.shape, slots)
            if fresh_noise is None
            else fresh_noise(inner)
        )
        return (row["keep"] * advanced + row["fresh"] * fresh, clean), kept

    return run_steps(step, noise, rows)
