"""Counter-based random numbers and permutations: pure, uniform, complete."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvgen.data.stream import counter


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    landed = counter.permute(np.arange(size), np.array(size), np.array(key, np.uint64))
    assert sorted(landed.tolist()) == list(range(size))


def test_permute_takes_sizes_and_keys_by_element():
    sizes = np.array([5, 2**32, 1, 300])
    keys = np.array([1, 2, 3, 2**64 - 1], np.uint64)
    positions = np.array([4, 2**32 - 1, 0, 17])
    together = counter.permute(positions, sizes, keys)
    alone = [int(counter.permute(positions[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0]) for i in range(4)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_all_about_equally_likely(size):
    orders = list(itertools.permutations(range(size)))
    draws = 60 * len(orders)
    keys = np.repeat(np.array([counter.fold(7, k) for k in range(draws)], np.uint64), size)
    landed = counter.permute(np.tile(np.arange(size), draws), np.array(size), keys).reshape(draws, size)
    counts = np.unique(landed, axis=0, return_counts=True)[1]
    assert len(counts) == len(orders)
    # Chi-squared per degree of freedom: 1 for independent uniform draws.
    assert np.sum((counts - 60) ** 2 / 60) / (len(orders) - 1) < 2.5


def test_large_permutations_do_not_keep_neighbors_together():
    landed = counter.permute(np.arange(100_000), np.array(100_000), np.array(3, np.uint64))
    steps = np.abs(np.diff(landed))
    assert abs(steps.mean() / 100_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(100_000), landed)[0, 1]) < 0.02


def test_uniforms_are_uniform_and_depend_on_every_word():
    numbers = np.array([counter.uniforms(4, 0, step, slot, 0) for step in range(50) for slot in range(50)])
    assert np.all((numbers >= 0) & (numbers < 1))
    assert np.allclose(numbers.mean(0), 0.5, atol=0.03) and np.allclose(numbers.var(0), 1 / 12, atol=0.01)
    assert np.max(np.abs(np.corrcoef(numbers.T) - np.eye(4))) < 0.07
    base = (11, 22, 33, 0)
    assert np.array_equal(counter.uniforms(3, *base), counter.uniforms(9, *base)[:3])
    for place in range(4):
        other = [word + (index == place) for index, word in enumerate(base)]
        assert not np.any(counter.uniforms(3, *base) == counter.uniforms(3, *other))


def test_fold_depends_on_the_order_of_words_and_takes_negative_seeds():
    assert len({counter.fold(*words) for words in itertools.permutations((1, 2, 3))}) == 6
    assert len({counter.fold(seed, 5) for seed in (-1, 0, 1, 2**64 + 5, 2**63)}) == 5
    assert counter.fold(0) != counter.fold(0, 0)


def test_the_numbers_are_the_same_on_every_machine():
    """Frozen: a change here changes the batches of every run that is resumed."""
    assert counter.fold(1, 2, 3) == 7041752555471512236
    assert counter.uniforms(2, 1, 2).tolist() == [0.4619444609128902, 0.9521841935235394]
    landed = counter.permute(np.arange(8), np.array(8), np.array(42, np.uint64))
    assert landed.tolist() == [7, 4, 3, 0, 2, 1, 6, 5]
