"""Choose actions by sampling: candidates are drawn around a plan, a model predicts them, the plan moves to the best.

MPPI (Williams et al. 2017) weighs all candidates by their costs, CEM (Rubinstein and Kroese 2004) fits the plan to the
best few. Both in the form of VP2 (Tian et al. 2023, arXiv 2304.13723), which planned in iVideoGPT.
"""

import copy
import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jvgen.config import Config
from jvgen.control.costs import Cost, FramesSeen
from jvgen.finite import NotFinite
from jvgen.precision import product_precision
from jvgen.value_rules import Bounds, Count, Frames, Weight

# Purposes of keys: fold_in(key of the plan, purpose).
_NOISE, _MODEL = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerConfig(Config):
    """How a plan is searched. The defaults are those with which VP2 planned in iVideoGPT (MPPI).

    Attributes:
      method: "mppi" or "cem".
      samples: candidates per iteration.
      iterations: rounds of drawing, predicting and refining.
      horizon: actions of a plan.
      gamma: of MPPI: candidates weigh exp(gamma (lowest cost - cost)), so it is per unit of the cost.
      elites: of CEM: fraction of the candidates that the plan is fitted to.
      standard_deviation: of the noise, per component of the action, or one number for all.
      minimum_deviation: of CEM: lower bound of the fitted standard deviation.
      correlation: noise at a step is this times that of the step before, plus (1 - this) times fresh noise; that of the
        first step is fresh alone.
      warm_start: a plan starts from the rest of the plan before, its last action repeated; else from zeros.
      result: "mean": the plan is what the last refinement gives; "best": the candidate with the lowest cost so far.
    """

    method: Literal["mppi", "cem"] = "mppi"
    samples: Count = 200
    iterations: Annotated[int, Bounds(at_least=1, at_most=1000)] = 1
    horizon: Frames = 10
    gamma: Annotated[float, Bounds(above=0, fix="larger values favor the best candidates more")] = 0.05
    elites: Annotated[float, Bounds(above=0, at_most=1, fix="a fraction of the candidates")] = 0.05
    standard_deviation: tuple[Weight, ...] = (0.5,)
    minimum_deviation: Weight = 0.0
    correlation: Annotated[float, Bounds(at_least=0, below=1, fix="0 for independent noise")] = 0.5
    warm_start: bool = True
    result: Literal["mean", "best"] = "mean"

    @property
    def elite_count(self) -> int:
        """Candidates that CEM fits the plan to."""
        return max(1, round(self.elites * self.samples))

    def validate(self) -> None:
        if not any(self.standard_deviation):
            raise ValueError(
                f"standard_deviation = {self.standard_deviation}: one number, or one per component of the action, one "
                "of them positive."
            )


def vp2_mppi(**changes: Any) -> PlannerConfig:
    """VP2's MPPI for robosuite's actions: 200 candidates, one iteration, gripper without noise."""
    return PlannerConfig(standard_deviation=(0.5, 0.5, 0.5, 0.0)).replace(**changes)


def vp2_cem(**changes: Any) -> PlannerConfig:
    """VP2's numbers for CEM: 200 candidates, three iterations, the best 5 percent; noise on two components.

    Not all of it is VP2's: there noise is correlated (0.5) and its deviation at most half the distance to a bound, and
    the plan is the last iteration's best candidate, where this is the mean of the best (`result`).
    """
    return PlannerConfig(
        method="cem", iterations=3, elites=0.05, correlation=0.0, standard_deviation=(0.5, 0.5, 0.0, 0.0)
    ).replace(**changes)


class Model(Protocol):
    """Predicts what candidates lead to: a world model, or the true simulator.

    Attributes:
      low, high: bounds of an action, float32 `A`.
      traceable: `predict` can be traced by JAX; then a whole search is one compiled program.
      weights: arrays that `predict` takes, so that a compiled search does not hold them as constants.
    """

    low: np.ndarray
    high: np.ndarray
    traceable: bool
    weights: Any

    def predict(
        self, weights: Any, start: Any, actions: Float[Array, "R F A"], key: Key[Array, ""], frames: FramesSeen = "all"
    ) -> tuple[Float[Array, "R D H W C"] | None, Float[Array, "R F"] | None]:
        """Frames in [0, 1] and rewards (None where they are not known) of candidates that start at `start`.

        Args:
          weights: the attribute.
          start: as `Planner.plan` is given it.
          actions: of the candidates.
          key: random key.
          frames: which frames are looked at: "last": `R 1 H W C` may be returned, "none": None.
        """


class Plan(NamedTuple):
    """What a search found.

    Attributes:
      actions: the plan, `F A`.
      candidates, costs: of the last iteration, `R F A` and `R`.
      lowest: lowest finite cost of each iteration, `I`; infinity where there is none.
      deviation: standard deviation of the noise after the last refinement, `F A`.
    """

    actions: jax.Array
    candidates: jax.Array
    costs: jax.Array
    lowest: jax.Array
    deviation: jax.Array


def draw(
    config: PlannerConfig,
    mean: Float[Array, "F A"],
    deviation: Float[Array, "F A"],
    low: Float[Array, "A"],
    high: Float[Array, "A"],
    key: Key[Array, ""],
) -> Float[Array, "R F A"]:
    """Candidates around a plan, clipped to the bounds. Noise is correlated along the steps (VP2's `beta`).

    The first step, whose action is the one that is taken, has the whole standard deviation (VP2's released sampler).
    """
    fresh = jax.random.normal(key, (config.samples, *mean.shape)) * deviation
    correlation = config.correlation

    def step(before: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = correlation * before + (1 - correlation) * now
        return noise, noise

    _, noise = jax.lax.scan(step, fresh[:, 0], jnp.swapaxes(fresh, 0, 1))
    return jnp.clip(mean + jnp.swapaxes(noise, 0, 1), low, high)


def mppi_weights(costs: Float[Array, "R"], gamma: float) -> Float[Array, "R"]:
    """Weights of candidates, exp(-gamma (cost - lowest cost)), normalized to a sum of 1."""
    return jax.nn.softmax(-gamma * (costs - jnp.min(costs)))


def refine(
    config: PlannerConfig,
    candidates: Float[Array, "R F A"],
    costs: Float[Array, "R"],
    deviation: Float[Array, "F A"],
) -> tuple[Float[Array, "F A"], Float[Array, "F A"]]:
    """The plan and the standard deviation of the noise that the candidates' costs lead to.

    Candidates whose cost is not finite take no part; if none is finite, the result is NaN.
    """
    costs = jnp.where(jnp.isfinite(costs), costs, jnp.inf)
    average = functools.partial(jnp.einsum, "r,rfa->fa", precision=product_precision(candidates.dtype))
    if config.method == "mppi":
        return average(mppi_weights(costs, config.gamma), candidates), deviation
    order = jnp.argsort(costs)[: config.elite_count]
    finite = jnp.isfinite(costs[order]).astype(jnp.float32)
    share = finite / jnp.sum(finite)
    mean = average(share, candidates[order])
    variance = average(share, jnp.square(candidates[order] - mean))
    return mean, jnp.maximum(jnp.sqrt(variance), config.minimum_deviation)


class Planner:
    """Searches plans with one model and one cost.

    Args:
      model: predicts candidates.
      cost: scores predictions; lower is better.
      config: of the search.

    Raises:
      ValueError: as many standard deviations as fit neither all components of the action nor one.
    """

    def __init__(self, model: Model, cost: Cost, config: PlannerConfig | None = None):
        self.model, self.cost, self.config = model, cost, config or PlannerConfig()
        self.config.validate()
        width, deviations = len(model.low), self.config.standard_deviation
        if len(deviations) not in (1, width):
            raise ValueError(
                f"standard_deviation = {deviations}: {len(deviations)} numbers for actions of {width} components; give "
                "one, or one per component."
            )
        self.shape = (self.config.horizon, width)
        self._search = jax.jit(self._iterations) if model.traceable else self._iterations
        self._predict = jax.jit(model.predict) if model.traceable else model.predict

    def plan(self, start: Any, key: Key[Array, ""] | int = 0, before: Plan | None = None) -> Plan:
        """Search a plan.

        Args:
          start: where candidates start, as the model takes it.
          key: random key of this plan, or a seed.
          before: the plan of the step before, of which the first action was taken, for a warm start.

        Raises:
          NotFinite: the cost of no candidate is finite.
        """
        key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
        mean = jnp.zeros(self.shape)
        if before is not None and self.config.warm_start:
            mean = jnp.concatenate([before.actions[1:], before.actions[-1:]])
        mean = jnp.clip(mean, self.model.low, self.model.high)
        plan = self._search((self.model.weights, self.cost.weights), start, mean, key)
        if not np.isfinite(plan.costs).any():
            raise NotFinite(
                f"cost {self.cost.name!r}: no finite number for any of {self.config.samples} candidates; the model "
                "predicts NaN or infinity, or the cost computes it."
            )
        return plan

    def toward(self, cost: Cost) -> Self:
        """This planner with another cost of the same kind (another goal).

        Nothing is compiled again where only `Cost.weights` differ; a cost with a function of its own is compiled anew.

        Raises:
          ValueError: a cost of another name.
        """
        if cost.name != self.cost.name:
            raise ValueError(f"cost {cost.name!r}: this planner was made for {self.cost.name!r}; make another planner.")
        if (cost.function, cost.frames, cost.needs_rewards) != (
            self.cost.function, self.cost.frames, self.cost.needs_rewards
        ):  # fmt: skip
            # The compiled search would go on with the function that it was made of, and with the goal inside it.
            return type(self)(self.model, cost, self.config)
        other = copy.copy(self)
        other.cost = cost
        return other

    def predict(self, start: Any, actions: Float[Array, "R F A"], key: Key[Array, ""] | int = 0) -> Any:
        """What the model predicts for given candidates: frames and rewards, as `Model.predict`."""
        key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
        return self._predict(self.model.weights, start, actions, jax.random.fold_in(key, _MODEL))

    def _iterations(self, weights: tuple[Any, Any], start: Any, mean: jax.Array, key: jax.Array) -> Plan:
        config, model = self.config, self.model
        deviation = jnp.broadcast_to(jnp.asarray(config.standard_deviation, jnp.float32), self.shape)
        low, high = jnp.asarray(model.low), jnp.asarray(model.high)
        # Candidates are compared under the same draws of the model in every iteration.
        model_key = jax.random.fold_in(key, _MODEL)

        def iterate(carry: tuple, number: Any) -> tuple[tuple, jax.Array]:
            mean, deviation, best, best_cost, *_ = carry
            noise_key = jax.random.fold_in(jax.random.fold_in(key, _NOISE), number)
            candidates = draw(config, mean, deviation, low, high, noise_key)
            frames, rewards = model.predict(weights[0], start, candidates, model_key, self.cost.frames)
            costs = self.cost(weights[1], frames, rewards, candidates)
            mean, deviation = refine(config, candidates, costs, deviation)
            # As in `refine`: also minus infinity, of a reward that overflows, is no cost.
            finite = jnp.where(jnp.isfinite(costs), costs, jnp.inf)
            first = jnp.argmin(finite)
            better = finite[first] < best_cost
            best = jnp.where(better, candidates[first], best)
            best_cost = jnp.where(better, finite[first], best_cost)
            return (mean, deviation, best, best_cost, candidates, costs), finite[first]

        candidates, costs = jnp.zeros((config.samples, *self.shape)), jnp.zeros(config.samples)
        carry, numbers = (mean, deviation, mean, jnp.float32(jnp.inf), candidates, costs), range(config.iterations)
        if model.traceable:
            # One copy of the model in the program, however many iterations: it is most of what is compiled.
            carry, lowest = jax.lax.scan(iterate, carry, jnp.arange(config.iterations))
        else:
            lowest = np.zeros(config.iterations, np.float32)
            for number in numbers:
                carry, lowest[number] = iterate(carry, number)
        mean, deviation, best, _, candidates, costs = carry
        actions = mean if config.result == "mean" else best
        return Plan(actions, candidates, costs, jnp.asarray(lowest), deviation)
