"""World models that were trained on recordings of another camera, look or action scale are refused by name."""

import json
import types

import gymnasium
import numpy as np
import pytest

from jvgen.config import ConfigError
from jvgen.control.planning import PlannerConfig
from jvgen.control.scene_environment import SceneEnvironment
from jvgen.control.world_data import unlike
from jvgen.data.builders.robot_episodes import EpisodeOptions, build_robot_episodes
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.store.sources import METADATA
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.runs import world_data
from jvgen.runs.planning import check_rewards, cost_for, plan_episodes
from jvgen.runs.world_data import check_trained_on
from tests.unit.test_world_model import TRANSFORMER

SMALL = SceneConfig(
    height=16, width=16, frames=3, kinds={"dynamic": 1.0}, driven=1.0, supersampling=1, wander=0.5,
    colors=("red", "blue"), background="plain",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data sets of scenes, of a recorded environment, of robots with wild actions, and of robots with clipped ones."""
    root = tmp_path_factory.mktemp("data")
    for name in ("scenes", "recorded"):
        build_scenes(root / name, SMALL, train=1, validation=0, workers=1)
    file = root / "recorded" / METADATA
    origin = {"origin": "environment", "options": {"name": "metaworld:reach-v3:corner2"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | origin))
    rng = np.random.default_rng(0)
    (root / "files").mkdir()
    np.savez(root / "files" / "a.npz", image=rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
             action=np.linspace(-9, 9, 16).reshape(4, 4).astype(np.float32))  # fmt: skip
    for name, options in (("wild", EpisodeOptions()), ("clipped", EpisodeOptions(clip_actions=(-0.5, 0.5)))):
        build_robot_episodes(root / "files", root / name, options, validation=0.0, workers=1)
    return root


def data_of(*folders, **bucket) -> DataConfig:
    return DataConfig(
        sources=tuple(SourceConfig(path=str(folder)) for folder in folders),
        buckets=(BucketConfig(frames=2, height=16, width=16, batch_size=1, **bucket),),
    )


def robot(camera: str = "corner") -> types.SimpleNamespace:
    return types.SimpleNamespace(camera=camera, action_space=gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32))


@pytest.mark.parametrize(
    ("name", "strides", "environment", "words"),
    [
        ("scenes", (2, 4), SMALL, "2 or 4 recorded frames a step"),
        ("scenes", (1,), {"wander": 1.0}, "wander = 0.5; the environment's have 1.0"),
        ("scenes", (1,), {"colors": ("red", "green")}, "colors = .*'blue'.*'green'"),
        ("scenes", (1,), {"background": "textured"}, "background = plain; the environment's have textured"),
        ("scenes", (1,), {"objects": (1, 3)}, r"objects = \(1, 1\)"),
        ("scenes", (1, 2), {"colors": ("red",), "wander": 0.0}, None),
        ("recorded", (1,), robot("corner"), "camera 'corner2'; the environment has 'corner'"),
        ("recorded", (1,), robot("corner2"), None),
        ("wild", (1,), robot(), "actions reach 9; the environment's are bounded by 1.*clip-actions"),
        ("clipped", (1,), robot(), "clipped to -0.5 to 0.5; the environment's are from -1 to 1"),
        ("missing", (1,), robot(), None),
    ],
)
def test_recordings_of_another_environment(folders, name, strides, environment, words) -> None:
    if not isinstance(environment, types.SimpleNamespace):
        scenes = environment if isinstance(environment, SceneConfig) else SMALL.replace(**environment)
        environment = SceneEnvironment(scenes)
    fault = unlike(data_of(folders / name, strides=strides), environment)
    if words is None:
        assert fault is None
    else:
        with pytest.raises(ValueError, match=words):
            raise ValueError(fault)


def test_clips_at_a_frame_rate_have_as_many_recorded_frames_a_step(folders) -> None:
    """Scenes are recorded at 8 frames/s."""
    environment = SceneEnvironment(SMALL)
    assert "trained with 4 recorded frames a step" in unlike(
        data_of(folders / "scenes", frames_per_second=2.0), environment
    )
    assert unlike(data_of(folders / "scenes", frames_per_second=8.1), environment) is None
    # What is not there any more says nothing.
    assert unlike(data_of(folders / "missing", frames_per_second=2.0), environment) is None


def test_actions_that_are_no_box_are_left_to_the_planner(folders) -> None:
    for space in (gymnasium.spaces.Discrete(4), gymnasium.spaces.MultiBinary(3)):
        environment = types.SimpleNamespace(
            action_space=space, observation_space=SceneEnvironment(SMALL).observation_space
        )
        assert unlike(data_of(folders / "wild"), environment) is None
        with pytest.raises(ConfigError, match="planning needs a bounded Box"):
            plan_episodes(environment, None, cost_for("reward"), PlannerConfig(), way="random")


def test_one_source_of_the_environment_is_enough(folders) -> None:
    assert unlike(data_of(folders / "wild", folders / "missing"), robot()) is None
    assert unlike(data_of(folders / "wild", folders / "clipped"), robot()) is not None


def test_a_run_is_refused_and_an_export_is_not_looked_at(folders, tmp_path, monkeypatch) -> None:
    check_trained_on(tmp_path, robot())
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    experiment = types.SimpleNamespace(data=data_of(folders / "wild"))
    monkeypatch.setattr(world_data, "read_experiment", lambda run: experiment)
    for folder in (tmp_path, tmp_path / "checkpoints" / "3"):
        with pytest.raises(ConfigError, match=f"{tmp_path}: trained on .*wild"):
            check_trained_on(folder, robot())


def test_a_cost_of_rewards_needs_a_world_that_predicts_them() -> None:
    from jvgen.control.costs import pixel_goal, predicted_reward

    blind = types.SimpleNamespace(transformer=TRANSFORMER.replace(reward=False))
    with pytest.raises(ConfigError, match="predicts no rewards.*task.transformer.reward"):
        check_rewards(predicted_reward(), blind)
    check_rewards(pixel_goal(np.zeros((4, 4, 3), np.uint8)), blind)
    check_rewards(predicted_reward(), types.SimpleNamespace(transformer=TRANSFORMER))
    check_rewards(predicted_reward(), None)
