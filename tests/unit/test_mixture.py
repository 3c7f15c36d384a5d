"""Interleave: counts stay within one of the weights and are known in closed form at any position."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvgen.data.stream.mixture import MAX_PERIOD, Interleave, check_kind_weights, integer_shares, pool_weights

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS)
def test_every_prefix_is_within_one_of_the_weights(weights):
    order = Interleave(weights)
    length = 2 * order.period + 3
    member, ordinal = order.at(np.arange(length))
    counts = np.cumsum(member[:, None] == np.arange(len(weights)), axis=0)
    owed = np.outer(np.arange(1, length + 1), np.array(weights) / sum(weights))
    assert np.max(np.abs(counts - owed)) < 1
    # The ordinal counts the member's own positions from 0.
    assert np.array_equal(ordinal, counts[np.arange(length), member] - 1)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, position=st.integers(0, 10**15))
def test_before_agrees_with_at_anywhere(weights, position):
    order = Interleave(weights)
    member, ordinal = order.at(np.array([position]))
    before, after = order.before(position), order.before(position + 1)
    assert before.sum() == position and before[member[0]] == ordinal[0]
    assert np.array_equal(after - before, np.arange(len(weights)) == member[0])
    assert np.max(np.abs(before - position * np.array(weights) / sum(weights))) < 1.5


def test_decimal_and_repeating_weights_are_exact():
    assert integer_shares([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert integer_shares([1 / 3, 2 / 3]) == (1, 2)
    assert integer_shares([1e-3, 1]) == (1, 1000)
    assert integer_shares([5.0]) == (1,)


def test_weights_without_a_short_period_are_rounded():
    weights = np.array([0.123456789, np.pi, 1.0])
    shares = np.array(integer_shares(weights.tolist()))
    assert abs(shares.sum() - MAX_PERIOD) <= 3
    assert np.allclose(shares / shares.sum(), weights / weights.sum(), atol=2 / MAX_PERIOD)


def test_a_weight_too_small_for_a_share_is_refused():
    with pytest.raises(ValueError, match="1e-07 is less than 5e-05 of their sum"):
        integer_shares([1.0, 1e-7])
    with pytest.raises(ValueError, match="not positive"):
        integer_shares([1.0, 0.0])


def test_the_share_of_a_source_is_independent_of_its_kinds():
    # Source 0 has static and dynamic clips, source 1 dynamic ones only.
    weights = pool_weights([(0, 1), (0, 2), (1, 2)], [1.0, 1.0], {})
    assert weights == [0.5, 0.5, 1.0]


def test_kinds_are_in_the_ratio_of_their_weights_when_each_source_has_one():
    weights = pool_weights([(0, 0), (1, 1), (2, 2)], [1.0, 1.0, 1.0], {"image": 0.1, "static": 0.2, "dynamic": 0.7})
    assert weights == [0.1, 0.2, 0.7]


def test_kind_weights_are_checked():
    check_kind_weights({"image": 0.0, "dynamic": 2})
    with pytest.raises(ValueError, match="kind_weights.dynamics: no such kind.*Did you mean dynamic"):
        check_kind_weights({"dynamics": 1.0})
    with pytest.raises(ValueError, match=r"kind_weights.image = -1"):
        check_kind_weights({"image": -1.0})


def test_the_longest_period_is_built_quickly():
    began = time.process_time()
    Interleave([0.111111117, 0.37, 0.9, 2.71828])
    assert time.process_time() - began < 2
