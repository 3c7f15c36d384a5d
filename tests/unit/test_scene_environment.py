"""The scenes as an environment: frames and rewards of the recorded clips, a known best policy, states to go back to."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from jvgen.control.costs import pixel_goal
from jvgen.control.planning import Planner, PlannerConfig
from jvgen.control.receding_horizon import PlannedPolicy, RandomPolicy, run_episode
from jvgen.control.scene_environment import SceneEnvironment
from jvgen.control.worlds import SimulatedWorld
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SPEED, SceneConfig, render_scene

SMALL = SceneConfig(height=24, width=24, frames=6, kinds={"dynamic": 1.0}, driven=1.0, supersampling=1)


@pytest.fixture
def environment() -> SceneEnvironment:
    return SceneEnvironment(SMALL, seed=3, indices=range(5), steps=6)


def test_recorded_actions_give_the_recorded_clip(environment) -> None:
    clip = render_scene(SMALL, 3, 2)
    frame, info = environment.reset(options={"scene": 2})
    frames, rewards = [frame], []
    for action in clip.actions[:5]:
        frame, reward, _, _, _ = environment.step(action)
        frames.append(frame)
        rewards.append(reward)
    assert info == {"scene": 2}
    np.testing.assert_array_equal(np.stack(frames), clip.video[0])
    np.testing.assert_allclose(rewards, clip.rewards[:5], atol=1e-6)


def test_the_best_policy_reaches_the_goal_in_the_fewest_steps(environment) -> None:
    for scene in range(5):
        environment.reset(options={"scene": scene})
        wanted = np.abs(environment._setting.goal - environment._place).max()
        total, steps, reached = 0.0, 0, False
        while not reached and steps < 20:
            _, reward, _, _, info = environment.step(environment.expert_action())
            total, steps = total + reward, steps + 1
            reached = info["distance"] < 1e-6
        assert steps == np.ceil(wanted / SPEED - 1e-9) and info["success"] and total == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_array_equal(environment.render(), environment.goal_image())


def test_states_can_be_gone_back_to(environment) -> None:
    environment.reset(seed=1)
    environment.step(np.array([0.5, -0.2]))
    before, frame = environment.snapshot(), environment.render()
    after = environment.step(np.array([1.0, 1.0]))
    environment.restore(before)
    np.testing.assert_array_equal(environment.render(), frame)
    again = environment.step(np.array([1.0, 1.0]))
    np.testing.assert_array_equal(after[0], again[0])
    assert after[1:] == again[1:]


def test_planning_in_the_simulator_reaches_goals_that_random_actions_miss(environment) -> None:
    config = PlannerConfig(method="cem", samples=24, iterations=2, horizon=2, elites=0.2, correlation=0.0,
                           standard_deviation=(0.8,))  # fmt: skip
    successes = {"planned": 0, "random": 0}
    for scene in range(1):
        environment.reset(options={"scene": scene})
        cost = pixel_goal(environment.goal_image())
        planner = Planner(SimulatedWorld(environment, 2), cost, config)
        for name, policy in (
            ("planned", PlannedPolicy(planner, 2, expected=False)),
            ("random", RandomPolicy(environment.action_space.low, environment.action_space.high)),
        ):
            episode = run_episode(environment, policy, 20, options={"scene": scene})
            assert len(episode.actions) == 6
            successes[name] += episode.success
    assert successes["planned"] == 1 and successes["random"] == 0


def test_it_is_a_gymnasium_environment(environment) -> None:
    check_env(environment, skip_render_check=True)
    assert isinstance(environment, gymnasium.Env)


@pytest.mark.parametrize(("options", "words"), [({"steps": 0}, "steps = 0"), ({"reached": np.nan}, "reached = nan"),
                                                ({"indices": ()}, "indices = 0")])  # fmt: skip
def test_bad_input(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        SceneEnvironment(SMALL, **options)


def test_one_goal_for_all_scenes() -> None:
    """The same place in every episode, far from its start, marked in the frames; scenes are those without it."""
    one, own = (SceneEnvironment(SMALL, seed=3, steps=6, goal=goal) for goal in ((0.5, -0.5), None))
    for seed in range(20):
        frame, info = one.reset(seed=seed)
        other, _ = own.reset(options={"scene": info["scene"]})
        assert one.distance > 3 * SPEED and np.linalg.norm(one._place - (0.5, -0.5)) == pytest.approx(one.distance)
        np.testing.assert_array_equal(one._place, own._place)
        assert (frame != other).any()
    while not (ended := one.step(one.expert_action()))[3]:
        pass
    assert ended[4]["success"]
    own.reset(options={"scene": 0})
    with pytest.raises(ValueError, match="none of 1000 scenes starts further"):
        SceneEnvironment(SMALL, indices=range(1), seed=3, goal=tuple(own._place)).reset(seed=0)


def test_bad_calls(environment) -> None:
    with pytest.raises(ValueError, match="reset"):
        environment.step(np.zeros(2))


def test_a_data_set_of_scenes_is_an_environment(tmp_path) -> None:
    build_scenes(tmp_path / "scenes", SMALL, train=3, validation=2, seed=3, workers=1)
    environment = SceneEnvironment.of_dataset(tmp_path / "scenes")
    frame, info = environment.reset(seed=0)
    assert info["scene"] in (3, 4)
    np.testing.assert_array_equal(frame, render_scene(SMALL, 3, info["scene"]).video[0, 0])
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        SceneEnvironment.of_dataset(tmp_path / "scenes", "test")
    still = SMALL.replace(driven=0.0)
    build_scenes(tmp_path / "still", still, train=1, validation=0, workers=1)
    with pytest.raises(ValueError, match="none of its scenes is driven"):
        SceneEnvironment.of_dataset(tmp_path / "still")
