"""Meta-World as an environment of frames, in the form of iVideoGPT's experiments (arXiv 2405.15223, appendix A.5).

Needs jvgen[metaworld] (an extra of its own: it pins MuJoCo 3.3.0) and OpenGL: `MUJOCO_GL=egl`, or `MUJOCO_GL=osmesa`
with libosmesa6 on machines without a GPU.
"""

import contextlib
import re
import sys
from typing import Any

import numpy as np

from jvgen.config import ConfigError

try:
    import gymnasium
except ImportError as error:
    raise ImportError("jvgen.control.metaworld needs gymnasium: install jvgen[control].") from error

CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
EXPERT_STEPS = 500


class NoOpenGL(ConfigError, RuntimeError):
    """MuJoCo cannot render here."""


class MetaWorldEnvironment(gymnasium.Env):
    """One task with the interface of `gymnasium.Env`; observations are frames, uint8 `H W 3`.

    An action, 4 numbers in [-1, 1], is taken `action_repeat` times; rewards are summed, and a bonus is added in the
    step in which the task succeeds first. Episodes go on after success. Goal and objects are placed at random by the
    seed of the reset.

    Frames are flipped upside down by default: MuJoCo's new renderer shows most cameras of Meta-World standing on their
    heads, and recordings of earlier versions, such as iVideoGPT's demonstrations, were made through a flipped one.

    Args:
      task: such as "reach-v3".
      camera: one of `CAMERAS`.
      size: side of the frames.
      action_repeat: simulator steps per action.
      steps: actions per episode.
      success_bonus: added to the reward once per episode; the released code adds it in every step with success.
      flip: flip frames upside down.

    Raises:
      ImportError: Meta-World is not installed.
      ValueError: an unknown task or camera, or numbers below 1.
      NoOpenGL: at the first frame.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}  # noqa: RUF012 - gymnasium's name

    def __init__(
        self,
        task: str = "reach-v3",
        *,
        camera: str = "corner",
        size: int = 64,
        action_repeat: int = 2,
        steps: int = 100,
        success_bonus: float = 10.0,
        flip: bool = True,
        render_mode: str | None = "rgb_array",
    ):
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ImportError as error:
            raise ImportError("Meta-World is not installed: install jvgen[metaworld].") from error
        if task not in ALL_V3_ENVIRONMENTS:
            names = ", ".join(sorted(ALL_V3_ENVIRONMENTS))
            raise ValueError(f"task = {task!r}: no task of Meta-World; one of {names}.")
        if camera not in CAMERAS:
            raise ValueError(f"camera = {camera!r}: one of {', '.join(CAMERAS)}.")
        for name, value in (("size", size), ("action_repeat", action_repeat), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1.")
        if action_repeat * steps > EXPERT_STEPS:
            raise ValueError(
                f"steps = {steps}: {action_repeat * steps} simulator steps, but Meta-World ends after {EXPERT_STEPS}."
            )
        self.task, self.camera, self.flip, self.render_mode = task, camera, flip, render_mode
        self.action_repeat, self.steps, self.success_bonus = action_repeat, steps, success_bonus
        self.simulator = ALL_V3_ENVIRONMENTS[task](
            render_mode="rgb_array", camera_name=camera, height=size, width=size, reward_function_version="v2"
        )
        # Goals are part of its state observation, which scripted policies need, and drawn anew at each reset.
        self.simulator._partially_observable = False
        # Cached while goals were hidden: observations would be clipped to goals of zero.
        del self.simulator.sawyer_observation_space
        self.simulator._freeze_rand_vec = False
        self.simulator._set_task_called = True
        self.simulator.seeded_rand_vec = True
        # Episodes are cut off here, by `steps`; a plan looks past their end, which Meta-World refuses.
        self.simulator.max_path_length = sys.maxsize
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._state: np.ndarray | None = None
        self._steps_taken, self._succeeded = 0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the first frame, and the seed that placed goal and objects (option "place")."""
        import mujoco

        super().reset(seed=seed)
        place = (options or {}).get("place")
        place = int(self.np_random.integers(2**31)) if place is None else int(place)
        self.simulator.seed(place)
        self._state, _ = self.simulator.reset()
        # Meta-World moves the mark of the goal last, which reaches pictures with the next step only.
        mujoco.mj_kinematics(self.simulator.model, self.simulator.data)
        self._steps_taken, self._succeeded = 0, False
        return self.render(), {"place": place}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The next frame, reward, terminated (always False), truncated, and whether the task has succeeded."""
        rest = self.advance(action)
        return self.render(), *rest

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """As `step`, without rendering the frame."""
        if self._state is None:
            raise ValueError("step before reset: call reset() first.")
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        reward, success = 0.0, False
        for _ in range(self.action_repeat):
            self._state, one, _, _, info = self.simulator.step(action)
            reward += float(one)
            success |= bool(info["success"])
        if success and not self._succeeded:
            reward += self.success_bonus
        self._succeeded |= success
        self._steps_taken += 1
        return reward, False, self._steps_taken >= self.steps, {"success": success}

    def render(self) -> np.ndarray:
        """The current frame, uint8 `H W 3`; raises `NoOpenGL` where MuJoCo cannot render."""
        renderer = self.simulator.mujoco_renderer
        try:
            if getattr(renderer, "viewer", None) is not None:
                # Another environment of this process that was closed took the current context with it.
                renderer.viewer.make_context_current()
            frame = self.simulator.render()
        except Exception as error:
            # Several classes of several libraries; where one is missing, AttributeError: ... no attribute 'glGetError'.
            if not re.search(r"GL|\bgl[A-Zfu]", f"{type(error).__module__} {error}"):
                raise
            raise NoOpenGL(
                "MuJoCo found no OpenGL: set MUJOCO_GL=egl, or MUJOCO_GL=osmesa and install libosmesa6 (Debian's name)."
            ) from error
        return np.ascontiguousarray(frame[::-1] if self.flip else frame)

    def snapshot(self) -> tuple[Any, ...]:
        """The complete state within the episode, for `restore`."""
        import mujoco

        model, data = self.simulator.model, self.simulator.data
        physics = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        simulator = self.simulator
        own = (simulator.curr_path_length, simulator._prev_obs.copy(), simulator._last_stable_obs)
        return physics, own, self._state, self._steps_taken, self._succeeded

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to a state of `snapshot` of this episode."""
        import mujoco

        physics, own, self._state, self._steps_taken, self._succeeded = state
        simulator = self.simulator
        mujoco.mj_setState(simulator.model, simulator.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(simulator.model, simulator.data)
        # The forward pass warms the solver up anew: the state again, for the same next step.
        mujoco.mj_setState(simulator.model, simulator.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        simulator.curr_path_length, previous, simulator._last_stable_obs = own
        simulator._prev_obs = previous.copy()

    def expert_action(self) -> np.ndarray:
        """The action of Meta-World's scripted policy of the task, float32 `4`."""
        from metaworld.policies import ENV_POLICY_MAP

        if not hasattr(self, "_expert"):
            self._expert = ENV_POLICY_MAP[self.task]()
        return np.clip(self._expert.get_action(self._state), -1.0, 1.0).astype(np.float32)

    def goal_image(self) -> np.ndarray:
        """The frame in which the scripted policy has succeeded, from the current state on; the state is kept.

        Raises:
          RuntimeError: the scripted policy does not succeed.
        """
        with self._kept():
            while self.simulator.curr_path_length < EXPERT_STEPS:
                self._state, _, _, _, info = self.simulator.step(self.expert_action())
                if info["success"]:
                    return self.render()
        raise RuntimeError(f"{self.task}: the scripted policy does not succeed within {EXPERT_STEPS} steps.")

    @contextlib.contextmanager
    def _kept(self):
        before = self.snapshot()
        try:
            yield
        finally:
            self.restore(before)

    def close(self) -> None:
        """Free the renderer."""
        self.simulator.close()
