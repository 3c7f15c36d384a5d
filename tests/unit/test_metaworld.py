"""Meta-World as an environment: pictures that cannot turn over unseen, states to go back to, success and rewards.

Skipped where Meta-World or OpenGL is missing; `MUJOCO_GL` chooses the renderer.
"""

import gc

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="Meta-World is not installed (jvgen[metaworld])")
pytestmark = pytest.mark.filterwarnings("ignore")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from jvgen.control.metaworld import CAMERAS, MetaWorldEnvironment  # noqa: E402


@pytest.fixture(scope="module")
def environment():
    made = MetaWorldEnvironment("reach-v3", size=64, steps=60)
    try:
        made.reset(seed=0)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield made
    made.close()


# Mean colors of the quarters of the first frame of reach-v3 with place 0: the two above, the two below.
QUARTERS = {
    "corner": ((127, 89, 86), (127, 126, 122), (108, 87, 81), (109, 97, 89)),
    "corner2": ((149, 148, 145), (134, 122, 119), (157, 146, 138), (122, 107, 104)),
    "corner3": ((181, 173, 168), (137, 90, 83), (157, 142, 132), (106, 92, 87)),
    "corner4": ((144, 138, 135), (130, 97, 94), (133, 105, 89), (105, 75, 68)),
    "topview": ((136, 82, 76), (155, 135, 128), (134, 109, 95), (141, 112, 99)),
    "behindGripper": ((123, 101, 88), (130, 106, 93), (126, 113, 110), (122, 111, 108)),
    "gripperPOV": ((139, 112, 96), (141, 110, 91), (87, 127, 115), (132, 101, 81)),
}


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_stands_upright(camera) -> None:
    """A renderer that turned frames over, or mirrored them, would exchange the quarters."""
    made = MetaWorldEnvironment("reach-v3", camera=camera, size=48)
    try:
        frame, info = made.reset(options={"place": 0})
    except RuntimeError as error:
        pytest.skip(str(error))
    made.close()
    assert info == {"place": 0} and frame.shape == (48, 48, 3) and frame.dtype == np.uint8
    quarters = frame.reshape(2, 24, 2, 24, 3).mean((1, 3))
    np.testing.assert_allclose(quarters, np.array(QUARTERS[camera]).reshape(2, 2, 3), atol=3)
    # Enough of a difference to be seen: upside down, and mirrored.
    assert np.abs(quarters[::-1] - quarters).max() > 8 and np.abs(quarters[:, ::-1] - quarters).max() > 6


def test_states_can_be_gone_back_to(environment) -> None:
    environment.reset(seed=3)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (6, 4)).astype(np.float32)
    environment.step(actions[0])
    before = environment.snapshot()
    first = [environment.step(action) for action in actions[1:]]
    environment.restore(before)
    second = [environment.step(action) for action in actions[1:]]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]


def test_plans_look_past_the_end_of_an_episode() -> None:
    """Meta-World refuses steps after its 500; the last actions of an episode are planned all the same."""
    from jvgen.control.worlds import SimulatedWorld

    made = MetaWorldEnvironment("reach-v3", size=16, steps=250)
    made.render = lambda: np.zeros((16, 16, 3), np.uint8)
    made.reset(seed=0)
    for _ in range(249):
        assert made.advance(np.zeros(4))[1:3] == (False, False)
    _, rewards = SimulatedWorld(made, 4).predict((), None, np.zeros((1, 3, 4), np.float32), None, "none")
    assert rewards.shape == (1, 3) and np.isfinite(rewards).all()
    assert made.advance(np.zeros(4))[1:3] == (False, True)


def test_the_same_seed_gives_the_same_episode(environment) -> None:
    frames = []
    for seed in (5, 5, 6):
        first, _ = environment.reset(seed=seed)
        frames.append((first, environment.step(np.ones(4))[0]))
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0][0] != frames[2][0]).any()


def test_the_first_frame_shows_the_goal_of_its_episode(environment) -> None:
    first, _ = environment.reset(seed=5)
    assert (np.abs(environment.simulator.data.site("goal").xpos - environment.simulator._target_pos) < 1e-12).all()
    environment.restore(environment.snapshot())
    np.testing.assert_array_equal(first, environment.render())


def test_frames_go_on_where_another_environment_was_closed(environment) -> None:
    environment.reset(seed=0)
    other = MetaWorldEnvironment("reach-v3", size=32)
    other.reset(seed=0)
    other.close()
    del other
    gc.collect()
    first = environment.render()
    for _ in range(5):
        last, *_ = environment.step(np.ones(4))
    assert (np.abs(last.astype(int) - first).max(-1) > 20).sum() > 100


def test_the_expert_succeeds_and_the_goal_image_shows_it(environment) -> None:
    environment.reset(seed=1)
    state = environment.snapshot()
    goal, first = environment.goal_image(), environment.render()
    np.testing.assert_array_equal(state[0], environment.snapshot()[0])
    rewards, successes, closest = [], [], np.inf
    truncated = False
    while not truncated:
        frame, reward, terminated, truncated, info = environment.step(environment.expert_action())
        assert not terminated
        rewards.append(reward)
        successes.append(info["success"])
        closest = min(closest, np.abs(frame.astype(int) - goal).mean())
    assert any(successes) and closest < 0.3 * np.abs(first.astype(int) - goal).mean()
    # The bonus comes once, with the first success.
    jump = np.diff(rewards)[successes.index(True) - 1]
    assert 8 < jump < 20 and max(rewards[successes.index(True) + 1 :], default=0) < 21
    environment.restore(state)


def test_it_is_a_gymnasium_environment(environment) -> None:
    check_env(environment, skip_render_check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "reach-v2"}, "task = 'reach-v2': no task"),
        ({"camera": "front"}, "camera = 'front': one of corner"),
        ({"action_repeat": 0}, "action_repeat = 0"),
        ({"steps": 300}, "600 simulator steps"),
    ],
)
def test_bad_input(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        MetaWorldEnvironment(**options)
