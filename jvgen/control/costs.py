"""What a plan is judged by: distance of predicted frames from a goal image, predicted rewards, or a user's function."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jvgen.control.world_model import as_floats
from jvgen.losses.perceptual import LPIPS, laplacian_distance, load_lpips
from jvgen.nn.network import Network
from jvgen.storage import Path

# The predicted frames that a cost looks at: others need not be decoded or rendered.
FramesSeen = Literal["all", "last", "none"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of predictions; lower is better.

    Attributes:
      name: for messages and reports.
      function: (weights, frames `R F H W C` in [0, 1], rewards `R F` or None, actions `R F A`) -> cost `R`, float32.
        It is given the frames of `frames`: `R 1 H W C` with "last", None with "none". Costs of one function, with a
        goal in `weights`, are exchanged without compiling again (`Planner.toward`).
      weights: arrays that the function takes.
      needs_rewards: the model has to predict rewards.
      frames: which predicted frames the function looks at; models spare themselves the others.
    """

    name: str
    function: Callable[[Any, jax.Array, jax.Array | None, jax.Array], jax.Array]
    weights: Any = ()
    needs_rewards: bool = False
    frames: FramesSeen = "all"

    def __call__(
        self,
        weights: Any,
        frames: Float[Array, "R D H W C"] | None,
        rewards: Float[Array, "R F"] | None,
        actions: Float[Array, "R F A"],
    ) -> Float[Array, "R"]:
        """Cost per candidate, from all predicted frames, or those of `self.frames` alone.

        Raises:
          ValueError: it needs rewards and there are none.
        """
        if self.needs_rewards and rewards is None:
            raise ValueError(
                f"cost {self.name!r} needs predicted rewards, but this model predicts none: train it with "
                "task.transformer.reward = true, or plan toward a goal image."
            )
        frames = {"all": frames, "last": None if frames is None else frames[:, -1:], "none": None}[self.frames]
        return self.function(weights, frames, rewards, actions)


def pixel_goal(goal: Any, *, last_only: bool = False) -> Cost:
    """Squared distance to a goal image, summed over pixels and all predicted frames (VP2), or the last frame only.

    Args:
      goal: `H W C`, uint8 or floats in [0, 1].
      last_only: judge the end of the plan, not the way to it.

    Raises:
      ValueError: not an image of these kinds.
    """
    return _goal_cost("pixel goal", _squared_distance, as_goal(goal), last_only)


def _squared_distance(goal: Any, frames: jax.Array, rewards: Any, actions: Any) -> jax.Array:
    return jnp.sum(jnp.square(frames - goal), axis=(1, 2, 3, 4))


def perceptual_goal(goal: Any, *, lpips: str | Path | None = None, last_only: bool = False) -> Cost:
    """Perceptual distance to a goal image, summed over predicted frames, or of the last frame only.

    Args:
      goal: `H W 3`, uint8 or floats in [0, 1].
      lpips: file of LPIPS weights (`jvgen lpips` writes it); None for the Laplacian pyramid, which needs no weights.
      last_only: judge the end of the plan, not the way to it.

    Raises:
      ValueError: no image, or a file without LPIPS weights.
    """
    name = "laplacian goal" if lpips is None else "lpips goal"
    weights = () if lpips is None else load_lpips(lpips)
    return _goal_cost(name, _perceptual_distance(lpips is not None), (weights, as_goal(goal)), last_only)


@functools.cache
def _perceptual_distance(by_lpips: bool) -> Callable[..., jax.Array]:
    """The function of `perceptual_goal`, the same at every call: see `Cost.function`."""
    network = Network.of(lambda rngs: LPIPS(rngs=rngs)) if by_lpips else None

    def function(both: tuple[Any, jax.Array], frames: jax.Array, rewards: Any, actions: Any) -> jax.Array:
        weights, goal = both
        images = 2 * rearrange(frames, "r f h w c -> (r f) h w c") - 1
        goals = jnp.broadcast_to(2 * goal - 1, images.shape)
        distances = laplacian_distance(images, goals) if network is None else network.bind(weights)(images, goals)
        return jnp.sum(rearrange(distances, "(r f) -> r f", f=frames.shape[1]), axis=1)

    return function


def _goal_cost(name: str, function: Callable[..., jax.Array], weights: Any, last_only: bool) -> Cost:
    return Cost(f"{name}, last frame", function, weights, frames="last") if last_only else Cost(name, function, weights)


def predicted_reward(discount: float = 1.0) -> Cost:
    """Minus the discounted sum of predicted rewards.

    Raises:
      ValueError: a discount outside of (0, 1].
    """
    if not 0 < discount <= 1:
        raise ValueError(f"discount = {discount}: must be in (0, 1].")

    return Cost("predicted reward", _discounted(float(discount)), needs_rewards=True, frames="none")


@functools.cache
def _discounted(discount: float) -> Callable[..., jax.Array]:
    def function(_: Any, frames: Any, rewards: jax.Array, actions: Any) -> jax.Array:
        return -jnp.sum(rewards * np.float32(discount) ** np.arange(rewards.shape[1], dtype=np.float32), axis=1)

    return function


def weighted(parts: Sequence[tuple[float, Cost]]) -> Cost:
    """A weighted sum of costs (VP2's RoboDesk costs are 0.5 x pixels and 10 x a classifier).

    Raises:
      ValueError: no parts.
    """
    if not parts:
        raise ValueError("weighted: give at least one (weight, cost) pair.")

    name = " + ".join(f"{factor:g} {cost.name}" for factor, cost in parts)
    costs = [cost for _, cost in parts]
    seen = {cost.frames for cost in costs}
    return Cost(
        name,
        _weighted_sum(tuple((float(factor), dataclasses.replace(cost, weights=())) for factor, cost in parts)),
        tuple(cost.weights for cost in costs),
        needs_rewards=any(cost.needs_rewards for cost in costs),
        frames=next(frames for frames in get_args(FramesSeen) if frames in seen),
    )


@functools.lru_cache(maxsize=8)
def _weighted_sum(parts: tuple[tuple[float, Cost], ...]) -> Callable[..., jax.Array]:
    """The function of `weighted`, the same for costs that differ in their weights alone."""

    def function(weights: Any, frames: Any, rewards: Any, actions: Any) -> jax.Array:
        return sum(
            factor * cost(own, frames, rewards, actions) for (factor, cost), own in zip(parts, weights, strict=True)
        )

    return function


def as_goal(goal: Any) -> Float[Array, "H W C"]:
    """A goal image as floats in [0, 1].

    Raises:
      ValueError: another shape, dtype or range.
    """
    if np.ndim(goal) != 3 or np.shape(goal)[-1] not in (1, 3):
        raise ValueError(f"goal {np.shape(goal)}: expected one image, (height, width, channels).")
    return as_floats(goal)
