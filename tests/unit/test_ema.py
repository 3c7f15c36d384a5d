"""EMA: the formula, the warm-up, which parameters, and exactness for constant parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.training.optimization import ema
from jvgen.training.optimization.ema import EmaConfig


def follow(config: EmaConfig, values: list[float]) -> dict[str, float]:
    averaged = ema.init(config, {"net": {"w": jnp.float32(values[0])}})
    for count, value in enumerate(values[1:]):
        averaged = ema.update(config, averaged, {"net": {"w": jnp.float32(value)}}, jnp.int32(count))
    return {name: float(tree["net"]["w"]) for name, tree in averaged.items()}


def test_without_warmup_it_is_the_exponential_average():
    values = [1.0, 2.0, -1.0, 0.5]
    expected = values[0]
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    np.testing.assert_allclose(follow(EmaConfig(decays=(0.9,), warmup=False), values)["0.9"], expected, rtol=1e-6)


def test_warmup_uses_the_smaller_decay():
    values = list(np.random.default_rng(0).standard_normal(200))
    expected = {0.5: values[0], 0.9999: values[0]}
    for n, value in enumerate(values[1:]):
        for decay in expected:
            rate = min(decay, (1 + n) / (10 + n))
            expected[decay] = rate * expected[decay] + (1 - rate) * value
    found = follow(EmaConfig(decays=(0.5, 0.9999)), values)
    np.testing.assert_allclose(found["0.5"], expected[0.5], rtol=1e-4)
    np.testing.assert_allclose(found["0.9999"], expected[0.9999], rtol=1e-4)


def test_every_third_update_with_the_decay_of_three():
    values = list(np.random.default_rng(0).standard_normal(11))
    expected = values[0]
    for count, value in enumerate(values[1:]):
        if (count + 1) % 3 == 0:
            expected = 0.9**3 * expected + (1 - 0.9**3) * value
    found = follow(EmaConfig(decays=(0.9,), warmup=False, every=3), values)["0.9"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Of constant values it is the average of every update.
    warm = EmaConfig(decays=(0.9,), every=2)
    assert follow(warm, [0.5] * 7) == {"0.9": 0.5}


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_is_not_healthy_changes_nothing_and_does_not_count(every):
    config = EmaConfig(decays=(0.9,), every=every)
    start = ema.init(config, {"net": {"w": jnp.float32(1)}})
    bad = {"net": {"w": jnp.float32(jnp.nan)}}
    assert float(ema.update(config, start, bad, jnp.int32(1), jnp.bool_(False))["0.9"]["net"]["w"]) == 1
    good = {"net": {"w": jnp.float32(3)}}
    assert float(ema.update(config, start, good, jnp.int32(1), jnp.bool_(True))["0.9"]["net"]["w"]) > 1


def test_an_average_of_equal_values_is_that_value_to_the_bit():
    value = float(np.float32(0.1))
    assert follow(EmaConfig(decays=(0.9999,), warmup=False), [value] * 50) == {"0.9999": value}


def test_only_the_named_parameters_are_averaged():
    trained = {"critic": {"w": jnp.zeros(2)}, "net": {"w": jnp.ones(2)}}
    averaged = ema.init(EmaConfig(decays=(0.9,), parameters="net/"), trained)
    assert list(averaged["0.9"]) == ["net"]
    assert list(ema.update(EmaConfig(decays=(0.9,)), averaged, trained, jnp.int32(0))["0.9"]) == ["net"]


def test_each_average_is_a_copy_that_can_be_donated():
    w = jnp.ones(4)
    averaged = ema.init(EmaConfig(decays=(0.9, 0.99)), {"net": {"w": w}})
    pointers = {tree["net"]["w"].unsafe_buffer_pointer() for tree in averaged.values()} | {w.unsafe_buffer_pointer()}
    assert len(pointers) == 3


@pytest.mark.parametrize("decays", [(1.0,), (0.0,), (0.9, 0.9)])
def test_decays_that_cannot_work_are_named(decays):
    with pytest.raises(ValueError, match="decays"):
        EmaConfig(decays=decays).validate()
