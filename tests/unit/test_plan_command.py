"""`jvgen plan`: with a world model, in the simulator and at random; what it writes; worlds that do not fit."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from jvgen.cli.main import main
from jvgen.config import ConfigError
from jvgen.control.metaworld import MetaWorldEnvironment
from jvgen.control.planning import PlannerConfig
from jvgen.control.scene_environment import SceneEnvironment
from jvgen.control.worlds import ImaginedWorld
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.video_files import decode_window
from jvgen.runs.planning import check_fit, cost_for, plan_episodes, write_outcome
from tests.unit.test_world_model import world_of

SMALL = SceneConfig(height=16, width=16, frames=6, kinds={"dynamic": 1.0}, driven=1.0, supersampling=1)
# Every call plans with a program of its own, often the same.
pytestmark = pytest.mark.usefixtures("quick_compilations")

CONFIG = PlannerConfig(samples=6, horizon=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    build_scenes(folder, SMALL, train=1, validation=2, workers=1)
    return folder


@pytest.fixture(scope="module")
def world():
    return world_of()


def test_plans_in_a_world_model(world, scenes, tmp_path) -> None:
    environment = SceneEnvironment.of_dataset(scenes)
    outcome = plan_episodes(environment, world, cost_for("pixels"), CONFIG, episodes=2, steps=3)
    assert [len(episode.actions) for episode in outcome.episodes] == [3, 3] and outcome.summary["plans_per_second"] > 0
    # Candidates, plan and reality: rows of two frames, enlarged for their labels.
    height, width, _ = outcome.sheet.shape
    assert height == 3 * (8 * 16 + 7 * 2) and width > 3 * (2 * 16 + 2) + 40
    files = write_outcome(outcome, tmp_path)
    assert [file.name for file in files] == [
        "episode_000.mp4", "episode_000.json", "episode_001.mp4", "episode_001.json", "first_plan.png", "summary.json"
    ]  # fmt: skip
    frames = decode_window(files[0].read_bytes(), range(4))
    assert frames.shape == (4, 16, 48, 3)
    assert json.loads(files[1].read_text())["actions"] == outcome.episodes[0].actions.tolist()
    again = plan_episodes(environment, world, cost_for("pixels"), CONFIG, episodes=1, steps=3)
    np.testing.assert_array_equal(again.episodes[0].actions, outcome.episodes[0].actions)


def test_predictions_do_not_depend_on_how_candidates_are_split(world) -> None:
    import jax

    rng = np.random.default_rng(0)
    start, actions = rng.integers(0, 256, (2, 16, 16, 3), np.uint8), rng.uniform(-1, 1, (5, 2, 2)).astype(np.float32)
    key = jax.random.key(3)
    whole = ImaginedWorld(world)
    frames, rewards = jax.jit(whole.predict)(whole.weights, start, actions, key)
    for options in ({"rows_at_once": 2}, {"devices": jax.devices()[:2], "rows_at_once": 3}):
        other = ImaginedWorld(world, **options)
        split = jax.jit(other.predict)(other.weights, start, actions, key)
        np.testing.assert_allclose(split[0], frames, atol=2e-5)
        np.testing.assert_allclose(split[1], rewards, rtol=2e-4)
    some = jax.jit(whole.predict, static_argnums=4)
    none, same = some(whole.weights, start, actions, key, "none")
    last, _ = some(whole.weights, start, actions, key, "last")
    assert none is None
    np.testing.assert_allclose(same, rewards, rtol=2e-4)
    np.testing.assert_allclose(last, frames[:, -1:], atol=2e-5)
    with pytest.raises(ValueError, match=r"horizon = 4: this world predicts 1\.\.3"):
        whole.predict(whole.weights, start, np.zeros((5, 4, 2), np.float32), key)


def test_the_command_without_a_model(scenes, tmp_path, capsys) -> None:
    common = ["plan", "--env", str(scenes), "--steps", "2", "--episodes", "2"]
    assert main([*common, "--with", "random", "--out", str(tmp_path / "random")]) == 0
    assert "episodes 2" in capsys.readouterr().out
    search = ["--method", "cem", "--set", "samples=4", "--set", "horizon=1", "--set", "iterations=1"]
    assert main([*common, *search, "--with", "simulator", "--out", str(tmp_path / "simulator")]) == 0
    summary = json.loads((tmp_path / "simulator" / "summary.json").read_text())
    assert summary["episodes"] == 2 and np.isfinite(summary["return"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--with model: give MODEL"),
        (["runs/none"], "neither a run directory"),
        (["--with", "random", "--steps", "0"], "--steps: '0': must be at least 1"),
        (["--with", "random", "--cost", "lpips"], "--lpips FILE"),
        (["--with", "random", "--set", "samples=0"], "samples = 0"),
        (["--with", "random", "--set", "sample=9"], "samples"),
        (
            ["--with", "simulator", "--set", "elites=0.1"],
            "--set elites=0.1: mppi does not use elites; leave it out, or",
        ),
        (
            ["--with", "simulator", "--method", "cem", "--set", "gamma=1"],
            "cem does not use gamma; leave it out, or give",
        ),
        (["--with", "simulator", "--greedy"], "--greedy: --with simulator uses no world model; leave --greedy out"),
        (["--with", "random", "--ema", "raw"], "--ema: --with random uses no world model"),
        (["--with", "random", "--rows-at-once", "3"], "--rows-at-once: --with random uses no world model"),
        (["--with", "random", "--env", "nowhere"], "--env nowhere: nowhere: no such folder"),
        (["--with", "random", "--env", "json:nothing"], "cannot be imported"),
        (["--with", "random", "--env", "builtins:dict"], "uint8 images"),
        (["--with", "random", "--env", "os:system"], "--env os:system: missing a required argument: 'command'; give"),
        (["--with", "random", "--env", "os:sep"], "is not a callable object; give a function"),
        (["--with", "random", "--env", ":system"], "cannot be imported"),
        (["--with", "random", "--env", ".os:system"], "cannot be imported"),
        (["--with", "random", "--env", "metaworld:reach-v2"], "--env metaworld:reach-v2"),
        (["--with", "simulator", "--goal", "missing.png"], "--goal missing.png"),
    ],
)
def test_bad_arguments(arguments, words, scenes, tmp_path, jvgen) -> None:
    environment = [] if "--env" in arguments else ["--env", str(scenes)]
    done = jvgen("plan", *arguments, *environment, "--out", tmp_path / "out")
    assert done.status == 2 and words in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_a_goal_of_another_size_is_refused(scenes, tmp_path, capsys) -> None:
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "goal.png")
    arguments = ["plan", "--with", "simulator", "--env", str(scenes), "--goal", str(tmp_path / "goal.png")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "goal image (8, 16, 3): the environment's frames are (16, 16, 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        # As the libraries raise it: where one is missing, where no display is, where MUJOCO_GL=disable.
        AttributeError("'NoneType' object has no attribute 'glGetError'"),
        RuntimeError("invalid value for environment variable MUJOCO_GL: disabled"),
        type("GLFWError", (Exception,), {"__module__": "glfw.GL"})("X11: The DISPLAY environment variable is missing"),
    ],
)
def test_no_opengl_is_one_message(error, monkeypatch, tmp_path, capsys) -> None:
    """Meta-World itself is not needed for this."""

    def render():
        raise error

    environment = object.__new__(MetaWorldEnvironment)
    environment.simulator = types.SimpleNamespace(render=render, mujoco_renderer=None)
    monkeypatch.setattr("jvgen.control.environments.open_environment", lambda *_, **__: environment)
    monkeypatch.setattr("jvgen.runs.planning.check_fit", lambda *_: None)
    environment.action_space = SceneEnvironment(SMALL).action_space
    environment.reset = lambda **_: environment.render()
    command = ["plan", "--with", "random", "--env", "metaworld:reach-v3", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "MuJoCo found no OpenGL: set MUJOCO_GL=egl" in printed and "Traceback" not in printed


def test_a_world_with_a_goal_is_given_one(world) -> None:
    """Also where plans are judged by rewards: its context begins with the goal."""
    spaces = SceneEnvironment(SMALL)
    plain = types.SimpleNamespace(observation_space=spaces.observation_space, action_space=spaces.action_space)
    with_goal = world_of(goal=True)
    with pytest.raises(ConfigError, match="a goal image in its context .* give --goal FILE"):
        check_fit(plain, with_goal, None, "model")
    for environment, one, goal in (
        (plain, with_goal, np.zeros((16, 16, 3))),
        (spaces, with_goal, None),
        (plain, world, None),
    ):
        check_fit(environment, one, goal, "model")


def test_an_episode_without_a_goal_image_is_planned_for_its_rewards(scenes) -> None:
    """A scripted policy does not always succeed (soccer-v3: in 10 of 12 episodes), which only plans toward it need."""
    environment = SceneEnvironment.of_dataset(scenes)
    images = []

    def goal_image():
        images.append(SceneEnvironment.goal_image(environment))
        if len(images) == 2:
            raise RuntimeError("the scripted policy does not succeed within 500 steps.")
        return images[-1]

    environment.goal_image = goal_image
    for way, cost in (("random", "pixels"), ("simulator", "reward")):
        images.clear()
        outcome = plan_episodes(environment, None, cost_for(cost), CONFIG, way=way, episodes=2, steps=2)
        assert outcome.goals[0] is not None and outcome.goals[1] is None and len(outcome.episodes) == 2
    images.clear()
    with pytest.raises(ConfigError, match=r"--seed 4: this episode has no goal image \(the scripted policy does not"):
        plan_episodes(environment, None, cost_for("pixels"), CONFIG, way="simulator", episodes=2, steps=2, seed=3)
    images[:] = images[:1]
    with pytest.raises(ConfigError, match="--seed 0: .* Give --goal FILE"):
        plan_episodes(environment, world_of(goal=True), cost_for("reward"), CONFIG, steps=2)


def test_worlds_that_do_not_fit_are_refused(world) -> None:
    big = SceneEnvironment(SMALL.replace(height=32, width=32))
    with pytest.raises(ConfigError, match=r"frames are \(32, 32, 3\), the world model's \(16, 16, 3\)"):
        check_fit(big, world, None, "model")
    environment = SceneEnvironment(SMALL)
    environment.action_space = type(environment.action_space)(-1.0, 1.0, (3,), np.float32)
    with pytest.raises(ConfigError, match="3 components, the world model's 2"):
        check_fit(environment, world, None, "model")
    environment.action_space = type(environment.action_space)(-np.inf, 1.0, (2,), np.float32)
    with pytest.raises(ConfigError, match="bounded Box"):
        check_fit(environment, world, None, "model")
    with pytest.raises(ConfigError, match=r"no snapshot\(\) and restore"):
        check_fit(type("Plain", (), {"observation_space": big.observation_space, "action_space": big.action_space})(),
                  None, None, "simulator")  # fmt: skip
