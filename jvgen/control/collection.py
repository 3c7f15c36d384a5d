"""Episodes of several environments at a time, each in a process of its own, in step with one policy.

A simulator that dies, hangs or returns numbers that are not finite is started again and its episode is restarted;
past a budget of such failures collection stops.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jvgen import exit_codes

# From the last frames of R episodes, stacked along channels, and the number of the step: actions `R A`.
BatchPolicy = Callable[[UInt8[np.ndarray, "R H W C"], int], Float[np.ndarray, "R A"]]


class TooManyEnvironmentFailures(RuntimeError):
    """Environments failed more often than the budget allows."""

    exit_code = exit_codes.ERROR


class _Failed(Exception):
    """One environment failed; the message says how."""


@dataclasses.dataclass(frozen=True)
class CollectedEpisode:
    """One episode.

    Attributes:
      frames: uint8 `S+1 H W C`.
      actions, rewards, discounts: of the S steps, float32; a discount of 0 where the episode ended for good.
      success: `info["success"]` was true at some step.
      failures: how often the environment failed before this episode came to its end.
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    discounts: np.ndarray
    success: bool
    failures: int


class Collector:
    """Environments in processes.

    Args:
      make: returns an environment with frames as observations; picklable, called in each process.
      count: of processes.
      stack: frames per observation of the policy; the first frame of an episode stands in for those before it.
      failure_budget: failures over the life of this object.
      timeout: seconds that a reset or a step may take.

    Raises:
      TooManyEnvironmentFailures: an environment cannot be started.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        count: int = 1,
        *,
        stack: int = 3,
        failure_budget: int = 10,
        timeout: float = 120.0,
    ):
        if count < 1 or stack < 1 or failure_budget < 0 or not timeout > 0:
            raise ValueError(
                f"count = {count}, stack = {stack}, failure_budget = {failure_budget}, timeout = {timeout}: at least "
                "1, 1, 0, and positive."
            )
        self.stack, self.failures, self._budget = stack, 0, failure_budget
        # Not a fork: JAX has threads.
        self._workers = [_Worker(make, multiprocessing.get_context("spawn"), timeout) for _ in range(count)]

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.stop()

    def collect(self, policy: BatchPolicy, seeds: Sequence[int]) -> list[CollectedEpisode]:
        """One episode per seed, as many at a time as there are processes.

        Episode i starts with `reset(seed=seeds[i])`. Rows of the policy's batch are those episodes that still run, in
        the order of seeds.

        Raises:
          TooManyEnvironmentFailures: more failures than the budget.
        """
        episodes: list[CollectedEpisode] = []
        for first in range(0, len(seeds), len(self._workers)):
            episodes += self._together(policy, seeds[first : first + len(self._workers)])
        return episodes

    def _together(self, policy: BatchPolicy, seeds: Sequence[int]) -> list[CollectedEpisode]:
        running = [_Running(worker, seed) for worker, seed in zip(self._workers, seeds, strict=False)]
        for row in running:
            self._attempt(row, row.begin)
        while active := [row for row in running if not row.ended]:
            # Restarted episodes are behind: each is asked with the number of its own step.
            for number in sorted({len(row.actions) for row in active}):
                rows = [row for row in active if len(row.actions) == number and not row.ended]
                actions = np.asarray(
                    policy(np.stack([row.observation(self.stack) for row in rows]), number), np.float32
                )
                for row, action in zip(rows, actions, strict=True):
                    row.worker.send(("step", action))
                for row, action in zip(rows, actions, strict=True):
                    self._attempt(row, lambda row=row, action=action: row.finish(action))
        return [row.episode() for row in running]

    def _attempt(self, row: "_Running", action: Callable[[], None]) -> None:
        """Do something with an environment; where it fails, start it again with its episode."""
        while True:
            try:
                return action()
            except _Failed as error:
                self.failures += 1
                row.failures += 1
                if self.failures > self._budget:
                    self.close()
                    raise TooManyEnvironmentFailures(
                        f"{self.failures} failures of environments, more than failure_budget = {self._budget}; the "
                        f"last one, in the episode of seed {row.seed}: {error}"
                    ) from error
                row.worker.stop()
                action = row.begin


class _Running:
    """An episode under way."""

    def __init__(self, worker: "_Worker", seed: int):
        self.worker, self.seed, self.failures = worker, seed, 0
        self._clear()

    def _clear(self) -> None:
        self.frames: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.discounts: list[float] = []
        self.success = self.ended = False

    def begin(self) -> None:
        self._clear()
        self.worker.send(("reset", int(self.seed)))
        self.frames.append(self.worker.receive())

    def finish(self, action: np.ndarray) -> None:
        frame, reward, terminated, truncated, success = self.worker.receive()
        if not np.isfinite(reward):
            raise _Failed(f"a reward of {reward} at step {len(self.actions)}")
        self.frames.append(frame)
        self.actions.append(action)
        self.rewards.append(reward)
        self.discounts.append(0.0 if terminated else 1.0)
        self.success |= success
        self.ended = terminated or truncated

    def observation(self, stack: int) -> np.ndarray:
        last = self.frames[-stack:]
        return np.concatenate([self.frames[0]] * (stack - len(last)) + last, axis=-1)

    def episode(self) -> CollectedEpisode:
        return CollectedEpisode(
            np.stack(self.frames),
            np.stack(self.actions),
            np.asarray(self.rewards, np.float32),
            np.asarray(self.discounts, np.float32),
            self.success,
            self.failures,
        )


class _Worker:
    """A process with one environment; started when it is first needed."""

    def __init__(self, make: Callable[[], Any], context: Any, timeout: float):
        self._make, self._context, self._timeout = make, context, timeout
        self._process: Any = None
        self._connection: multiprocessing.connection.Connection | None = None

    def send(self, message: tuple[str, Any]) -> None:
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(self._make, theirs), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(message)
        except (BrokenPipeError, OSError):
            pass  # `receive` tells how it ended

    def receive(self) -> Any:
        try:
            if not self._connection.poll(self._timeout):
                raise _Failed(f"no answer within {self._timeout:g} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise _Failed(f"its process ended with {self._process.exitcode}") from error
        if kind == "error":
            raise _Failed(value)
        return value

    def stop(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(make: Callable[[], Any], connection: multiprocessing.connection.Connection) -> None:
    """What a process does: one environment, until its connection closes or the environment raises something."""
    environment = None
    # The connection ends by EOFError where the other process stops this one, or is gone.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            order, value = connection.recv()
            try:
                environment = make() if environment is None else environment
                answer = _answer(environment, order, value)
            except Exception:
                # Whatever a simulator raises is told to the other process, which starts it again or stops.
                connection.send(("error", traceback.format_exc(limit=-3).strip()))
                return
            connection.send(("value", answer))


def _answer(environment: Any, order: str, value: Any) -> Any:
    if order == "reset":
        return _frame(environment.reset(seed=value)[0])
    frame, reward, terminated, truncated, info = environment.step(value)
    return _frame(frame), float(reward), bool(terminated), bool(truncated), bool(info.get("success"))


def _frame(frame: Any) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        raise ValueError(f"the observation is {frame.dtype} {frame.shape}: expected a uint8 image (H, W, C)")
    return frame
