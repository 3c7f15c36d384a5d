"""A world model as a gymnasium environment: episodes start at recorded frames and continue with predicted ones."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jvgen.control.world_model import WorldModel
from jvgen.control.worlds import action_bounds
from jvgen.models.ivideogpt.world import State

try:
    import gymnasium
except ImportError as error:
    raise ImportError("jvgen.control.environment needs gymnasium: install jvgen[control].") from error

Reward = Callable[[np.ndarray, np.ndarray], float]


class WorldModelEnvironment(gymnasium.Env):
    """One imagined episode at a time, with the interface of `gymnasium.Env`.

    Observations are uint8 `H W 3`. An episode is truncated after `steps` frames; beyond the world's horizon its last
    frames become a new context (`WorldModel.refresh`).

    Args:
      world: the world model.
      starts: uint8 `N T H W 3`: contexts of episodes; `reset` draws one, or takes `options={"start": index}`.
      low, high: bounds of an action, one number or one per component; actions are clipped to them.
      steps: frames per episode; default: the world's horizon.
      reward: (frame uint8 `H W 3`, action) -> reward, for worlds without a reward head, or in place of it.

    Raises:
      ValueError: no contexts, contexts of another shape, bounds that do not fit, no actions, no reward.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's name

    def __init__(
        self,
        world: WorldModel,
        starts: np.ndarray,
        *,
        low: Any = -1.0,
        high: Any = 1.0,
        steps: int | None = None,
        reward: Reward | None = None,
        render_mode: str | None = "rgb_array",
    ):
        if len(starts) == 0 or starts.dtype != np.uint8:
            raise ValueError(f"starts: expected uint8 contexts, at least one, got {starts.dtype} {starts.shape}.")
        world.check_frames(starts[:1])
        if not world.action_width:
            raise ValueError("this world takes no actions: an environment needs a model with action_width above 0.")
        if reward is None and not world.transformer.reward:
            raise ValueError("this world predicts no rewards: give reward, a function of frame and action.")
        low, high = action_bounds(low, high, world.action_width)
        steps = world.horizon if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps = {steps}: must be at least 1, the frames of an episode.")
        self.world, self.starts, self.steps, self.reward = world, starts, steps, reward
        self.render_mode = render_mode
        side = world.tokenizer.resolution
        self.observation_space = gymnasium.spaces.Box(0, 255, (side, side, world.tokenizer.channels), np.uint8)
        self.action_space = gymnasium.spaces.Box(low, high, low.shape, np.float32)
        self._state: State | None = None
        self._frame = starts[0, -1]
        self._steps_taken = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the last frame of its context, and the index of the context.

        Raises:
          ValueError: no such context.
        """
        super().reset(seed=seed)
        start = (options or {}).get("start")
        index = int(self.np_random.integers(len(self.starts)) if start is None else start)
        if not 0 <= index < len(self.starts):
            raise ValueError(f"start = {index}: this environment has contexts 0 to {len(self.starts) - 1}.")
        key = int(self.np_random.integers(2**31))
        self._state = self.world.reset(self.starts[index : index + 1], key)
        self._frame, self._steps_taken = self.starts[index, -1].copy(), 0
        return self._frame.copy(), {"start": index}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated (always False: a world model has no terminal states), truncated, info.

        Raises:
          NotFinite: the predicted frame or reward holds NaN or infinity.
        """
        if self._state is None:
            raise ValueError("step before reset: call reset() first.")
        if self._steps_taken and self._steps_taken % self.world.horizon == 0:
            self._state = self.world.refresh(self._state)
        action = np.clip(np.asarray(action, np.float32), self.action_space.low, self.action_space.high)
        self._state, frame, reward = self.world.step(self._state, action[None])
        self._steps_taken += 1
        pixels, reward = self.world.observed(self._state, frame, reward, self._steps_taken)
        self._frame = pixels[0]
        value = float(reward[0]) if self.reward is None else float(self.reward(self._frame, action))
        return self._frame.copy(), value, False, self._steps_taken >= self.steps, {}

    def render(self) -> np.ndarray:
        """The current frame, uint8 `H W 3`."""
        return self._frame.copy()
