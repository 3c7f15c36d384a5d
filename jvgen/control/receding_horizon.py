"""Model-predictive control: plan, take the first action, look, plan again (VP2, arXiv 2304.13723)."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jvgen.control.planning import Plan, Planner
from jvgen.control.world_model import to_pixels
from jvgen.finite import NotFinite


class Environment(Protocol):
    """What is controlled: `gymnasium.Env`, with frames `H W C` uint8 as observations."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """The first frame."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The next frame, reward, terminated, truncated, info."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of an environment.

    Attributes:
      frames: what was seen, uint8 `S+1 H W C`.
      actions, rewards: of the S steps, float32 `S A` and `S`.
      success: `info["success"]` was true at some step.
      predicted: the frame that the plan of each step expected next, uint8 `S H W C`; None without a planner.
      costs: the lowest cost of each plan's candidates, `S`; None without a planner.
      first: the plan of the first step; None without a planner.
      seconds: time spent in planning per plan after the first, which compiles; NaN with fewer than two plans.
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    success: bool
    predicted: np.ndarray | None = None
    costs: np.ndarray | None = None
    first: Plan | None = None
    seconds: float = float("nan")


# From the last frames, newest last, and the number of the step: the action, the frame it should lead to, and the plan.
Policy = Callable[[list[np.ndarray], int], tuple[np.ndarray, np.ndarray | None, Plan | None]]


class PlannedPolicy:
    """Takes the first action of a new plan at every step.

    Args:
      planner: searches.
      context_frames: frames that a plan starts from; an episode's first frame stands in for those before it.
      goal: a goal-conditioned world's goal image, uint8 `H W C`, first in every context.
      key: random key of the episode, or a seed.
      expected: also predict the frame that the first action should lead to: one more rollout per step.

    Attributes:
      first_start: the frames that the first plan of the episode started from, uint8 `T H W C`.
    """

    def __init__(
        self,
        planner: Planner,
        context_frames: int,
        *,
        goal: np.ndarray | None = None,
        key: Any = 0,
        expected: bool = True,
    ):
        self.planner, self.goal, self.expected = planner, goal, expected
        self.frames = context_frames - (goal is not None)
        self.key = jax.random.key(key) if isinstance(key, (int, np.integer)) else key
        self.first_start: np.ndarray | None = None
        self._before: Plan | None = None

    def __call__(self, frames: list[np.ndarray], number: int) -> tuple[np.ndarray, np.ndarray | None, Plan]:
        """The action, the expected frame, and the plan of step `number`; step 0 starts a new episode."""
        if number == 0:
            self._before = None
        seen = [frames[0]] * max(0, self.frames - len(frames)) + frames[-self.frames :]
        start = np.stack([*([] if self.goal is None else [self.goal]), *seen])
        if number == 0:
            self.first_start = start
        key = jax.random.fold_in(self.key, number)
        self._before = plan = self.planner.plan(start, key, self._before)
        expected = None
        if self.expected:
            expected = to_pixels(self.planner.predict(start, plan.actions[None, :1], key)[0][0, 0])
        return np.asarray(plan.actions[0]), expected, plan


class RandomPolicy:
    """Uniform actions within bounds: what a plan has to beat."""

    def __init__(self, low: np.ndarray, high: np.ndarray, seed: int = 0):
        self.low, self.high, self.seed = low, high, seed

    def __call__(self, frames: list[np.ndarray], number: int) -> tuple[np.ndarray, None, None]:
        """An action that depends on the seed and the number of the step alone."""
        rng = np.random.default_rng((self.seed, number))
        return rng.uniform(self.low, self.high).astype(np.float32), None, None


def run_episode(
    environment: Environment,
    policy: Policy,
    steps: int,
    *,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    show: Callable[[int, np.ndarray], None] | None = None,
) -> Episode:
    """Control one episode, until it ends or for a number of steps. An episode goes on after success.

    Args:
      environment: is reset with `seed` and `options` first.
      policy: chooses actions.
      steps: at most this many.
      show: called with the number of the step and the frame after it.

    Raises:
      ValueError: no steps; frames that are no uint8 images.
      NotFinite: a reward that is NaN or infinite.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1.")
    frame, _ = environment.reset(seed=seed, options=options)
    frames, actions, rewards, predicted, costs = [_checked(frame)], [], [], [], []
    first, success, seconds = None, False, []
    for number in range(steps):
        began = time.perf_counter()
        action, expected, plan = policy(frames, number)
        seconds.append(time.perf_counter() - began)
        frame, reward, terminated, truncated, info = environment.step(action)
        if not np.isfinite(reward):
            raise NotFinite(f"step {number}: the environment gave a reward of {reward} for action {action}.")
        frames.append(_checked(frame))
        actions.append(action)
        rewards.append(reward)
        success |= bool(info.get("success", False))
        if plan is not None:
            first = plan if first is None else first
            costs.append(float(plan.lowest[-1]))
        if expected is not None:
            predicted.append(expected)
        if show is not None:
            show(number, frames[-1])
        if terminated or truncated:
            break
    return Episode(
        frames=np.stack(frames),
        actions=np.stack(actions).astype(np.float32),
        rewards=np.asarray(rewards, np.float32),
        success=success,
        predicted=np.stack(predicted) if predicted else None,
        costs=np.asarray(costs, np.float32) if costs else None,
        first=first,
        seconds=float(np.median(seconds[1:])) if plan is not None and len(seconds) > 1 else float("nan"),
    )


def _checked(frame: Any) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        raise ValueError(
            f"the environment's observation is {frame.dtype} {frame.shape}: expected a uint8 image (height, width, "
            "channels); wrap it so that it gives rendered frames."
        )
    return frame
