"""Imagined sequences: the same as stepping world and policy by hand, in parts and on several devices, from any seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.control.imagination import Imagination, check_finite
from jvgen.control.world_model import row_keys, to_pixels
from jvgen.finite import NotFinite
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.parallel.mesh import MeshConfig, make_mesh
from jvgen.parallel.rules import Sharding
from tests.unit.test_world_model import TRANSFORMER, world_of

STEPS = 3


def policy(parameters, frames, keys):
    """Depends on every frame of the stack, and on the key."""
    assert frames.dtype == jnp.uint8
    means = jnp.mean(frames.astype(jnp.float32).reshape(frames.shape[0], -1, 3, 3), axis=(1, 3)) / 128 - 1
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    return jnp.tanh(parameters * (means[:, :2] - means[:, 2:]) + 0.1 * noise)


@pytest.fixture(scope="module")
def world():
    return world_of()


@pytest.fixture(scope="module")
def starts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def imagined(world, starts):
    return jax.device_get(Imagination(world.world, policy, steps=STEPS)(world.weights, 3.0, starts, 7))


def test_sequences_equal_steps_by_hand(world, starts, imagined):
    key = jax.random.key(7)
    world_key, policy_key = (jax.random.fold_in(key, purpose) for purpose in (0, 1))
    state = world._reset(world.weights, starts[:, 1:] / np.float32(255), row_keys(world_key, 5))
    seen = starts
    for number in range(STEPS):
        keys = jax.vmap(lambda one, number=number: jax.random.fold_in(one, number))(row_keys(policy_key, 5))
        shown = np.concatenate([seen[:, place] for place in range(3)], axis=-1)
        actions = policy(3.0, jnp.asarray(shown), keys)
        np.testing.assert_allclose(imagined.actions[:, number], actions, atol=1e-5)
        state, frame, rewards = world.step(state, actions)
        np.testing.assert_allclose(imagined.rewards[:, number], rewards, rtol=1e-4)
        seen = np.concatenate([seen[:, 1:], to_pixels(frame)[:, None]], axis=1)
        assert np.mean(imagined.frames[:, 3 + number] == seen[:, -1]) > 0.99
    np.testing.assert_array_equal(imagined.frames[:, :3], starts)
    assert imagined.frames.dtype == np.uint8 and imagined.frames.shape == (5, 3 + STEPS, 16, 16, 3)
    check_finite(imagined)


@pytest.mark.parametrize("options", [{"rows_at_once": 2}, {"data": 4}, {"data": 2, "rows_at_once": 3}])
def test_parts_and_devices_change_nothing(world, starts, imagined, options):
    sharding = None
    if "data" in options:
        count = options.pop("data")
        sharding = Sharding(make_mesh(MeshConfig(data=count), jax.devices()[:count]))
    made = Imagination(world.world, policy, steps=STEPS, sharding=sharding, **options)(world.weights, 3.0, starts, 7)
    differences = np.abs(np.asarray(made.frames, np.int32) - imagined.frames)
    assert np.max(differences) <= 1
    # An action reads means of 768 values: each that is rounded the other way moves it by at most 3 / 128 / 768.
    rounded = np.sum(differences, axis=(1, 2, 3, 4))[:, None, None]
    assert np.all(np.abs(made.actions - imagined.actions) <= 1e-5 + rounded * 3 / 128 / 768)
    np.testing.assert_allclose(made.rewards, imagined.rewards, rtol=1e-4)


def test_a_sequence_depends_on_the_key_and_its_number_alone(world, starts, imagined):
    imagine = Imagination(world.world, policy, steps=STEPS)
    some = imagine(world.weights, 3.0, starts[:2], 7)
    np.testing.assert_allclose(some.actions, imagined.actions[:2], atol=1e-5)
    assert np.any(np.asarray(imagine(world.weights, 3.0, starts[:2], 8).frames) != imagined.frames[:2])


def test_numbers_that_are_not_finite_are_marked(world, starts):
    made = Imagination(world.world, policy, steps=STEPS)(world.weights, jnp.float32(jnp.nan), starts, 7)
    with pytest.raises(NotFinite, match="5 of 5 imagined sequences"):
        check_finite(made)


def test_the_released_scale_of_pixels(world, starts):
    shown = []

    def looks(parameters, frames, keys):
        shown.append(frames.dtype)
        return jnp.full((frames.shape[0], 2), jnp.max(frames.astype(jnp.float32)) / 256)

    made = Imagination(world.world, looks, steps=1, pixels_scaled_twice=True)(world.weights, None, starts, 0)
    assert shown[0] == jnp.float32 and np.max(made.actions) <= 1 / 256


def test_dropout_as_in_the_released_rollouts(starts):
    """Greedy rollouts do not depend on the key, unless dropout is on."""
    world = world_of(sampling=SamplingConfig(greedy=True))

    def still(parameters, frames, keys):
        return jnp.full((frames.shape[0], 2), 0.3)

    def rewards(dropout: bool, *seeds: int) -> list[np.ndarray]:
        imagine = Imagination(dataclasses.replace(world.world, dropout=dropout), still, steps=2)
        return [np.asarray(imagine(world.weights, None, starts[:2], seed).rewards) for seed in seeds]

    (one, other), (first, second) = rewards(False, 0, 1), rewards(True, 0, 1)
    np.testing.assert_array_equal(one, other)
    assert np.all(first != one) and np.all(first != second)
    np.testing.assert_array_equal(first, rewards(True, 0)[0])


def test_bad_input(world, starts):
    with pytest.raises(ValueError, match="steps = 4: this world predicts 1..3 frames"):
        Imagination(world.world, policy, steps=4)
    with pytest.raises(ValueError, match="predicts no rewards"):
        Imagination(world_of(TRANSFORMER.replace(reward=False)).world, policy, steps=3)
    with pytest.raises(ValueError, match="takes no actions"):
        Imagination(world_of(TRANSFORMER.replace(action_width=0)).world, policy, steps=3)
    with pytest.raises(ValueError, match="a goal image"):
        Imagination(world_of(goal=True).world, policy, steps=3)
    with pytest.raises(ValueError, match="rows_at_once = 0"):
        Imagination(world.world, policy, steps=3, rows_at_once=0)
    for bad in (starts[:, :2], starts.astype(np.float32), starts[:, :, :8]):
        with pytest.raises(ValueError, match=r"expected uint8 \(sequences, 3, 16, 16, 3\)"):
            Imagination(world.world, policy, steps=3)(world.weights, 3.0, bad)
