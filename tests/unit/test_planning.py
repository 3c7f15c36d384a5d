"""Plans against known optima, weights against their formula, and the loop of plan, act and look."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.control.costs import Cost, as_goal, perceptual_goal, pixel_goal, predicted_reward, weighted
from jvgen.control.planning import Planner, PlannerConfig, draw, mppi_weights, refine, vp2_cem, vp2_mppi
from jvgen.control.receding_horizon import PlannedPolicy, RandomPolicy, run_episode
from jvgen.control.worlds import SimulatedWorld, action_bounds
from jvgen.finite import NotFinite

SIDE = 12


def picture(place: Any) -> jax.Array:
    """A bright spot at a place in [-1, 1]^2, `SIDE SIDE 1` in [0, 1]."""
    line = jnp.linspace(-1, 1, SIDE)
    distance = (line[:, None] - place[1]) ** 2 + (line[None] - place[0]) ** 2
    return jnp.exp(-distance / 0.5)[..., None]


@dataclasses.dataclass
class PointWorld:
    """A point that actions move by a quarter of their size; the reward is minus its distance from the origin."""

    traceable: bool = True
    weights: Any = ()
    low = np.full(2, -1, np.float32)
    high = np.full(2, 1, np.float32)

    def predict(
        self, weights: Any, start: Any, actions: Any, key: Any, frames: str = "all"
    ) -> tuple[jax.Array, jax.Array]:
        places = jnp.clip(start + 0.25 * jnp.cumsum(actions, axis=1), -1, 1)
        return jax.vmap(jax.vmap(picture))(places), -jnp.linalg.norm(places, axis=-1)


class PointEnvironment:
    """The same world as an environment."""

    def __init__(self):
        self.place = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        self.place = np.array((options or {}).get("place", (0.6, -0.7)))
        return self._frame(), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.25 * np.asarray(action, np.float64), -1, 1)
        distance = float(np.linalg.norm(self.place))
        return self._frame(), -distance, False, False, {"success": distance < 0.15}

    def snapshot(self):
        return self.place.copy()

    def restore(self, state):
        self.place = state.copy()

    def _frame(self):
        return np.rint(np.asarray(picture(self.place)) * 255).astype(np.uint8)


def quadratic(target: np.ndarray) -> Cost:
    return Cost("quadratic", lambda target, frames, rewards, actions: jnp.sum((actions - target) ** 2, (1, 2)), target)


@pytest.mark.parametrize("traceable", [True, False])
def test_cem_finds_the_optimum_of_a_quadratic(traceable: bool) -> None:
    target = np.random.default_rng(0).uniform(-0.8, 0.8, (3, 2)).astype(np.float32)
    config = PlannerConfig(
        method="cem", samples=200, iterations=8, horizon=3, elites=0.1, correlation=0.0, standard_deviation=(0.7,)
    )
    plan = Planner(PointWorld(traceable), quadratic(target), config).plan(jnp.zeros(2), 1)
    np.testing.assert_allclose(plan.actions, target, atol=1e-2)
    lowest = np.asarray(plan.lowest)
    assert lowest.shape == (8,) and lowest[-1] < 1e-3 * lowest[0] and plan.candidates.shape == (200, 3, 2)
    assert (np.diff(lowest) <= 1e-6).sum() >= 6
    assert np.asarray(plan.deviation).max() < 0.1


def test_mppi_improves_on_its_start_and_best_is_the_cheapest_candidate() -> None:
    target = np.full((4, 2), 0.3, np.float32)
    cost, world = quadratic(target), PointWorld()
    config = PlannerConfig(horizon=4, gamma=20.0, iterations=6, samples=300)
    plan = Planner(world, cost, config).plan(jnp.zeros(2))
    start = float(np.sum(target**2))
    assert float(np.sum((plan.actions - target) ** 2)) < 0.1 * start
    one = Planner(world, cost, config.replace(iterations=1, result="best")).plan(jnp.zeros(2))
    np.testing.assert_array_equal(one.actions, one.candidates[np.argmin(one.costs)])
    np.testing.assert_allclose(one.lowest, [np.min(one.costs)])


def test_mppi_weights_are_softmax_of_costs() -> None:
    costs = jnp.array([3.0, 1.0, 2.0, jnp.inf])
    weights = np.asarray(mppi_weights(costs, 0.5))
    expected = np.exp(-0.5 * np.array([2.0, 0.0, 1.0, np.inf]))
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-6)
    assert weights.sum() == pytest.approx(1.0) and weights[3] == 0
    np.testing.assert_allclose(mppi_weights(costs, 1e4), [0, 1, 0, 0], atol=1e-6)


def test_noise_is_correlated_as_published_and_clipped() -> None:
    config = PlannerConfig(samples=20_000, horizon=3, correlation=0.5, standard_deviation=(0.2, 0.4))
    deviation = jnp.broadcast_to(jnp.array([0.2, 0.4]), (3, 2))
    wide = jnp.full(2, 9.0)
    drawn = np.asarray(draw(config, jnp.zeros((3, 2)), deviation, -wide, wide, jax.random.key(0)))
    # VP2's sampler: noise 0 = s, noise 1 = noise 0 / 2 + s/2, ...
    deviations = np.array([0.2, 0.4])
    np.testing.assert_allclose(drawn[:, 0].std(0), deviations, rtol=0.03)
    np.testing.assert_allclose(drawn[:, 1].std(0), np.sqrt(0.25 + 0.25) * deviations, rtol=0.03)
    np.testing.assert_allclose(drawn[:, 2].std(0), np.sqrt(0.125 + 0.25) * deviations, rtol=0.03)
    assert np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1] == pytest.approx(np.sqrt(0.5), abs=0.03)
    clipped = np.asarray(draw(config, jnp.full((3, 2), 5.0), deviation, -jnp.ones(2), jnp.ones(2), jax.random.key(0)))
    assert (clipped == 1.0).all()


def test_candidates_without_a_finite_cost_take_no_part() -> None:
    candidates = jnp.arange(8.0).reshape(4, 1, 2)
    costs = jnp.array([jnp.nan, 1.0, jnp.inf, 1.0])
    for config in (PlannerConfig(gamma=1.0), *(PlannerConfig(method="cem", samples=4, elites=e) for e in (0.5, 1.0))):
        mean, _ = refine(config, candidates, costs, jnp.ones((1, 2)))
        np.testing.assert_allclose(mean, [[4.0, 5.0]])
    world, broken = PointWorld(), Cost("broken", lambda w, f, r, a: jnp.full(a.shape[0], jnp.nan))
    with pytest.raises(NotFinite, match="'broken'.*no finite"):
        Planner(world, broken, PlannerConfig(samples=4, horizon=2)).plan(jnp.zeros(2))


def test_a_reward_that_overflows_is_no_best_candidate() -> None:
    """Minus infinity is no cost: the plan is the best of the finite ones."""

    def overflows(weights: Any, frames: Any, rewards: Any, actions: Any) -> jax.Array:
        return jnp.where(actions[:, 0, 0] > 0.5, -jnp.inf, jnp.sum((actions - 0.2) ** 2, (1, 2)))

    config = PlannerConfig(samples=200, horizon=1, correlation=0.0, standard_deviation=(1.0,), result="best")
    plan = Planner(PointWorld(), Cost("overflows", overflows), config).plan(jnp.zeros(2))
    np.testing.assert_allclose(plan.actions, [[0.2, 0.2]], atol=0.2)
    assert np.isneginf(plan.costs).any() and 0 <= float(plan.lowest[0]) < 0.1


@pytest.mark.parametrize("traceable", [True, False])
def test_a_cost_of_the_same_name_is_planned_for_itself(traceable: bool) -> None:
    """A goal inside a function of one's own, where the planner has only a name to compare; and nothing is compiled
    again for goals in weights."""

    def inside(goal: float) -> Cost:
        return Cost("mine", lambda weights, frames, rewards, actions: jnp.sum((actions - goal) ** 2, (1, 2)))

    config = PlannerConfig(method="cem", samples=100, iterations=6, horizon=2, elites=0.1, correlation=0.0)
    planner = Planner(PointWorld(traceable), inside(0.5), config)
    for goal in (0.5, -0.5):
        np.testing.assert_allclose(planner.toward(inside(goal)).plan(jnp.zeros(2)).actions, goal, atol=0.05)
    discounted = Planner(PointWorld(traceable), predicted_reward(0.5), config)
    assert discounted.toward(predicted_reward(0.9))._search != discounted._search
    black, white = np.zeros((SIDE, SIDE, 1)), np.ones((SIDE, SIDE, 1))
    for cost, other in (
        (pixel_goal(black), pixel_goal(white)),
        (perceptual_goal(black, last_only=True), perceptual_goal(white, last_only=True)),
        (predicted_reward(0.5), predicted_reward(0.5)),
        (weighted([(2.0, pixel_goal(black)), (1, predicted_reward())]),
         weighted([(2.0, pixel_goal(white)), (1, predicted_reward())])),
    ):  # fmt: skip
        planner = Planner(PointWorld(traceable), cost, config)
        assert planner.toward(other)._search == planner._search and planner.toward(other).cost is other
    with pytest.raises(ValueError, match="cost 'mine': this planner was made for '2 pixel goal"):
        planner.toward(inside(0.5))


def test_a_plan_continues_the_one_before() -> None:
    config = PlannerConfig(samples=2, horizon=3, standard_deviation=(1e-6,))
    planner = Planner(PointWorld(), quadratic(np.zeros((3, 2), np.float32)), config)
    before = planner.plan(jnp.zeros(2))._replace(actions=jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))
    np.testing.assert_allclose(
        planner.plan(jnp.zeros(2), 0, before).actions, [[0.3, 0.4], [0.5, 0.6], [0.5, 0.6]], atol=1e-4
    )
    cold = Planner(PointWorld(), planner.cost, config.replace(warm_start=False))
    np.testing.assert_allclose(cold.plan(jnp.zeros(2), 0, before).actions, np.zeros((3, 2)), atol=1e-4)


def test_costs() -> None:
    rng = np.random.default_rng(0)
    frames, goal = rng.uniform(size=(3, 4, 8, 8, 3)).astype(np.float32), rng.integers(0, 256, (8, 8, 3), np.uint8)
    rewards, actions = rng.normal(size=(3, 4)).astype(np.float32), np.zeros((3, 4, 2), np.float32)
    squared = ((frames - goal / 255.0) ** 2).sum((2, 3, 4))

    def value(cost: Cost) -> np.ndarray:
        return np.asarray(cost(cost.weights, jnp.asarray(frames), jnp.asarray(rewards), actions))

    np.testing.assert_allclose(value(pixel_goal(goal)), squared.sum(1), rtol=1e-5)
    np.testing.assert_allclose(value(pixel_goal(goal, last_only=True)), squared[:, -1], rtol=1e-5)
    np.testing.assert_allclose(value(predicted_reward(0.5)), -(rewards * [1, 0.5, 0.25, 0.125]).sum(1), rtol=1e-5)
    both = weighted([(2.0, pixel_goal(goal)), (10.0, predicted_reward())])
    assert both.name == "2 pixel goal + 10 predicted reward"
    np.testing.assert_allclose(value(both), 2 * squared.sum(1) - 10 * rewards.sum(1), rtol=1e-5)
    laplacian = perceptual_goal(goal)
    same = laplacian(laplacian.weights, jnp.broadcast_to(as_goal(goal), (1, 2, 8, 8, 3)), None, actions[:1])
    assert float(same[0]) < 1e-5 < value(laplacian).min()
    # Frames that are not looked at need not be there.
    assert [cost.frames for cost in (pixel_goal(goal), both, predicted_reward())] == ["all", "all", "none"]
    last = weighted([(2.0, perceptual_goal(goal, last_only=True)), (1.0, predicted_reward())])
    assert (
        last.frames == "last"
        and last.needs_rewards
        and last.name == "2 laplacian goal, last frame + 1 predicted reward"
    )
    np.testing.assert_allclose(
        last(last.weights, jnp.asarray(frames[:, -1:]), jnp.asarray(rewards), actions), value(last), rtol=1e-6
    )
    np.testing.assert_allclose(
        predicted_reward()((), None, jnp.asarray(rewards), actions), value(predicted_reward()), rtol=1e-6
    )
    for cost in (predicted_reward(), both):
        with pytest.raises(ValueError, match="needs predicted rewards"):
            cost(cost.weights, frames, None, actions)


def test_published_settings() -> None:
    mppi, cem = vp2_mppi(), vp2_cem(samples=100)
    assert (mppi.samples, mppi.iterations, mppi.horizon, mppi.gamma, mppi.correlation) == (200, 1, 10, 0.05, 0.5)
    assert (cem.samples, cem.iterations, cem.elite_count) == (100, 3, 5)


@pytest.mark.parametrize("model", ["model", "simulator"])
def test_control_reaches_the_goal_and_random_actions_do_not(model: str) -> None:
    environment = PointEnvironment()
    goal = np.asarray(picture(np.zeros(2)))
    config = PlannerConfig(method="cem", samples=40, iterations=3, horizon=3, elites=0.2, correlation=0.0)
    if model == "model":
        world = PointWorld()

        def place_of(context: np.ndarray) -> np.ndarray:
            """Where the spot is in the last frame."""
            line, image = np.linspace(-1, 1, SIDE), context[-1, ..., 0] / 255.0
            return np.array([(image.sum(0) * line).sum(), (image.sum(1) * line).sum()]) / image.sum()

        planner = Planner(world, pixel_goal(goal), config)
        plan = planner.plan
        planner.plan = lambda start, key, before: plan(jnp.asarray(place_of(start)), key, before)
        policy = PlannedPolicy(planner, 2, expected=False)
    else:
        policy = PlannedPolicy(Planner(SimulatedWorld(environment, 2), pixel_goal(goal), config), 2, key=3)
    episode = run_episode(environment, policy, 7)
    assert episode.success and episode.frames.shape == (8, SIDE, SIDE, 1) and episode.actions.shape == (7, 2)
    assert episode.rewards[-1] > -0.15 > episode.rewards[0]
    assert episode.costs[-1] < episode.costs[0] and episode.first.actions.shape == (3, 2)
    if model == "simulator":
        # A perfect model expects what happens; planning left the environment where it was.
        assert np.abs(episode.predicted.astype(int) - episode.frames[1:]).max() <= 1
    lazy = run_episode(environment, RandomPolicy(np.full(2, -0.1), np.full(2, 0.1)), 7)
    assert not lazy.success and lazy.predicted is None and np.isnan(lazy.seconds)


class Counted(PointEnvironment):
    """Counts the frames that are rendered; can step without."""

    rendered = 0

    def step(self, action):
        rest = self.advance(action)
        return self._frame(), *rest

    def advance(self, action):
        _, *rest = super().step(action)
        self.rendered -= 1
        return tuple(rest)

    def _frame(self):
        self.rendered += 1
        return super()._frame()


@pytest.mark.parametrize(("frames", "rendered"), [("all", 6), ("last", 2), ("none", 0)])
def test_frames_that_a_cost_does_not_look_at_are_not_rendered(frames, rendered) -> None:
    counted, plain = Counted(), PointEnvironment()
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2)).astype(np.float32)
    whole, rewards = SimulatedWorld(plain, 2).predict((), None, actions, None)
    some, same = SimulatedWorld(counted, 2).predict((), None, actions, None, frames)
    np.testing.assert_array_equal(same, rewards)
    assert counted.rendered == rendered
    if frames == "none":
        assert some is None
    else:
        np.testing.assert_array_equal(some, whole if frames == "all" else whole[:, -1:])
    # An environment that cannot step without rendering does all it can.
    np.testing.assert_array_equal(SimulatedWorld(plain, 2).predict((), None, actions, None, "last")[0], whole[:, -1:])


class Ending(Counted):
    """Ends for good with its second step, after which it must not be stepped."""

    def reset(self, **options):
        self.taken = 0
        return super().reset(**options)

    def advance(self, action):
        assert self.taken < 2, "stepped after its end"
        self.taken += 1
        reward, _, *rest = super().advance(action)
        return reward, self.taken == 2, *rest

    def snapshot(self):
        return super().snapshot(), self.taken

    def restore(self, state):
        super().restore(state[0])
        self.taken = state[1]


def test_an_episode_of_the_simulator_that_ends_for_good_goes_no_further() -> None:
    """Rewards after its end are none: a plan that ends the episode early was worth what it did afterwards."""
    ending, plain = Ending(), PointEnvironment()
    for environment in (ending, plain):
        environment.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 4, 2)).astype(np.float32)
    whole, expected = SimulatedWorld(plain, 2).predict((), None, actions, None)
    for frames in ("all", "last", "none"):
        seen, rewards = SimulatedWorld(ending, 2).predict((), None, actions, None, frames)
        np.testing.assert_array_equal(rewards, np.where(np.arange(4) < 2, expected, 0))
        if frames == "all":
            np.testing.assert_array_equal(seen, np.asarray(whole)[:, [0, 1, 1, 1]])
        elif frames == "last":
            np.testing.assert_array_equal(seen, whole[:, 1:2])
        assert ending.taken == 0


ANYTHING = RandomPolicy(np.full(2, -1.0), np.ones(2))


class Broken(PointEnvironment):
    def __init__(self, reward=0.0, frame=None):
        super().__init__()
        self.reward, self.frame = reward, frame

    def step(self, action):
        return self._frame() if self.frame is None else self.frame, self.reward, False, False, {}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PlannerConfig(samples=0).validate(), ValueError, "samples = 0"),
        (lambda: PlannerConfig(gamma=0.0).validate(), ValueError, "gamma = 0"),
        (lambda: PlannerConfig(elites=1.5).validate(), ValueError, "elites = 1.5"),
        (lambda: PlannerConfig(correlation=1.0).validate(), ValueError, "correlation = 1"),
        (lambda: PlannerConfig(standard_deviation=(0.0,)).validate(), ValueError, "standard_deviation"),
        (lambda: Planner(PointWorld(), pixel_goal(np.zeros((4, 4, 3))), vp2_mppi()), ValueError, "4 numbers.*2 comp"),
        (lambda: action_bounds([0, 0, 0], 1, 2), ValueError, "one number, or 2"),
        (lambda: action_bounds(0, np.inf, 2), ValueError, "finite"),
        (lambda: pixel_goal(np.zeros((2, 4, 4, 3), np.uint8)), ValueError, "one image"),
        (lambda: pixel_goal(np.full((4, 4, 3), 255.0)), ValueError, "floats must be in"),
        (lambda: weighted([]), ValueError, "at least one"),
        (lambda: predicted_reward(0.0), ValueError, "discount = 0"),
        (lambda: run_episode(PointEnvironment(), ANYTHING, 0), ValueError, "steps = 0"),
        (lambda: run_episode(Broken(np.nan), ANYTHING, 2), NotFinite, "step 0.*reward of nan"),
        (lambda: run_episode(Broken(frame=np.zeros(39)), ANYTHING, 2), ValueError, "uint8 image"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()
