"""Matchings, and samplers that go through them: every pair its turn, no distribution changed, one program for all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.diffusion import collaborative
from jvgen.diffusion.collaborative import PairingConfig, Rounds, exhaustive, partners_of, random_matchings, repeated
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.sampler import SamplerConfig, coefficients, grid
from jvgen.diffusion.sampler import sample as sample_alone
from jvgen.diffusion.schedule import ScheduleConfig

pytestmark = pytest.mark.usefixtures("quick_compilations")

LINEAR = ScheduleConfig(kind="linear").build()
FLOW = ScheduleConfig(kind="rectified_flow").build()
LEADING = SamplerConfig(kind="ddim", steps=25, spacing="leading", steps_offset=1, step_to="stride")


@pytest.mark.parametrize("views", [1, 2, 3, 4, 5, 8])
def test_every_pair_occurs_once(views):
    rounds = exhaustive(views)
    np.testing.assert_allclose(rounds.weight.sum(axis=0), 1.0, rtol=1e-6)
    met = set()
    for partner, weight in zip(*rounds, strict=True):
        counts = weight > 0
        np.testing.assert_array_equal(partner[partner], np.arange(views))
        assert (partner == np.arange(views))[~counts].all()
        pairs = {frozenset((view, int(partner[view]))) for view in range(views) if counts[view]}
        assert not (met & pairs)
        met |= pairs
    if views > 1:
        assert met == {frozenset(pair) for pair in itertools.combinations(range(views), 2)}
        assert len(rounds.partner) == views - 1 + views % 2


@pytest.mark.parametrize("views", [2, 4, 5])
def test_random_matchings(views):
    count = 2000
    rounds = jax.jit(random_matchings, static_argnums=(1, 2))(jax.random.key(3), views, count)
    partner = np.asarray(rounds.partner)
    assert (partner != np.arange(views)).all()
    if views % 2 == 0:
        np.testing.assert_array_equal(
            np.take_along_axis(partner, partner, axis=1), np.tile(np.arange(views), (count, 1))
        )
    else:
        assert ((np.take_along_axis(partner, partner, axis=1) != np.arange(views)).sum(axis=1) == 1).all()
    share = np.stack([(partner == other).mean(axis=0) for other in range(views)])
    np.testing.assert_allclose(share, (1 - np.eye(views)) / (views - 1), atol=0.04)
    np.testing.assert_allclose(np.asarray(rounds.weight).sum(axis=0), 1.0, rtol=1e-4)


def test_matching_by_an_order():
    np.testing.assert_array_equal(partners_of(jnp.asarray([1, 3, 2, 0])), [3, 2, 1, 0])
    np.testing.assert_array_equal(partners_of(jnp.asarray([2, 0, 1])), [2, 2, 0])
    np.testing.assert_array_equal(partners_of(jnp.asarray([0])), [0])


@pytest.mark.parametrize(
    "schedule, sampler",
    [
        (LINEAR, LEADING),
        (ScheduleConfig().build(), SamplerConfig(steps=10)),
        (FLOW, SamplerConfig(kind="euler", steps=7)),
    ],
    ids=["linear", "cogvideox", "flow"],
)
def test_noise_between_repeats_restores_the_level(schedule, sampler):
    levels, steps = grid(sampler, schedule), repeated(sampler, schedule, 3)
    assert len(steps.step) == (sampler.steps - 1) * 3 + 1
    again = steps.fresh > 0
    assert again.sum() == (sampler.steps - 1) * 2 and not again[-1]
    at = steps.step[again]
    np.testing.assert_allclose(steps.keep[again] * levels.next_alpha[at], levels.alpha[at], atol=1e-12)
    power = (steps.keep[again] * levels.next_sigma[at]) ** 2 + steps.fresh[again] ** 2
    np.testing.assert_allclose(power, levels.sigma[at] ** 2, atol=1e-12)
    np.testing.assert_array_equal(steps.keep[~again], 1.0)


def test_published_noise_between_repeats():
    np.testing.assert_allclose(
        LINEAR.alpha_bar[[1, 41, 481, 921, 961]], [0.998290, 0.955678, 0.181388, 0.003914, 0.002478], atol=1e-6
    )
    steps, times = repeated(LEADING, LINEAR, 2), coefficients(LEADING, LINEAR, "epsilon").timesteps
    for time, keep, noise in ((961, 0.795754, 0.605620), (481, 0.886584, 0.462567), (41, 0.978425, 0.206603)):
        row = np.flatnonzero(times[steps.step] == time)[0]
        np.testing.assert_allclose([steps.keep[row], steps.fresh[row]], [keep, noise], atol=1e-6)


def pair_model(noisy, timesteps, scale, partner, key):
    """A prediction that depends on the partner, on the view and on nothing else."""
    split = noisy.reshape(-1, partner.shape[0], *noisy.shape[1:])
    other = jnp.take(split, partner, axis=1).reshape(noisy.shape)
    return 0.6 * noisy + 0.3 * jnp.tanh(other) + scale * 0.01


def start(rows: int) -> jax.Array:
    return jax.random.normal(jax.random.key(9), (rows, 3, 2))


def run(pairing: PairingConfig, rows: int, views: int, seed: int = 0, **changes):
    settings = {"schedule": FLOW, "sampler": SamplerConfig(kind="euler", steps=4), "prediction": "velocity", **changes}
    make = jax.jit(
        lambda noise, key: collaborative.sample(pair_model, noise, views=views, pairing=pairing, key=key, **settings)
    )
    return make(start(rows), jax.random.key(seed))


def test_two_views_without_repeats_are_the_plain_sampler():
    expected = sample_alone(
        lambda noisy, timesteps, scale: pair_model(noisy, timesteps, scale, jnp.asarray([1, 0]), None),
        start(2), schedule=FLOW, sampler=SamplerConfig(kind="euler", steps=4), prediction="velocity",
    )  # fmt: skip
    np.testing.assert_allclose(run(PairingConfig(), 2, 2), expected, atol=1e-6)
    # With two views there is one matching: however often it is drawn, and exhaustively.
    np.testing.assert_allclose(run(PairingConfig(matchings=3), 2, 2), expected, atol=1e-5)
    np.testing.assert_allclose(run(PairingConfig(kind="exhaustive"), 2, 2), expected, atol=1e-5)


@pytest.mark.parametrize("views", [3, 4])
def test_exhaustive_is_the_mean_over_partners(views):
    made = run(PairingConfig(kind="exhaustive"), views, views, sampler=SamplerConfig(kind="euler", steps=1))
    noise = start(views)
    total = sum(0.3 * jnp.tanh(jnp.roll(noise, shift, axis=0)) for shift in range(1, views)) / (views - 1)
    np.testing.assert_allclose(made, noise - (0.6 * noise + total + 0.01), atol=1e-5)


def test_examples_are_independent():
    """Two scenes of three views are each what they are alone: the same matchings, other noise."""
    noise = start(6)
    draw = {"matchings": lambda inner: random_matchings(jax.random.key(1), 3, 2)}
    both, first = (
        collaborative.sample(
            pair_model, noise[:rows], views=3, schedule=FLOW, sampler=SamplerConfig(kind="euler", steps=2),
            prediction="velocity", pairing=PairingConfig(matchings=2), key=jax.random.key(0), **draw,
        )
        for rows in (6, 3)
    )  # fmt: skip
    np.testing.assert_allclose(both[:3], first, atol=1e-6)


def test_one_program_serves_every_pairing():
    traces = []

    def counted(*arguments):
        traces.append(1)
        return pair_model(*arguments)

    make = jax.jit(
        lambda noise, key: collaborative.sample(
            counted, noise, views=4, schedule=FLOW, sampler=SamplerConfig(kind="euler", steps=5), prediction="velocity",
            pairing=PairingConfig(matchings=2, repeats=2), key=key,
        )
    )  # fmt: skip
    made = [np.asarray(make(start(4), jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max() > 1e-3
    assert len(traces) == 1


def test_guidance_scales_reach_the_network():
    weak, strong = (
        run(PairingConfig(), 2, 2, guidance=GuidanceConfig(kind="constant", scale=scale)) for scale in (1.0, 9.0)
    )
    assert np.abs(strong - weak).max() > 1e-3


def test_counts_and_invalid_configs():
    assert PairingConfig(repeats=3).evaluations(4, 25) == 73
    assert PairingConfig(repeats=4).evaluations(4, 25) == 97
    assert PairingConfig(repeats=6, matchings=2).evaluations(6, 25) == 290
    assert PairingConfig(kind="exhaustive").rounds(6) == 5
    with pytest.raises(ValueError, match="repeats = 2: dpm_solver_sde is a multistep sampler"):
        repeated(SamplerConfig(kind="dpm_solver_sde"), ScheduleConfig().build(), 2)
    with pytest.raises(ValueError, match="matchings = 0: must be at least 1"):
        PairingConfig(matchings=0).validate()
    with pytest.raises(ValueError, match="5 clips are not examples of 2 views"):
        run(PairingConfig(), 5, 2)
    assert isinstance(exhaustive(2), Rounds)
