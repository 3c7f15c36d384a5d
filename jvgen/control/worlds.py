"""What a planner can predict with: a world model, or the true simulator behind the same interface."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Key

from jvgen.control.costs import FramesSeen
from jvgen.control.row_parts import in_parts
from jvgen.control.world_model import WorldModel, as_floats, row_keys


class ImaginedWorld:
    """A world model as a planner's model: candidates start at its context frames, `T H W 3`, uint8 or in [0, 1].

    Args:
      world: predicts frames and, with a reward head, rewards.
      low, high: bounds of an action, one number or one per component.
      rows_at_once: candidates that are predicted at a time: memory; all of them if None.
      devices: candidates are split over these; the first device alone if None.

    Raises:
      ValueError: bounds that fit no action, or a world without actions.
    """

    traceable = True

    def __init__(
        self,
        world: WorldModel,
        *,
        low: Any = -1.0,
        high: Any = 1.0,
        rows_at_once: int | None = None,
        devices: list[Any] | None = None,
    ):
        if not world.action_width:
            raise ValueError("this world takes no actions: planning needs a model with action_width above 0.")
        self.world = world
        self.low, self.high = action_bounds(low, high, world.action_width)
        self.rows_at_once = rows_at_once
        self.mesh = None if devices is None else jax.sharding.Mesh(np.array(devices), ("candidates",))
        self.weights = world.weights
        if self.mesh is not None:
            self.weights = jax.device_put(self.weights, jax.sharding.NamedSharding(self.mesh, jax.P()))

    def predict(
        self, weights: Any, start: Any, actions: Float[Array, "R F A"], key: Key[Array, ""], frames: FramesSeen = "all"
    ) -> tuple[Float[Array, "R D H W 3"] | None, Float[Array, "R F"] | None]:
        """Frames in [0, 1] and rewards (None without that head) of candidates from context frames `T H W 3`.

        All frames, the last one (`R 1 H W 3`) or None, as `frames` says: decoding costs about as much as predicting.

        Raises:
          ValueError: more actions than the horizon of the world.
        """
        rows, count = actions.shape[:2]
        if not 1 <= count <= self.world.horizon:
            raise ValueError(
                f"horizon = {count}: this world predicts 1..{self.world.horizon} frames after its context; plan a "
                "shorter horizon, or load the world with more frames."
            )
        context = as_floats(start)[None]

        def some(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, jax.Array | None]:
            rows = (self._split(array) for array in part)
            prediction = self.world.world.rollout(weights, context, *rows, decoded=frames)
            return jax.tree.map(self._split, prediction.frames), prediction.rewards

        devices = 1 if self.mesh is None else self.mesh.size
        return in_parts(some, (actions, row_keys(key, rows)), self.rows_at_once, devices)

    def _split(self, rows: jax.Array) -> jax.Array:
        if self.mesh is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, jax.sharding.NamedSharding(self.mesh, jax.P("candidates")))


class Restorable(Protocol):
    """An environment that can go back to a state it was in: what planning in the true simulator needs."""

    def snapshot(self) -> Any:
        """The complete state, as a value."""

    def restore(self, state: Any) -> None:
        """Go back to a state of `snapshot`."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As `gymnasium.Env.step`, with the frame `H W 3` uint8 as observation."""


@runtime_checkable
class Advancing(Protocol):
    """An environment that can step without rendering: most of a simulator's time is its pictures."""

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """As `step`, without the frame."""


class SimulatedWorld:
    """The simulator itself as a planner's model: the upper bound of what a learned model can be worth.

    Candidates start at the state that the environment is in (`start` of `predict` is not looked at), and the
    environment is left there. One that ends for good (`terminated`) stays at its last frame, with rewards of zero.

    Args:
      environment: is stepped and set back.
      low, high: bounds of an action, one number or one per component.
      width: components of an action.
    """

    traceable = False
    weights = ()

    def __init__(self, environment: Restorable, width: int, *, low: Any = -1.0, high: Any = 1.0):
        self.environment = environment
        self.low, self.high = action_bounds(low, high, width)

    def predict(
        self, weights: Any, start: Any, actions: Float[Array, "R F A"], key: Key[Array, ""], frames: FramesSeen = "all"
    ) -> tuple[Float[Array, "R D H W 3"] | None, Float[Array, "R F"]]:
        """Frames in [0, 1] and rewards of candidates, one after another.

        All frames, the last one (`R 1 H W 3`) or None, as `frames` says. Others are not rendered where the environment
        can step without (`Advancing`).
        """
        before = self.environment.snapshot()
        seen, rewards = [], []
        blind = isinstance(self.environment, Advancing)
        try:
            for candidate in np.asarray(actions):
                self.environment.restore(before)
                frame, ended = None, False
                for number, action in enumerate(candidate):
                    looked_at = frames == "all" or (frames == "last" and number == len(candidate) - 1)
                    if ended:
                        reward = 0.0
                    elif looked_at or not blind:
                        frame, reward, ended, *_ = self.environment.step(action)
                    else:
                        reward, ended, *_ = self.environment.advance(action)
                        if ended and frames == "last":
                            # Its last frame is this one, which was not rendered: the same steps again.
                            self.environment.restore(before)
                            for earlier in candidate[:number]:
                                self.environment.advance(earlier)
                            frame, *_ = self.environment.step(action)
                    rewards.append(reward)
                    if looked_at:
                        seen.append(frame)
        finally:
            self.environment.restore(before)
        rewards = jnp.asarray(rewards, jnp.float32).reshape(actions.shape[:2])
        if frames == "none":
            return None, rewards
        return as_floats(rearrange(np.stack(seen), "(r f) h w c -> r f h w c", r=len(actions))), rewards


def action_bounds(low: Any, high: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of an action, float32 `A` each, from one number or one per component.

    Raises:
      ValueError: they do not fit, are not finite, or a lower bound is not below its upper bound.
    """
    try:
        low, high = (np.broadcast_to(np.asarray(bound, np.float32), (width,)).copy() for bound in (low, high))
    except ValueError as error:
        raise ValueError(
            f"bounds of shapes {np.shape(low)} and {np.shape(high)}: give one number, or {width}, one per component."
        ) from error
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"low = {low}, high = {high}: finite numbers, every lower bound below its upper bound.")
    return low, high
