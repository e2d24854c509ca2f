from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from longshort.reporting.intervals import Interval
from longshort.studies.framework.study import Outcome
from longshort.studies.language.equal_progress import (
    at_loss,
    combined,
    is_alike,
    is_stuck,
    judge_ratio,
    losses_reached,
    p_of_ratio,
    p_of_two,
    sign_test,
    step_at,
)

RUN = {
    "constant_until": 40,
    "validation_curve": [[10, 3.0], [20, 2.0], [30, 2.5], [40, 1.0], [50, 0.5]],
    "probe": {"step": [10, 20, 30, 40, 50], "max_logit": [1.0, 4.0, 9.0, 16.0, 99.0]},
}


@pytest.mark.parametrize(
    ("loss", "step"), [(3.0, 10), (2.5, 15), (2.0, 20), (1.75, 35), (1.0, 40), (0.9, None), (0.5, None)]
)
def test_the_step_is_where_the_loss_first_is_as_low(loss, step):
    assert step_at(RUN, loss) == (None if step is None else pytest.approx(step))


def test_a_loss_above_the_first_counts_from_the_first():
    assert step_at(RUN, 5.0) == 10


@pytest.mark.parametrize(("loss", "value"), [(3.0, 1.0), (2.5, 2.0), (2.0, 4.0), (1.75, 12.0), (0.9, None)])
def test_quantities_are_interpolated_in_their_logarithm(loss, value):
    assert at_loss(RUN, "max_logit", loss) == (None if value is None else pytest.approx(value))


def test_what_was_not_finite_is_not_bridged():
    broken = {**RUN, "validation_curve": [[10, 3.0], [20, None], [30, 1.0]]}
    assert step_at(broken, 2.0) == 30
    assert at_loss({**RUN, "probe": {"step": [10, 20], "max_logit": [None, 4.0]}}, "max_logit", 2.0) is None


def test_losses_that_all_reach():
    late = {**RUN, "validation_curve": [[10, 2.25], [40, 2.05]]}
    assert losses_reached([RUN]) == [2.2, 2.1, 2.0, 1.7, 1.3]
    assert losses_reached([RUN, late]) == [2.2, 2.1]


@pytest.mark.parametrize(("first", "reached"), [(2.15, [2.1, 2.0, 1.7]), (None, [])])
def test_losses_that_were_passed_before_the_first_evaluation_are_no_equal_progress(first, reached):
    easy = {**RUN, "validation_curve": [[10, first], [20, 2.15], [40, 1.6]]}
    assert losses_reached([easy]) == reached


@pytest.mark.parametrize(
    ("diverged_at", "lowest", "is_so"), [(None, 2.4, True), (None, 2.3, False), (30, 2.4, False)]
)
def test_runs_that_neither_diverge_nor_learn_are_stuck(diverged_at, lowest, is_so):
    curve = [[10, 3.0], [20, lowest], [50, 1.0]]
    assert is_stuck({"diverged_at": diverged_at, "constant_until": 40, "validation_curve": curve}) is is_so


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.92, 0.98, Outcome.CONTRADICTED),  # below 1, but alike
        (0.92, 1.05, Outcome.CONTRADICTED),
        (0.5, 0.98, Outcome.SHOWN),
        (1.2, 1.5, Outcome.CONTRADICTED),
        (0.5, 1.5, Outcome.NOT_SHOWN),
    ],
)
def test_a_ratio_is_below_above_or_alike(low, high, outcome):
    middle = math.sqrt(low * high)
    assert judge_ratio(Interval(middle, low, high, 3), 1.0) is outcome
    log_ratio = Interval(math.log(middle), math.log(low), math.log(high), 3)
    p_values = {claimed: p_of_ratio(log_ratio, claimed, 1.0) for claimed in (S, C)}
    assert p_values[C] < 0.05 if outcome is Outcome.CONTRADICTED else p_values[C] > 0.05
    assert p_values[S] < 0.05 if high < 1 else p_values[S] > 0.05


S, P, N, C = Outcome.SHOWN, Outcome.PARTLY, Outcome.NOT_SHOWN, Outcome.CONTRADICTED


@pytest.mark.parametrize(
    ("outcomes", "outcome"),
    [
        ([S, S, N], S), ([S, N, N], N), ([S, P, N], P), ([P, P], P), ([C, C, N], C), ([C, N], N),
        ([C, C, S], N), ([C, C, P], N), ([S, S, S, C], N), ([N, N], N),
    ],
)  # fmt: skip
def test_a_verdict_needs_two_losses_and_none_against(outcomes, outcome):
    assert combined(outcomes) is outcome


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_sign_test_is_binomial(first, second):
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert sign_test(first, second) == pytest.approx(wanted)


def test_alike_means_within_a_factor():
    assert is_alike(Interval(1.0, 0.95, 1.06, 3))
    assert not is_alike(Interval(1.0, 0.8, 1.06, 3))
    assert not is_alike(Interval(1.0, -math.inf, math.inf, 1))


@pytest.mark.parametrize(
    ("p_values", "p"), [([0.01, 0.02], 0.02), ([0.01, 0.5, 0.02], 0.04), ([0.4] * 4, 1.0)]
)
def test_p_values_of_two_losses_or_more(p_values, p):
    assert p_of_two(p_values) == pytest.approx(p)
