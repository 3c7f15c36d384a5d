"""Episodes of environments in processes: what they do, and what becomes of those that fail."""

import functools
import os
import time

import numpy as np
import pytest

from jvgen.control.collection import (
    Collector,
    SteppedEnvironment,
    TooManyEnvironmentFailures,
    describe_environment,
)


class Counting:
    """Frames count steps; fails in one of several ways at its third step, once if it can remember that it did."""

    def __init__(self, fault: str = "", mark: str = ""):
        self.fault, self.mark = fault, mark

    def reset(self, *, seed=None):
        self.seed, self.number = seed, 0
        return self._frame(), {}

    def step(self, action):
        self.number += 1
        reward = float(action[0])
        if self.number == 3 and self.fault and not (self.mark and os.path.exists(self.mark)):
            if self.mark:
                with open(self.mark, "w"):
                    pass
            if self.fault == "dies":
                os._exit(7)
            if self.fault == "hangs":
                time.sleep(60)
            if self.fault == "os error":
                raise FileNotFoundError("a mesh is missing")
            if self.fault == "raises":
                raise ArithmeticError("the simulation is unstable")
            if self.fault == "nan":
                reward = float("nan")
            if self.fault == "frame":
                return np.zeros(3), 0.0, False, False, {}
        ends = self.number == 3 + self.seed
        return self._frame(), reward, ends and self.seed == 1, ends, {"success": self.number == 2}

    def _frame(self):
        return np.full((2, 2, 1), 10 * self.seed + self.number, np.uint8)


def policy(frames: np.ndarray, number: int) -> np.ndarray:
    assert frames.shape[1:] == (2, 2, 3)
    # The stack tells what was seen: newest, and the one before.
    return np.stack([frames[:, 0, 0, -1], frames[:, 0, 0, -2]], axis=1).astype(np.float32)


def expected(seed: int) -> dict[str, list]:
    steps = 3 + seed
    newest = [10 * seed + number for number in range(steps)]
    return {
        "frames": [10 * seed + number for number in range(steps + 1)],
        "actions": list(zip(newest, [newest[0], *newest[:-1]], strict=True)),
        "discounts": [1.0] * (steps - 1) + [0.0 if seed == 1 else 1.0],
    }


def check(episode, seed: int) -> None:
    wanted = expected(seed)
    assert episode.frames[:, 0, 0, 0].tolist() == wanted["frames"]
    assert [tuple(action) for action in episode.actions.tolist()] == wanted["actions"]
    assert episode.discounts.tolist() == wanted["discounts"] and episode.success
    assert episode.rewards.tolist() == [action[0] for action in wanted["actions"]]


def test_episodes_of_several_processes() -> None:
    with Collector(Counting, 2) as collector:
        episodes = collector.collect(policy, [0, 1, 2])
    for seed, episode in enumerate(episodes):
        check(episode, seed)
    assert collector.failures == 0


@pytest.mark.parametrize("fault", ["dies", "hangs", "raises", "nan", "frame"])
def test_an_environment_that_fails_once_restarts_its_episode(fault, tmp_path) -> None:
    make = functools.partial(Counting, fault, str(tmp_path / "failed"))
    with Collector(make, 1, timeout=8.0 if fault == "hangs" else 60.0) as collector:
        (episode,) = collector.collect(policy, [1])
    check(episode, 1)
    assert episode.failures == collector.failures == 1


def test_past_the_budget_collection_stops() -> None:
    collector = Collector(functools.partial(Counting, "raises"), failure_budget=1)
    with pytest.raises(TooManyEnvironmentFailures, match="(?s)2 failures .* seed 4.*the simulation is unstable"):
        collector.collect(policy, [4])
    collector = Collector(functools.partial(Counting, "os error"), failure_budget=0)
    with pytest.raises(TooManyEnvironmentFailures, match="(?s)FileNotFoundError: a mesh is missing"):
        collector.collect(policy, [4])
    with pytest.raises(ValueError, match="count = 0"):
        Collector(Counting, 0)


class Endless(Counting):
    """Never ends by itself, and is wrapped."""

    unwrapped = type("Inner", (), {"action_repeat": 4})()

    def step(self, action):
        frame, reward, _, _, info = super().step(action)
        return frame, reward, False, False, info

    action_space = None


def test_episodes_end_after_the_steps_that_are_asked_for() -> None:
    """Environments of one's own are opened without a number of steps; the end is a truncation."""
    with Collector(Endless, 1, steps=2) as collector:
        (episode,) = collector.collect(policy, [4])
    assert len(episode.actions) == 2 and episode.discounts.tolist() == [1.0, 1.0]
    with SteppedEnvironment(Counting, stack=2, steps=4) as environment:
        environment.begin(1)
        made = [environment.step(np.float32([0, 0])) for _ in range(4)]
        # The environment ends it for good at the same step.
        assert made[:3] == [None] * 3 and made[3].discounts.tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="steps = 0"):
        Collector(Counting, 1, steps=0)


def test_a_wrapped_environment_says_how_often_it_repeats_an_action() -> None:
    assert describe_environment(Endless).action_repeat == 4
