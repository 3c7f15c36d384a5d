"""What a run of reinforcement learning acts on, remembers and draws: ratios, alignment of rewards, bad input."""

import contextlib
import functools
import multiprocessing
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.config import ConfigError, validate_tree
from jvgen.control.collection import (
    EnvironmentSpec,
    SteppedEnvironment,
    TooManyEnvironmentFailures,
    describe_environment,
)
from jvgen.control.imagination import Imagined
from jvgen.finite import NotFinite
from jvgen.interop.to_torch import export_networks
from jvgen.models.ivideogpt.objective import symlog
from jvgen.reinforcement import experience as module
from jvgen.reinforcement import pretrained
from jvgen.reinforcement.config import ReleasedFaults
from jvgen.reinforcement.experience import Experience
from jvgen.reinforcement.task import ACTIONS, REWARDS, VIDEO
from jvgen.tasks.task import ExperienceContext
from tests import tiny_reinforcement as tiny
from tests.unit.test_collection import Counting

SPEC = EnvironmentSpec("Scenes", (16, 16, 3), (-1.0, -1.0), (1.0, 1.0), "Box", 2, True)


def value_of(frames: np.ndarray) -> np.ndarray:
    """The reward that these tests' environment gives for a frame, a function of that frame alone."""
    return frames.mean(axis=(-3, -2, -1)).astype(np.float32) / 16


def make(config, tmp_path, monkeypatch) -> Experience:
    """An experience without processes."""
    monkeypatch.setattr(module, "described", lambda config, source: SPEC)
    context = ExperienceContext(tiny.data("nowhere"), 0, tmp_path, None, print, lambda: None)
    return Experience(config.build(), context)


def remember(ring, episodes: int, steps: int, seed: int = 0, history: int = 0, darkest: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(episodes):
        count = steps + 1 + history
        gray = rng.integers(darkest, darkest + 128, (count, 1, 1, 1), dtype=np.uint8)
        frames = np.broadcast_to(gray, (count, 16, 16, 3))
        ring.begin(frames[history], history=frames[:history])
        for frame in frames[history + 1 :]:
            ring.add(frame, rng.uniform(-1, 1, 2), float(value_of(frame)))


@pytest.mark.parametrize(("ratio", "real"), [(0.5, 4), (0.25, 2), (0.0, 0), (1.0, 8)])
def test_batches_are_real_and_imagined_in_the_ratio(ratio, real, tmp_path, monkeypatch):
    config = tiny.task()
    experience = make(config.replace(imagination=config.imagination.replace(real_ratio=ratio)), tmp_path, monkeypatch)
    remember(experience.real, 3, 6)
    remember(experience.imagined, 3, 3, history=2, darkest=128)
    drawn = experience._transitions(7)
    frames = drawn["transitions/next_frames"]
    assert frames.shape == (4, 2, 2, 16, 16, 9) and drawn["transitions/rewards"].shape == (4, 2, 2)
    # In each of the two updates, over rows of the batch.
    share = np.sum(frames[..., 0, 0, -1] < 128, axis=(0, 2))
    assert share.tolist() == [real, real]
    again = experience._transitions(7)
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)


def test_real_transitions_have_the_reward_of_the_frame_that_they_lead_to(tmp_path, monkeypatch):
    experience = make(tiny.task(imagination=None), tmp_path, monkeypatch)
    remember(experience.real, 4, 8)
    drawn = experience.real.draw(64, np.random.default_rng(0), steps=1, stack=1)
    np.testing.assert_allclose(drawn.rewards, value_of(drawn.next_frames), rtol=1e-6)


@pytest.mark.parametrize("late", [False, True])
def test_the_world_model_learns_the_reward_of_the_frame_it_predicts(late, tmp_path, monkeypatch):
    """With the released fault it learns that of the frame after it."""
    config = tiny.task()
    released = config.imagination.released.replace(reward_one_step_late=late)
    config = config.replace(imagination=config.imagination.replace(released=released))
    experience = make(config, tmp_path, monkeypatch)
    remember(experience.real, 4, 8)
    clips = experience._clips(3)
    assert clips["short_video"].shape == (4, 4, 16, 16, 3)
    targets = []

    def loss(model, tokens, layout, *, actions, rewards, **unused):
        targets.append((actions, rewards))
        zero = jnp.zeros(())
        return types.SimpleNamespace(cross_entropy=zero, accuracy=zero, reward=zero, action_reconstruction=None)

    monkeypatch.setattr("jvgen.tasks.world_model.loss_terms", loss)
    task = config.build()
    parameters = {
        name: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), task.networks[name].shapes)
        for name in ("tokenizer", "transformer")
    }

    @jax.jit
    def given_to_the_loss(parameters, batch):
        task._transformer_loss(parameters, {}, batch, jax.random.key(0))
        (given,) = targets
        return given

    actions, rewards = given_to_the_loss(parameters, dict(clips) | {"slot": np.arange(4)})
    # Frames 2, 3, 4 of clips of 5 are predicted, from the actions at 1, 2, 3.
    np.testing.assert_array_equal(actions, clips[ACTIONS][:, 1:4])
    true = symlog(jnp.asarray(value_of(clips[VIDEO])))
    if late:
        np.testing.assert_allclose(rewards[:, :-1], true[:, 3:], rtol=1e-5)
        np.testing.assert_array_equal(rewards[:, -1], symlog(jnp.asarray(clips[REWARDS][:, 4])))
    else:
        np.testing.assert_allclose(rewards, true[:, 2:], rtol=1e-5)


def imagined(experience: Experience, count: int, finite: bool = True) -> Imagined:
    """What a world model that has learnt the rewards exactly would imagine."""
    rng = np.random.default_rng(1)
    starts = experience.real.draw_stacks(count, rng, 3)
    future = np.broadcast_to(rng.integers(0, 256, (count, 3, 1, 1, 1), dtype=np.uint8), (count, 3, 16, 16, 3))
    actions = rng.uniform(-1, 1, (count, 3, 2)).astype(np.float32)
    return Imagined(np.concatenate([starts, future], axis=1), actions, value_of(future), np.full(count, finite))


def test_imagined_transitions_have_the_reward_of_the_frame_that_they_lead_to(tmp_path, monkeypatch):
    experience = make(tiny.task(), tmp_path, monkeypatch)
    remember(experience.real, 4, 8)
    made = imagined(experience, 5)
    monkeypatch.setattr(experience, "_rollouts", lambda step, count, uniform, key: made)
    facts = experience._imagine(7, first=False)
    assert facts == {"imagined_reward": pytest.approx(float(made.rewards.mean()))}
    one = experience.imagined.draw(64, np.random.default_rng(0), steps=1, stack=1)
    np.testing.assert_allclose(one.rewards, value_of(one.next_frames), rtol=1e-6)
    # The first stack shows the recorded frames, and no transition starts before them.
    whole = experience.imagined.draw(32, np.random.default_rng(0), steps=3, discount=0.5, stack=3)
    for frames, action, reward, after in zip(
        whole.frames, whole.actions, whole.rewards, whole.next_frames, strict=True
    ):
        (row,) = [
            n for n in range(5) if np.array_equal(np.concatenate(list(made.frames[n, :3]), axis=-1), frames)
            and np.array_equal(made.actions[n, 0], action)
        ]  # fmt: skip
        assert reward == pytest.approx(float(np.sum(made.rewards[row] * 0.5 ** np.arange(3))), rel=1e-5)
        np.testing.assert_array_equal(np.concatenate(list(made.frames[row, 3:]), axis=-1), after)


def test_imagination_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    experience = make(tiny.task(), tmp_path, monkeypatch)
    remember(experience.real, 4, 8)
    experience._state = types.SimpleNamespace(
        parameters={name: {} for name in ("encoder", "actor", "tokenizer", "transformer")}
    )
    experience._prepare = lambda *parameters: None

    class Diverged:
        start_frames = 3

        def __call__(self, *given):
            return imagined(experience, 2, finite=False)

    experience._imagination = Diverged()
    with pytest.raises(NotFinite, match="2 of 2 imagined sequences"):
        experience._imagine(3, first=True)


def test_flags_of_released_faults_reach_what_they_change(tmp_path, monkeypatch):
    config = tiny.task()

    def built(**flags) -> Experience:
        released = config.imagination.released.replace(**flags)
        changed = config.replace(imagination=config.imagination.replace(released=released))
        return make(changed, tmp_path / "_".join(flags), monkeypatch)

    plain, scaled, dropped = built(), built(pixels_scaled_twice=True), built(dropout_in_rollouts=True)
    assert not plain._imagination.pixels_scaled_twice and not plain._imagination.world.dropout
    assert scaled._imagination.pixels_scaled_twice and not scaled._imagination.world.dropout
    assert dropped._imagination.world.dropout and not dropped._imagination.pixels_scaled_twice


def test_episodes_have_the_steps_of_the_config(tmp_path, monkeypatch):
    """In training and in evaluation, whatever the environment is: one of the user's own is not told of them."""
    experience = make(tiny.task(episode_steps=6), tmp_path, monkeypatch)
    assert experience._workers["steps"] == experience._environment._steps == experience._evaluation._steps == 6


def test_imagining_beyond_the_frames_of_clips_is_told(tmp_path, monkeypatch):
    """Clips of 5 frames have 3 after their context."""
    said = []
    monkeypatch.setattr(module, "described", lambda config, source: SPEC)
    for horizon in (3, 4):
        config = tiny.task()
        config = config.replace(imagination=config.imagination.replace(horizon=horizon))
        folder = tmp_path / str(horizon)
        context = ExperienceContext(tiny.data("nowhere"), 0, folder, None, said.append, lambda: None)
        Experience(config.build(), context)
    (line,) = said
    assert "horizon = 4, but clips of 5 frames (data.buckets) train the 3 frames" in line and line.endswith("here 6.")


def test_what_a_checkpoint_holds_is_what_the_next_start_goes_on_from(tmp_path, monkeypatch):
    experience = make(tiny.task(), tmp_path, monkeypatch)
    remember(experience.real, 2, 6)
    experience._document |= {"step": 9, "real": experience.real.rows_added, "actions": [[0.5, -1.0]], "taken": 20}
    saved = experience.state(9)
    remember(experience.real, 1, 6, seed=1)
    again = make(tiny.task(), tmp_path, monkeypatch)
    again.check_state(saved)
    again.resume(saved)
    assert again.real.rows_added == 14 and again.environment_steps == 40 and again.state(9) == saved
    for changes, other in (({"manifest": "elsewhere"}, "elsewhere train"), ({"plan": "test"}, "nowhere test")):
        with pytest.raises(ValueError, match=f"acted in {other}, this one acts in nowhere train"):
            again.check_state(saved | changes)


def test_an_episode_goes_on_where_it_was_left(tmp_path):
    """A simulator that is started again takes the same actions; one that fails starts its episode again."""
    first = SteppedEnvironment(Counting, stack=2)
    with contextlib.closing(first):
        first.begin(3)
        for action in (5.0, 6.0):
            assert first.step(np.float32([action, 0])) is None
        actions, frame, observation = first.actions, first.last_frame, first.observation
    fails_once = functools.partial(Counting, "dies", str(tmp_path / "failed"))
    with SteppedEnvironment(fails_once, stack=2, failure_budget=1) as again:
        again.begin(3, actions)
        np.testing.assert_array_equal(again.last_frame, frame)
        np.testing.assert_array_equal(again.observation, observation)
        assert again.step(np.float32([7, 0])) is None and again.failures == 1
        # The episode was restarted: nothing of it was taken yet.
        assert again.actions == []
        made = [again.step(np.float32([number, 0])) for number in range(6)]
        assert made[:5] == [None] * 5 and made[5].rewards.tolist() == [0, 1, 2, 3, 4, 5] and made[5].failures == 1
    with SteppedEnvironment(Counting, stack=2) as shorter:
        # Its episodes have three steps now.
        shorter.begin(0, [np.zeros(2, np.float32)] * 5)
        assert shorter.actions == [] and shorter.step(np.float32([1, 0])) is None
    with SteppedEnvironment(functools.partial(Counting, "nan"), failure_budget=0) as broken:
        broken.begin(0)
        broken.step(np.float32([0, 0]))
        broken.step(np.float32([0, 0]))
        with pytest.raises(TooManyEnvironmentFailures, match="a reward of nan at step 2"):
            broken.step(np.float32([0, 0]))


def test_an_interrupt_of_the_terminal_does_not_end_an_episode():
    with SteppedEnvironment(Counting, stack=2, failure_budget=0) as environment:
        environment.begin(3)
        (process,) = [one for one in multiprocessing.active_children() if one.is_alive()]
        os.kill(process.pid, signal.SIGINT)
        assert environment.step(np.float32([1, 0])) is None and len(environment.actions) == 1


def no_graphics():
    raise RuntimeError("MuJoCo found no OpenGL: set MUJOCO_GL=egl")


def test_an_environment_that_cannot_start_is_one_line():
    with pytest.raises(ValueError, match=r"^the environment cannot be started: RuntimeError: MuJoCo found no OpenGL"):
        describe_environment(no_graphics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": (32, 32, 3)}, r"its frames are \(32, 32, 3\), not \(16, 16, 3\); set task.resolution"),
        ({"low": None, "actions": "Discrete(4)"}, r"its actions are Discrete\(4\)"),
        ({"low": (-1.0,), "high": (1.0,)}, "1 components, but task.action_width = 2"),
        ({"low": (0.0, 0.0)}, r"between \[0.0, 0.0\] and \[1.0, 1.0\].*RescaleAction"),
        ({"has_expert": False}, "no expert_action.*task.demonstrations = 2"),
    ],
)
def test_environments_that_do_not_fit(changes, message):
    spec = EnvironmentSpec(**{field: getattr(SPEC, field) for field in SPEC.__dataclass_fields__} | changes)
    with pytest.raises(ConfigError, match=message):
        tiny.task().check_environment("scenes", spec)
    tiny.task().check_environment("scenes", SPEC)


def test_a_world_model_of_other_recordings(tmp_path, monkeypatch):
    """What is compared is tested in test_world_data.py; here, that a run is refused and an export is not looked at."""
    environment = types.SimpleNamespace()
    monkeypatch.setattr(pretrained, "trained_experiment", lambda folder: types.SimpleNamespace(data=None))
    monkeypatch.setattr(pretrained, "unlike", lambda data, environment: "trained on another camera.")
    pretrained.check_trained_on(tmp_path, environment)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="pretrained = .*: trained on another camera. .*accept_other_data"):
        pretrained.check_trained_on(tmp_path, environment)
    with pytest.raises(ConfigError, match="neither a run directory nor a folder with exported tokenizer/"):
        config = tiny.task().imagination.replace(pretrained=str(tmp_path / "nothing"))
        monkeypatch.undo()
        pretrained.read_pretrained(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        # The network that has no actions learns them anew, wherever they are used.
        ({"action_width": 0}, None),
        ({"action_width": 3, "action_everywhere": True}, None),
        ({"action_everywhere": True}, "its transformer has action_everywhere = True, the run's is False"),
        ({"layers": 2}, "its transformer has layers = 2, the run's is 1"),
    ],
)
def test_a_pretrained_transformer_is_used_as_it_was_trained(changes, message, tmp_path):
    found = tiny.TRANSFORMER.replace(**changes)
    with contextlib.nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        pretrained._check_same("transformer", found, tiny.TRANSFORMER, tmp_path)


def test_a_run_starts_with_the_networks_of_an_export(tmp_path):
    """Every array of both networks, as the run has them; an action head that the export lacks is left to the run."""
    config = tiny.task().imagination
    task, rng = tiny.task().build(), np.random.default_rng(0)
    shapes = {name: task.networks[name].shapes for name in ("tokenizer", "transformer")}
    made = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    export_networks({"tokenizer": tiny.TOKENIZER, "transformer": tiny.TRANSFORMER}, made, tmp_path / "world")
    read = pretrained.read_pretrained(config.replace(pretrained=str(tmp_path / "world")))
    assert jax.tree.structure(read) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, read, made)

    bare = {name: value for name, value in made["transformer"].items() if name not in ("action", "reward")}
    without = tiny.TRANSFORMER.replace(action_width=0, reward=False)
    export_networks({"tokenizer": tiny.TOKENIZER, "transformer": without}, made | {"transformer": bare}, tmp_path / "b")
    read = pretrained.read_pretrained(config.replace(pretrained=str(tmp_path / "b")))
    assert jax.tree.structure(read["transformer"]) == jax.tree.structure(bare)


def test_restarts_count_updates_of_the_tokenizer():
    """It is updated in steps 0 and 1, then in every fourth: 2, 6, 10."""
    task = tiny.task().build()
    (tokenizer,) = [objective for objective in task.objectives() if objective.name == "tokenizer"]
    steps = range(20)
    before = [sum(bool(tokenizer.active(earlier)) for earlier in range(step)) for step in steps]
    assert [int(task.tokenizer_updates(jnp.int32(step))) for step in steps] == before


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_moving_pixels_count_more_in_updates_of_the_tokenizer(weight):
    """A quarter of the only future frame moves: its part of the mean error is counted eleven times."""
    config = tiny.task()
    task = config.replace(imagination=config.imagination.replace(moving_weight=weight)).build()
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape) + (s.ndim == 1), jnp.float32),
        {"tokenizer": task.networks["tokenizer"].shapes},
    )
    video = np.full((4, 3, 16, 16, 3), 128, np.uint8)
    video[:, 2, :4, :, 1] = 230
    batch = {"short_video": jnp.asarray(video), "slot": jnp.arange(4)}

    @jax.jit
    def run(parameters, batch, pixels):
        made = task.networks["tokenizer"].apply(parameters["tokenizer"], pixels).future
        return task._tokenizer_loss(parameters, {}, batch, jax.random.key(0))[1], made

    metrics, made = run(parameters, batch, video / np.float32(255))
    error = np.abs(np.asarray(made)[:, 0] - video[:, 2] / np.float32(255))
    wanted = error.mean() + weight * error[:, :4].mean() / 4
    assert float(metrics["future/reconstruction"]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.replace(resolution=32), "resolution = 32 and action_width = 2; make them equal"),
        (
            lambda c: c.replace(imagination=c.imagination.replace(transformer=tiny.TRANSFORMER.replace(reward=False))),
            "predicts no rewards",
        ),
        (lambda c: c.replace(imagination=c.imagination.replace(horizon=60)), "more than transformer.max_positions"),
        (lambda c: c.replace(imagination=c.imagination.replace(horizon=2)), "horizon = 2: .* agent.steps = 3"),
        (lambda c: c.replace(episode_steps=2), "episode_steps = 2: .* agent.steps = 3"),
        (
            lambda c: c.replace(
                imagination=c.imagination.replace(
                    transformer=tiny.TRANSFORMER.replace(attention_dropout=0.0),
                    released=ReleasedFaults(dropout_in_rollouts=True),
                )
            ),
            "attention_dropout = 0: there is no dropout to leave on",
        ),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        validate_tree(change(tiny.task()))


def test_clips_fit_into_episodes():
    (bucket,) = tiny.data("nowhere").buckets
    tiny.task(episode_steps=4).check_bucket(bucket)
    with pytest.raises(ValueError, match="clips of 5 frames: episodes of task.episode_steps = 3 have 4"):
        tiny.task(episode_steps=3).check_bucket(bucket)


def test_batches_that_do_not_divide():
    bucket = tiny.data("x").buckets[0]
    with pytest.raises(ValueError, match="agent.batch_size = 8 is not a multiple of batch_size = 3"):
        tiny.task().check_bucket(bucket.replace(batch_size=3))
    with pytest.raises(ValueError, match="task.resolution = 16"):
        tiny.task().check_bucket(bucket.replace(height=32, width=32))
    with pytest.raises(ConfigError, match="2 sources"):
        module.check_data(tiny.data("x").replace(sources=tiny.data("x").sources * 2))
