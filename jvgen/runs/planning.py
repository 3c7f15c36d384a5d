"""Plan episodes with a world model, the simulator or at random, and write what came of it: `jvgen plan`."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from jvgen.config import ConfigError
from jvgen.control.costs import Cost, perceptual_goal, pixel_goal, predicted_reward
from jvgen.control.planning import Planner, PlannerConfig
from jvgen.control.receding_horizon import Episode, PlannedPolicy, RandomPolicy, run_episode
from jvgen.control.world_model import WorldModel, to_pixels
from jvgen.control.worlds import ImaginedWorld, SimulatedWorld
from jvgen.data.video_files import encode_video
from jvgen.evaluation.contact_sheets import contact_sheet, png_bytes
from jvgen.storage import Path, local_copy, write_bytes, write_text

SHOWN = 8  # candidates in the picture of a plan
LABELED_ROW = 48  # pixels of a row's height that its label needs there
FRAMES_PER_SECOND = 8.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Episodes of one way to choose actions.

    Attributes:
      episodes: in order.
      goals: their goal images, uint8 `H W C`; None where there is none.
      sheet: picture of the first plan: candidates from the best to the worst, the plan, and what really happened, a row
        each; None without a plan.
    """

    episodes: list[Episode]
    goals: list[np.ndarray | None]
    sheet: np.ndarray | None = None

    @property
    def summary(self) -> dict[str, float]:
        """Success rate, mean sum of rewards, plans per second."""
        seconds = [episode.seconds for episode in self.episodes]
        return {
            "episodes": len(self.episodes),
            "success": float(np.mean([episode.success for episode in self.episodes])),
            "return": float(np.mean([episode.rewards.sum() for episode in self.episodes])),
            **({"plans_per_second": float(1 / np.median(seconds))} if np.isfinite(seconds).all() else {}),
        }


def plan_episodes(
    environment: Any,
    world: WorldModel | None,
    cost_of: Callable[[np.ndarray | None], Cost],
    config: PlannerConfig,
    *,
    way: str = "model",
    goal: np.ndarray | None = None,
    episodes: int = 1,
    steps: int = 15,
    seed: int = 0,
    rows_at_once: int | None = None,
    expected: bool = True,
) -> Outcome:
    """Control episodes of an environment.

    Args:
      environment: with frames as observations and bounded actions.
      world: predicts, with the way "model".
      cost_of: the cost for an episode's goal image.
      config: of the search.
      way: "model", "simulator" (plans in the environment itself, which must be able to go back to a state), "random".
      goal: the goal image; the environment's own (`goal_image()`) if None. Where that raises `RuntimeError` (a scripted
        policy that does not succeed), an episode whose plans need no goal has none in its video.
      episodes, steps: how many, and actions per episode.
      seed: episode i resets the environment with seed + i, and plans with keys of it.
      rows_at_once: candidates predicted at a time, split over this process's devices.
      expected: also keep the frame that each plan expected.

    Raises:
      ConfigError: world and environment do not fit: size of frames, components of actions; a simulator that cannot go
        back to a state; a cost that needs rewards with a world that predicts none; an episode without the goal image
        that its plans need.
    """
    check_fit(environment, world if way == "model" else None, goal, way)
    space = environment.action_space
    low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    made, goals, planner, sheet = [], [], None, None
    for number in range(episodes):
        own = seed + number
        # A reset shows the goal of the episode; `run_episode` resets to the same.
        environment.reset(seed=own)
        target, missing = (goal, None) if goal is not None else _own_goal(environment)
        if way == "random":
            policy = RandomPolicy(low, high, own)
        else:
            if missing is not None and way == "model" and world.world.goal:
                raise _no_goal(own, missing)
            try:
                cost = cost_of(target)
            except (TypeError, ValueError) as error:
                if missing is None:
                    raise
                raise _no_goal(own, missing) from error
            check_rewards(cost, world if way == "model" else None)
            if planner is None:
                model = (
                    ImaginedWorld(world, low=low, high=high, rows_at_once=rows_at_once, devices=jax.local_devices())
                    if way == "model"
                    else SimulatedWorld(environment, len(low), low=low, high=high)
                )
                planner = Planner(model, cost, config)
            planner = planner.toward(cost)
            policy = PlannedPolicy(
                planner,
                world.context_frames if way == "model" else 1,
                goal=target if way == "model" and world.world.goal else None,
                key=own,
                expected=expected,
            )
        made.append(run_episode(environment, policy, steps, seed=own))
        goals.append(target)
        if number == 0 and way == "model":
            sheet = candidate_sheet(planner, policy.first_start, made[0])
    return Outcome(made, goals, sheet)


def _own_goal(environment: Any) -> tuple[np.ndarray | None, RuntimeError | None]:
    """The environment's goal image, or None and why there is none in this episode."""
    if not hasattr(environment, "goal_image"):
        return None, None
    try:
        return environment.goal_image(), None
    except ConfigError:  # without OpenGL there are no frames at all
        raise
    except RuntimeError as error:
        return None, error


def _no_goal(seed: int, missing: RuntimeError) -> ConfigError:
    return ConfigError(
        f"--seed {seed}: this episode has no goal image ({missing}). Give --goal FILE, plan for --cost reward, or "
        "choose seeds whose episodes have one (episode i has seed + i)."
    )


def cost_for(name: str, lpips: Path | None = None) -> Callable[[np.ndarray | None], Cost]:
    """The cost of a name of `jvgen plan --cost`, as a function of the goal image."""
    return {
        "pixels": pixel_goal,
        "last-pixels": lambda goal: pixel_goal(goal, last_only=True),
        "laplacian": perceptual_goal,
        "lpips": lambda goal: perceptual_goal(goal, lpips=lpips),
        "reward": lambda goal: predicted_reward(),
    }[name]


def check_fit(environment: Any, world: WorldModel | None, goal: np.ndarray | None, way: str) -> None:
    """Raise `ConfigError` where environment, world and goal image do not belong together."""
    size, space = environment.observation_space.shape, environment.action_space
    bounds = [getattr(space, name, None) for name in ("low", "high")]
    width = len(bounds[0]) if all(np.ndim(bound) == 1 for bound in bounds) else None
    if width is None or not np.isfinite(bounds).all():
        raise ConfigError(f"actions of the environment are {space}: planning needs a bounded Box of one dimension.")
    if way == "simulator" and not all(hasattr(environment, name) for name in ("snapshot", "restore")):
        raise ConfigError(
            f"{type(environment).__name__} has no snapshot() and restore(state): planning in the simulator goes back "
            "to a state for every candidate; plan in a world model instead."
        )
    if world is not None:
        side = world.tokenizer.resolution
        if size != (side, side, world.tokenizer.channels):
            raise ConfigError(
                f"the environment's frames are {size}, the world model's {(side, side, world.tokenizer.channels)}: use "
                "an environment that renders at the size that the model was trained with."
            )
        if world.action_width != width:
            raise ConfigError(
                f"the environment's actions have {width} components, the world model's {world.action_width}: it was "
                "trained on another environment."
            )
    if world is not None and world.world.goal and goal is None and not hasattr(environment, "goal_image"):
        raise ConfigError(
            "this world model was trained with a goal image in its context (task.goal), and the environment has none "
            "of its own: give --goal FILE, whatever plans are judged by."
        )
    if goal is not None and goal.shape != size:
        raise ConfigError(f"goal image {goal.shape}: the environment's frames are {size}; crop and resize it first.")


def check_rewards(cost: Cost, world: WorldModel | None) -> None:
    """Raise `ConfigError` for a cost that needs rewards with a world that was trained without."""
    if cost.needs_rewards and world is not None and not world.transformer.reward:
        raise ConfigError(
            f"cost {cost.name!r}: this world model predicts no rewards: it was trained with task.transformer.reward = "
            "false. Plan toward a goal image (--cost pixels), or train it on recordings with rewards."
        )


def read_goal(path: Path) -> np.ndarray:
    """A goal image, uint8 `H W 3`.

    Raises:
      ConfigError: no image file.
    """
    try:
        with Image.open(local_copy(path)) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ConfigError(f"--goal {path}: cannot be read as an image ({error}).") from error


def write_outcome(outcome: Outcome, out: Path) -> list[Path]:
    """Write episodes: videos (real frames beside the expected ones and the goal), numbers, the first plan's picture.

    Returns:
      The files.
    """
    files = []
    for number, (episode, goal) in enumerate(zip(outcome.episodes, outcome.goals, strict=True)):
        files.append(out / f"episode_{number:03d}.mp4")
        write_bytes(files[-1], encode_video(side_by_side(episode, goal), FRAMES_PER_SECOND))
        numbers = {
            "success": episode.success,
            "rewards": episode.rewards.tolist(),
            "actions": episode.actions.tolist(),
            **({} if episode.costs is None else {"lowest_costs": episode.costs.tolist()}),
        }
        files.append(out / f"episode_{number:03d}.json")
        write_text(files[-1], json.dumps(numbers, indent=1))
    if outcome.sheet is not None:
        files.append(out / "first_plan.png")
        write_bytes(files[-1], png_bytes(outcome.sheet))
    files.append(out / "summary.json")
    write_text(files[-1], json.dumps(outcome.summary, indent=1))
    return files


def side_by_side(episode: Episode, goal: np.ndarray | None) -> np.ndarray:
    """Real frames, the frames that plans expected (white where there are none), and the goal: uint8 `F H W 3`."""
    frames = episode.frames
    columns = [frames]
    if episode.predicted is not None:
        columns.append(np.concatenate([frames[:1], episode.predicted]))
    if goal is not None:
        columns.append(np.broadcast_to(goal, frames.shape))
    clip = np.concatenate(columns, axis=2)
    clip = np.repeat(clip, 3, axis=-1) if clip.shape[-1] == 1 else clip
    # Encoders want even sides.
    return np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")


def candidate_sheet(planner: Planner, start: np.ndarray, episode: Episode) -> np.ndarray:
    """The picture of an episode's first plan (`Outcome.sheet`), uint8 `H W 3`; `start` is what it was planned from."""
    plan = episode.first
    order = np.argsort(np.asarray(plan.costs))
    shown = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]
    actions = np.concatenate([np.asarray(plan.candidates)[shown], np.asarray(plan.actions)[None]])
    frames, _ = planner.predict(start, actions)
    rows = [*to_pixels(frames), episode.frames[1 : actions.shape[1] + 1]]
    labels = [f"cost {float(plan.costs[number]):.3g}" for number in shown] + ["the plan", "what happened"]
    return contact_sheet(rows, scale=max(1, round(LABELED_ROW / rows[0].shape[1])), labels=labels)
