"""World models: steps against rollouts, under vmap, as an environment, and errors for bad input."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.control.world_model import WorldModel, to_pixels
from jvgen.finite import NotFinite
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.models.ivideogpt.tokenizer import CompressiveTokenizer
from jvgen.models.ivideogpt.transformer import FrameTransformer
from jvgen.nn.network import Network

TOKENIZER = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=8, attention_groups=4,
)  # fmt: skip
TRANSFORMER = FrameTransformerConfig(
    vocabulary=32, width=24, layers=1, heads=3, hidden=40, max_positions=256, action_width=2, reward=True
)
FRAMES = 5


def large_parameters(shapes: dict, seed: int) -> dict:
    """Random parameters large enough that every part of the networks matters."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [(0.35 * rng.standard_normal(s.shape) + (s.ndim == 1)).astype(np.float32) for s in leaves]
    )


def world_of(transformer: FrameTransformerConfig = TRANSFORMER, **options) -> WorldModel:
    of_tokenizer = Network.of(lambda rngs: CompressiveTokenizer(TOKENIZER, rngs=rngs))
    of_transformer = Network.of(lambda rngs: FrameTransformer(transformer, rngs=rngs))
    options = {"frames": FRAMES, "sampling": SamplingConfig(top_k=8), **options}
    return WorldModel(
        TOKENIZER,
        large_parameters(of_tokenizer.shapes, 0),
        transformer,
        large_parameters(of_transformer.shapes, 1),
        **options,
    )


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return world_of()


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, 3, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def stepped(world, frames, actions):
    """Three steps from two contexts: states, frames and rewards."""
    state, made = world.reset(frames, 7), []
    states = [state]
    for number in range(3):
        state, frame, reward = world.step(state, actions[:, number])
        states.append(state)
        made.append((np.asarray(frame), np.asarray(reward)))
    return states, np.stack([f for f, _ in made], 1), np.stack([r for _, r in made], 1)


def test_a_clip_is_tokenized(world, frames):
    clip = np.concatenate([frames, frames[:, :1]], axis=1)
    context, future = world.tokenize(clip)
    layout = world.tokenizer.layout(3)
    assert context.shape == (2, 2, layout.context_tokens) and future.shape == (2, 1, layout.future_tokens)
    assert context.max() < world.tokenizer.context_codes and future.max() < world.tokenizer.future_codes
    np.testing.assert_array_equal(world.tokenize(clip / 255.0).context, context)
    with pytest.raises(ValueError, match="more than 2 frames"):
        world.tokenize(frames)


def test_steps_equal_a_rollout(world, frames, actions, stepped):
    states, of_steps, rewards = stepped
    assert (world.horizon, world.context_frames, world.action_width) == (3, 2, 2)
    whole = world.rollout(frames, actions, 7)
    np.testing.assert_allclose(of_steps, whole.frames, atol=2e-5)
    np.testing.assert_allclose(rewards, whole.rewards, rtol=2e-4)
    assert of_steps.shape == (2, 3, 16, 16, 3) and 0 <= of_steps.min() and of_steps.max() <= 1
    assert [int(state.number) for state in states] == [0, 1, 2, 3]
    np.testing.assert_array_equal(states[3].frames, of_steps[:, 1:])
    # As many frames as actions.
    np.testing.assert_array_equal(world.rollout(frames, actions[:, :2], 7).ids, whole.ids[:, :2])


def test_actions_and_seeds_matter(world, frames, actions):
    ids = [
        np.asarray(world.rollout(frames, given, seed).ids)
        for given, seed in ((actions, 7), (-actions, 7), (actions, 8))
    ]
    assert (ids[0] != ids[1]).any() and (ids[0] != ids[2]).any()
    assert to_pixels(jnp.array([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]


def test_steps_under_vmap(world, frames, stepped):
    """Candidate actions from one state, as in planning."""
    states, *_ = stepped
    candidates = jnp.asarray(np.random.default_rng(5).normal(size=(4, 2, 2)), jnp.float32)
    mapped = jax.jit(jax.vmap(lambda action: world.step(states[1], action)[1:]))(candidates)
    for number in (0, 3):
        _, frame, reward = world.step(states[1], candidates[number])
        np.testing.assert_allclose(mapped[0][number], frame, atol=2e-5)
        np.testing.assert_allclose(mapped[1][number], reward, rtol=2e-4)


def test_several_samples_of_a_context(world, frames):
    same = np.zeros((6, 3, 2), np.float32)
    made = world.rollout(frames, same, 1, samples=3)
    assert made.frames.shape[0] == 6 and (made.ids[0] != made.ids[1]).any()
    state = world.reset(frames, 1, samples=3)
    _, first, _ = world.step(state, same[:, 0])
    np.testing.assert_allclose(first, made.frames[:, 0], atol=2e-5)


# Parameters that are NaN, and the network in the error; those of the last convolution and of the reward come last.
DAMAGED = {
    "transformer": ("transformer", "head", "scores of the ids of step 1: .* transformer in float32"),
    "reward": ("transformer", "reward", "reward of step 1: .* transformer in float32"),
    "encoder": ("tokenizer", "encoder", "frame of step 1: .* tokenizer in float32"),
    "decoder": ("tokenizer", "prediction_decoder", "frame of step 1: .* tokenizer in float32"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_predictions_that_are_not_finite_are_refused(world, frames, actions, name):
    network, part, said = DAMAGED[name]
    parts = dict(getattr(world.weights, network))
    assert part in parts
    parts[part] = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), parts[part])
    damaged = copy.copy(world)  # The compiled programs are shared.
    damaged.weights = world.weights._replace(**{network: parts})
    state, frame, reward = damaged.step(damaged.reset(frames, 7), actions[:, 0])
    with pytest.raises(NotFinite, match=said):
        damaged.observed(state, frame, reward, 1)
    rolled = damaged.rollout(frames, actions, 7)
    if name == "reward":
        assert np.isnan(rolled.rewards).all() and np.isfinite(rolled.frames).all()
    else:
        assert np.isnan(rolled.frames).all()
        with pytest.raises(NotFinite, match="predicted frames hold NaN"):
            damaged.pixels(rolled.frames)


def test_refresh_continues_beyond_the_horizon(world, actions, stepped):
    states, of_steps, _ = stepped
    with pytest.raises(ValueError, match="3 frames long, the horizon .* refresh"):
        world.step(states[3], actions[:, 0])
    fresh = world.refresh(states[3])
    assert int(fresh.number) == 0
    np.testing.assert_array_equal(fresh.frames, of_steps[:, 1:])
    _, frame, _ = world.step(fresh, actions[:, 0])
    assert np.isfinite(frame).all()


def test_a_world_without_actions_or_rewards(frames):
    plain = world_of(TRANSFORMER.replace(action_width=0, reward=False))
    made = plain.rollout(frames)
    assert made.frames.shape == (2, 3, 16, 16, 3) and made.rewards is None
    state, frame, reward = plain.step(plain.reset(frames))
    assert reward is None
    with pytest.raises(ValueError, match="world without actions"):
        plain.step(state, np.zeros((2, 2)))


def test_bad_input(world, frames, actions):
    unit = frames / np.float32(255)
    for wrong, words in (
        (frames[:, :1], "starts from 2 frames of 16x16"),
        (frames[:, :, :8], "starts from 2 frames of 16x16"),
        (unit * 255, "floats must be in \\[0, 1\\]"),
        (unit * np.nan, "floats must be in"),
        (frames.astype(np.int32), "frames of int32"),
    ):
        with pytest.raises(ValueError, match=words):
            world.reset(wrong)
    state = world.reset(unit)
    for wrong, words in (
        (None, "takes actions of 2 components"),
        (np.zeros((2, 3)), "actions \\(2, 3\\): expected \\(2, 2\\)"),
        (np.full((2, 2), np.nan), "reach nan"),
        (np.full((2, 2), 1e6), "reach 1e\\+06"),
    ):
        with pytest.raises(ValueError, match=words):
            world.step(state, wrong)
    with pytest.raises(ValueError, match="give 1..3 actions"):
        world.rollout(frames, np.zeros((2, 4, 2)))
    with pytest.raises(ValueError, match="give 1..3 actions"):
        world.rollout(frames, np.zeros((2, 2)))


def test_networks_that_do_not_belong_together():
    with pytest.raises(ValueError, match="do not belong together"):
        world_of(TRANSFORMER.replace(vocabulary=40))
    with pytest.raises(ValueError, match="more than transformer.max_positions"):
        world_of(frames=60)


# Environment.


@pytest.fixture(scope="module")
def environment(world, frames):
    pytest.importorskip("gymnasium")
    from jvgen.control.environment import WorldModelEnvironment

    return WorldModelEnvironment(world, frames, steps=5)


def test_environment_passes_the_checker_of_gymnasium(environment):
    from gymnasium.utils.env_checker import check_env

    check_env(environment, skip_render_check=True)


def test_episodes(environment, world, frames):
    first, info = environment.reset(seed=3, options={"start": 1})
    np.testing.assert_array_equal(first, frames[1, -1])
    assert info == {"start": 1}
    made = []
    for number in range(5):
        frame, reward, terminated, truncated, _ = environment.step(np.array([0.3, 5.0]))
        assert frame.dtype == np.uint8 and np.isfinite(reward) and not terminated and truncated == (number == 4)
        made.append(frame)
    np.testing.assert_array_equal(environment.render(), made[-1])
    # The second component was clipped to its bound, and the same seed gives the same episode.
    environment.reset(seed=3, options={"start": 1})
    again = [environment.step(np.array([0.3, 1.0]))[0] for _ in range(3)]
    np.testing.assert_array_equal(made[:3], again)


def test_custom_rewards_and_bad_arguments(world, frames):
    pytest.importorskip("gymnasium")
    from jvgen.control.environment import WorldModelEnvironment

    own = WorldModelEnvironment(world, frames, reward=lambda frame, action: float(action.sum()))
    own.reset(seed=0)
    assert own.step(np.array([0.5, 0.25]))[1] == 0.75
    for starts, options, words in (
        (frames[:0], {}, "at least one"),
        (frames / 255, {}, "expected uint8"),
        (frames, {"low": 1.0}, "below its upper bound"),
        (frames, {"steps": 0}, "steps = 0"),
    ):
        with pytest.raises(ValueError, match=words):
            WorldModelEnvironment(world, starts, **options)
    fresh = WorldModelEnvironment(world, frames)
    with pytest.raises(ValueError, match="step before reset"):
        fresh.step(np.zeros(2))
    for start in (-1, 2):
        with pytest.raises(ValueError, match=f"start = {start}: this environment has contexts 0 to 1"):
            fresh.reset(options={"start": start})


def test_a_goal_stays_in_the_context(frames, actions):
    """The goal image is the first frame after steps and after a refresh; the last frame follows it."""
    world = world_of(goal=True)
    state = world.reset(frames, 7)
    for number in range(2):
        state, frame, _ = world.step(state, actions[:, number])
        np.testing.assert_allclose(state.frames[:, 0], frames[:, 0] / 255, atol=1e-6)
        np.testing.assert_array_equal(state.frames[:, 1], frame)
    refreshed = world.refresh(state)
    np.testing.assert_array_equal(refreshed.frames, state.frames)


def test_a_policy_library_trains_in_the_environment(environment):
    """Stable-Baselines3, where it is installed: rollouts, an update, and an evaluation in the imagined episodes."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env

    # Its convolutions want at least 36 pixels, and it warns that these frames are smaller.
    with pytest.warns(UserWarning, match="36x36"):
        check_env(environment)
    agent = stable_baselines3.A2C("MlpPolicy", environment, n_steps=5, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(10)
    assert agent.num_timesteps == 10
    assert any((old != new).any() for old, new in zip(before, agent.policy.parameters(), strict=True))
    action, _ = agent.predict(environment.reset(seed=0)[0])
    assert environment.action_space.contains(action)
