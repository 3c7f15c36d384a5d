"""The embedded scenes as an environment: actions push a body over the ground to a marked goal. Needs no simulator."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvgen.data.scenes.renderer import Renderer
from jvgen.data.scenes.scenes import SPEED, SceneConfig, Setting, draw_setting, goal_marker, pushed
from jvgen.data.store.sources import read_metadata, splits
from jvgen.saved_config import decode
from jvgen.storage import Path

try:
    import gymnasium
except ImportError as error:
    raise ImportError("jvgen.control.scene_environment needs gymnasium: install jvgen[control].") from error

# All scenes are driven ones.
DRIVEN = {"kinds": {"dynamic": 1.0}, "driven": 1.0}
TRIES = 1000


class SceneEnvironment(gymnasium.Env):
    """Driven scenes with the interface of `gymnasium.Env`: what their clips record, to act in.

    Observations are frames, uint8 `H W 3`. An action, 2 numbers in [-1, 1], moves the body along the camera's right and
    forward directions on the ground. The reward is the decrease of the distance to the goal, relative to that at the
    start; `info["success"]` says whether the body is at the goal. The shortest way is the best policy: `expert_action`.

    Args:
      scenes: their appearance; all of them are driven, with one view.
      seed: of the data set that episodes start in: scene i starts as its clip i does, if that is a driven one.
      indices: of the scenes that `reset` draws one of; `options={"scene": index}` takes any.
      steps: actions per episode.
      reached: distance to the goal, in world units, that counts as success (a full action moves the body 0.28).
      goal: where it is in all scenes, along the two directions; scenes that start within three actions of it are left
        out. None for the place that each scene has.

    Raises:
      ValueError: no scenes, no steps, or a distance that is not positive.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012 - gymnasium's name

    def __init__(
        self,
        scenes: SceneConfig | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] = range(1_000_000),
        steps: int = 15,
        reached: float = SPEED,
        goal: tuple[float, float] | None = None,
        render_mode: str | None = "rgb_array",
    ):
        for name, value in (("indices", len(indices)), ("steps", steps), ("reached", reached)):
            if not value > 0:
                raise ValueError(f"{name} = {value}: must be positive.")
        self.scenes = (scenes or SceneConfig()).replace(**DRIVEN, views=1)
        self.scenes.validate()
        self.seed, self.indices, self.steps, self.reached, self.goal = seed, indices, steps, reached, goal
        self.render_mode = render_mode
        size = (self.scenes.height, self.scenes.width, 3)
        self.observation_space = gymnasium.spaces.Box(0, 255, size, np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._setting: Setting | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the first frame, and the index of the scene."""
        super().reset(seed=seed)
        index = (options or {}).get("scene")
        index = self._draw_index() if index is None else int(index)
        self._setting = setting = self._scene(index)
        self._renderer = Renderer(
            setting.stage, setting.cameras[0][0], self.scenes.height, self.scenes.width,
            samples=self.scenes.supersampling,
        )  # fmt: skip
        # The two axes are orthonormal, so a place on the ground has these coordinates along them.
        self._place = setting.axes @ setting.body.center
        self._first_distance, self._steps_taken = self.distance, 0
        return self.render(), {"scene": index}

    @classmethod
    def of_dataset(cls, folder: str | Path, split: str = "validation", **options: Any) -> "SceneEnvironment":
        """Episodes that start as the driven clips of a data set of scenes, in the same look and size.

        Args:
          folder: built by `jvgen data build scenes`.
          split: whose clips.
          options: other arguments of the class.

        Raises:
          ValueError: not a data set of scenes, no such split, or none of its scenes is driven.
        """
        metadata = read_metadata(folder)
        if metadata.get("origin") != "scenes":
            raise ValueError(f"{folder}: not a data set of `jvgen data build scenes`.")
        scenes, seed = scenes_of(metadata)
        if not scenes.driven or not scenes.kinds.get("dynamic"):
            raise ValueError(
                f"{folder}: none of its scenes is driven: nothing to act in. Build it with --set driven=1."
            )
        counts = splits(folder)
        if split not in counts:
            raise ValueError(f"{folder}: has no split {split!r}, only {', '.join(counts)}.")
        # Scenes are numbered through both splits.
        first = 0 if split == "train" else counts["train"]
        return cls(scenes, seed=seed, indices=range(first, first + counts[split]), **options)

    @property
    def distance(self) -> float:
        """From the body to the goal, in world units."""
        return float(np.linalg.norm(self._set().goal - self._place))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The next frame, reward, terminated (always False), truncated, and whether the body is at the goal."""
        rest = self.advance(action)
        return self.render(), *rest

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """As `step`, without rendering the frame."""
        before = self.distance
        action = np.clip(np.asarray(action, np.float32), self.action_space.low, self.action_space.high)
        self._place = pushed(self._place, action)
        self._steps_taken += 1
        reward = (before - self.distance) / self._first_distance
        info = {"success": self.distance <= self.reached, "distance": self.distance}
        return float(reward), False, self._steps_taken >= self.steps, info

    def render(self) -> np.ndarray:
        """The current frame, uint8 `H W 3`."""
        return self._frame(self._place)

    def goal_image(self) -> np.ndarray:
        """The frame with the body at the goal, uint8 `H W 3`."""
        return self._frame(self._set().goal)

    def expert_action(self) -> np.ndarray:
        """The action of the best policy: straight to the goal, as fast as can be."""
        wish = (self._set().goal - self._place) / SPEED
        return (wish / max(1.0, float(np.abs(wish).max()))).astype(np.float32)

    def snapshot(self) -> tuple[np.ndarray, int]:
        """The state within the episode, for `restore`."""
        return self._place.copy(), self._steps_taken

    def restore(self, state: tuple[np.ndarray, int]) -> None:
        """Go back to a state of `snapshot` of this episode."""
        self._place, self._steps_taken = state[0].copy(), state[1]

    def _scene(self, index: int) -> Setting:
        setting = draw_setting(self.scenes, self.seed, index)
        if self.goal is None:
            return setting
        goal = np.asarray(self.goal, np.float64)
        stage = dataclasses.replace(setting.stage, marker=goal_marker(goal, setting.axes))
        return dataclasses.replace(setting, goal=goal, stage=stage)

    def _draw_index(self) -> int:
        for _ in range(TRIES):
            index = int(self.indices[self.np_random.integers(len(self.indices))])
            if self.goal is None:
                return index
            setting = self._scene(index)
            if np.linalg.norm(setting.goal - setting.axes @ setting.body.center) > 3 * SPEED:
                return index
        raise ValueError(f"goal = {self.goal}: none of {TRIES} scenes starts further than three actions from it.")

    def _set(self) -> Setting:
        if self._setting is None:
            raise ValueError("step before reset: call reset() first.")
        return self._setting

    def _frame(self, place: np.ndarray) -> np.ndarray:
        setting = self._set()
        center = place @ setting.axes + np.array([0.0, 0.0, setting.body.radius])
        return self._renderer.frame([dataclasses.replace(setting.body, center=center), *setting.static])


def cube_to_center() -> SceneEnvironment:
    """The easiest task: a red cube is pushed to the middle of a plain ground, seen by one camera, 32x32 pixels."""
    scenes = SceneConfig(
        height=32, width=32, frames=16, wander=0.0, background="plain", colors=("red",), shapes=("cube",)
    )
    return SceneEnvironment(scenes, seed=1, goal=(0.0, 0.0))


def scenes_of(metadata: Mapping[str, Any]) -> tuple[SceneConfig, int]:
    """Appearance and seed of a data set of scenes, from its metadata."""
    settings = dict(metadata["options"])
    seed, kinds = settings.pop("seed"), settings.pop("kinds")
    return decode({"class": "SceneConfig", "kinds": {"mapping": kinds}, **settings}), seed
