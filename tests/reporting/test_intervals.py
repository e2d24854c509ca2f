from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from longshort.reporting.intervals import (
    confidence_interval,
    log_slopes,
    paired_difference,
    paired_log_ratio,
    prediction_interval,
    slope,
)

numbers = st.floats(-1e3, 1e3)


def test_students_interval_of_three_values():
    interval = confidence_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, from a table
    assert (interval.mean, interval.count) == (2.0, 3)
    assert interval.low == pytest.approx(2 - half)
    assert interval.high == pytest.approx(2 + half)


def test_the_next_value_lies_wider_than_the_mean():
    interval = prediction_interval([1.0, 2.0, 3.0])
    assert interval.high - interval.mean == pytest.approx(4.302652729911275 * math.sqrt(4 / 3))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, None], [1.0, math.nan, 2.0], [math.inf, 1.0]])
def test_what_is_not_known_has_no_ends(values):
    interval = confidence_interval(values)
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert not interval.is_known


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_a_shift_of_all_values_shifts_the_interval(values, shift):
    before, after = confidence_interval(values), confidence_interval([value + shift for value in values])
    assert after.low == pytest.approx(before.low + shift, abs=1e-6)
    assert after.high == pytest.approx(before.high + shift, abs=1e-6)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6))
def test_pairs_cancel_what_seeds_share(pairs):
    """Equal differences leave no width, however unlike the seeds are."""
    first = {seed: value for seed, (value, _) in enumerate(pairs)}
    second = {seed: value - 1.5 for seed, value in first.items()}
    interval = paired_difference(first, second)
    assert interval.low == pytest.approx(1.5, abs=1e-9)
    assert interval.high == pytest.approx(1.5, abs=1e-9)


def test_pairs_are_matched_by_seed():
    assert paired_difference({0: 1.0, 1: 2.0, 2: 9.0}, {1: 1.0, 0: 0.0}).mean == 1.0


def test_a_lost_seed_makes_the_ratio_unknown():
    assert not paired_log_ratio({0: 1.0, 1: None}, {0: 2.0, 1: 2.0}).is_known
    assert not paired_log_ratio({0: 1.0, 1: 0.0}, {0: 2.0, 1: 2.0}).is_known


def test_the_ratio_is_that_of_geometric_means():
    interval = paired_log_ratio({0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0}).exp()
    assert interval.mean == pytest.approx(4.0)
    assert interval.low < 4.0 < interval.high


@given(numbers, numbers, st.lists(st.integers(-20, 20), min_size=2, max_size=6, unique=True))
def test_the_slope_of_a_line_is_its_slope(a, b, places):
    assert slope([(x, a + b * x) for x in places]) == pytest.approx(b, abs=1e-6)


def test_slopes_are_taken_per_seed():
    by_size = {10: {0: 3.0, 1: 5.0, 2: 7.0}, 100: {0: 30.0, 1: 5.0, 2: None}}
    assert log_slopes(by_size) == {0: pytest.approx(1.0), 1: pytest.approx(0.0), 2: None}


@pytest.mark.parametrize("bound", [0.0, 1.9, 2.5])
def test_p_values_are_those_of_the_t_test(bound):
    values = [1.0, 2.0, 2.2, 3.1]
    wanted = ttest_1samp(values, bound)[1]
    assert confidence_interval(values).p_value(bound) == pytest.approx(wanted)


def test_p_values_of_what_is_not_known():
    assert confidence_interval([1.0]).p_value(0.0) == confidence_interval([1.0, None]).p_value(0.0) == 1
    assert (
        confidence_interval([1.0, 1.0]).p_value(0.0) == 0
        and confidence_interval([1.0, 1.0]).p_value(1.0) == 1
    )
