"""Episodes of several environments at a time, each in a process of its own, in step with one policy.

A simulator that dies, hangs or returns numbers that are not finite is started again and its episode is restarted;
past a budget of such failures collection stops.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float, UInt8

from jvgen import exit_codes
from jvgen.data.stream.quarantine import TooManyFailures

# From the last frames of R episodes, stacked along channels, and the number of the step: actions `R A`.
BatchPolicy = Callable[[UInt8[np.ndarray, "R H W C"], int], Float[np.ndarray, "R A"]]


class TooManyEnvironmentFailures(TooManyFailures):
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


@dataclasses.dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment shows and takes.

    Attributes:
      name: of its class.
      frame: shape of an observation, (H, W, C).
      low, high: bounds of an action, one number per component; None if its actions are not a box of one dimension.
      actions: its action space, as text.
      action_repeat: simulator steps per action.
      has_expert: it has `expert_action()`.
    """

    name: str
    frame: tuple[int, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    actions: str
    action_repeat: int
    has_expert: bool


class _Environments:
    """Environments in processes, with a budget of failures."""

    def __init__(
        self,
        make: Callable[[], Any],
        count: int,
        stack: int,
        failure_budget: int,
        timeout: float,
        steps: int | None,
    ):
        if count < 1 or stack < 1 or failure_budget < 0 or not timeout > 0:
            raise ValueError(
                f"count = {count}, stack = {stack}, failure_budget = {failure_budget}, timeout = {timeout}: at least "
                "1, 1, 0, and positive."
            )
        if steps is not None and steps < 1:
            raise ValueError(f"steps = {steps}: must be at least 1, the actions of an episode, or None.")
        self.stack, self.failures, self._budget, self._steps = stack, 0, failure_budget, steps
        # Not a fork: JAX has threads.
        self._workers = [_Worker(make, multiprocessing.get_context("spawn"), timeout) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.stop()

    def _attempt(self, row: "_Running", action: Callable[[], None]) -> bool:
        """Do something with an environment; where it fails, start it again with its episode, and return False."""
        failed = False
        while True:
            try:
                action()
                return not failed
            except _Failed as error:
                failed = True
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


class Collector(_Environments):
    """Whole episodes of environments in processes.

    Args:
      make: returns an environment with frames as observations; picklable, called in each process.
      count: of processes.
      stack: frames per observation of the policy; the first frame of an episode stands in for those before it.
      failure_budget: failures over the life of this object.
      timeout: seconds that a reset or a step may take.
      steps: an episode ends after this many actions, as by truncation, where the environment does not end it before;
        None for the environment's own end alone.

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
        steps: int | None = None,
    ):
        super().__init__(make, count, stack, failure_budget, timeout, steps)

    def collect(self, policy: BatchPolicy | None, seeds: Sequence[int]) -> list[CollectedEpisode]:
        """One episode per seed, as many at a time as there are processes.

        Episode i starts with `reset(seed=seeds[i])`. Rows of the policy's batch are those episodes that still run, in
        the order of seeds. Without a policy, environments take their own `expert_action()`.

        Raises:
          TooManyEnvironmentFailures: more failures than the budget.
        """
        episodes: list[CollectedEpisode] = []
        for first in range(0, len(seeds), len(self._workers)):
            episodes += self._together(policy, seeds[first : first + len(self._workers)])
        return episodes

    def _together(self, policy: BatchPolicy | None, seeds: Sequence[int]) -> list[CollectedEpisode]:
        running = [_Running(worker, seed, self._steps) for worker, seed in zip(self._workers, seeds, strict=False)]
        for row in running:
            self._attempt(row, row.begin)
        while active := [row for row in running if not row.ended]:
            # Restarted episodes are behind: each is asked with the number of its own step.
            for number in sorted({len(row.actions) for row in active}):
                rows = [row for row in active if len(row.actions) == number and not row.ended]
                actions: Sequence[np.ndarray | None] = [None] * len(rows)
                if policy is not None:
                    seen = np.stack([row.observation(self.stack) for row in rows])
                    actions = np.asarray(policy(seen, number), np.float32)
                for row, action in zip(rows, actions, strict=True):
                    row.worker.send(("step", action))
                for row in rows:
                    self._attempt(row, row.finish)
        return [row.episode() for row in running]


class SteppedEnvironment(_Environments):
    """One environment in a process, one step at a time: what acts while an agent is trained. Arguments: `Collector`."""

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        stack: int = 3,
        failure_budget: int = 10,
        timeout: float = 120.0,
        steps: int | None = None,
    ):
        super().__init__(make, 1, stack, failure_budget, timeout, steps)
        self._row: _Running | None = None

    def begin(self, seed: int, actions: Sequence[np.ndarray] = ()) -> None:
        """Start an episode, and take these actions in it: a simulator that is a function of seed and actions is then
        in the state in which it was left. One that fails on the way, or ends there, is at the start of its episode.

        Raises:
          TooManyEnvironmentFailures: more failures than the budget.
        """
        self._row = _Running(self._workers[0], seed, self._steps)
        self._attempt(self._row, self._row.begin)
        for number, action in enumerate(actions, 1):
            ended = self.step(action) is not None
            if ended or len(self._row.actions) != number:
                self._attempt(self._row, self._row.begin)
                return

    @property
    def observation(self) -> UInt8[np.ndarray, "H W C"]:
        """The last frames, stacked along channels."""
        return self._row.observation(self.stack)

    @property
    def actions(self) -> list[np.ndarray]:
        """Of the episode so far."""
        return list(self._row.actions)

    @property
    def last_frame(self) -> UInt8[np.ndarray, "H W C"]:
        """What is seen now."""
        return self._row.frames[-1]

    def step(self, action: Float[np.ndarray, "A"]) -> CollectedEpisode | None:
        """Take an action; returns the episode where it ends. An environment that fails restarts its episode.

        Raises:
          TooManyEnvironmentFailures: more failures than the budget.
        """
        row = self._row
        row.worker.send(("step", np.asarray(action, np.float32)))
        self._attempt(row, row.finish)
        return row.episode() if row.ended else None


def describe_environment(make: Callable[[], Any], timeout: float = 120.0) -> EnvironmentSpec:
    """What an environment shows and takes, found by starting one in a process of its own and resetting it.

    Raises:
      ValueError: it cannot be started; the message says why.
    """
    worker = _Worker(make, multiprocessing.get_context("spawn"), timeout)
    try:
        worker.send(("describe", None))
        return worker.receive()
    except _Failed as error:
        # The last line of its traceback says it.
        raise ValueError(f"the environment cannot be started: {str(error).splitlines()[-1]}") from error
    finally:
        worker.stop()


class _Running:
    """An episode under way."""

    def __init__(self, worker: "_Worker", seed: int, steps: int | None):
        self.worker, self.seed, self.steps, self.failures = worker, seed, steps, 0
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

    def finish(self) -> None:
        frame, action, reward, terminated, truncated, success = self.worker.receive()
        if not np.isfinite(reward):
            raise _Failed(f"a reward of {reward} at step {len(self.actions)}")
        self.frames.append(frame)
        self.actions.append(action)
        self.rewards.append(reward)
        self.discounts.append(0.0 if terminated else 1.0)
        self.success |= success
        self.ended = terminated or truncated or len(self.actions) == self.steps

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
    # Ctrl-C goes to every process of a terminal: the run saves with the episode as it is, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    if order == "describe":
        return _described(environment)
    if order == "reset":
        return _frame(environment.reset(seed=value)[0])
    action = np.asarray(environment.expert_action() if value is None else value, np.float32)
    frame, reward, terminated, truncated, info = environment.step(action)
    return _frame(frame), action, float(reward), bool(terminated), bool(truncated), bool(info.get("success"))


def _described(environment: Any) -> EnvironmentSpec:
    space = environment.action_space
    bounds = [getattr(space, name, None) for name in ("low", "high")]
    box = all(np.ndim(bound) == 1 for bound in bounds)
    return EnvironmentSpec(
        name=type(environment).__name__,
        frame=_frame(environment.reset(seed=0)[0]).shape,
        low=tuple(map(float, bounds[0])) if box else None,
        high=tuple(map(float, bounds[1])) if box else None,
        actions=str(space),
        action_repeat=_action_repeat(environment),
        has_expert=hasattr(environment, "expert_action"),
    )


def _action_repeat(environment: Any) -> int:
    """Simulator steps per action: as the environment says, or the one inside wrappers that do not."""
    inner = getattr(environment, "unwrapped", environment)
    return int(getattr(environment, "action_repeat", getattr(inner, "action_repeat", 1)))


def _frame(frame: Any) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        raise ValueError(f"the observation is {frame.dtype} {frame.shape}: expected a uint8 image (H, W, C)")
    return frame
