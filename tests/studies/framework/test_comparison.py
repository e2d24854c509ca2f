from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.studies.planted import language_result, swept

from longshort.reporting.intervals import Interval
from longshort.studies.framework.comparison import (
    edge_text,
    holm,
    interval_text,
    judge_below,
    measure_arms,
    rate_text,
    weaker,
)
from longshort.studies.framework.study import Claim, Outcome, Verdict, not_measured
from longshort.studies.framework.sweep import plan_arms
from longshort.studies.language.arms import LS, MHSA, tiny

SETTING = tiny(512, batch=1, steps=100)
ARMS = SETTING.arms((MHSA, LS))
SEEDS = range(3)
CLAIM = Claim("C", "It is so.", "It is not.", "Shown if it is.")


def filled(loss_of, best=3e-3):
    """Results for the plan of both arms; the loss falls by 2 nats along the training."""
    results = {}
    while True:
        left = [trial for trial in plan_arms(ARMS, SEEDS, results).trials if trial.key not in results]
        if not left:
            return results
        for trial in left:
            loss = loss_of(trial) + swept(trial, best)
            results[trial.key] = language_result(trial, loss=loss, max_logit=10.0)


def test_arms_are_there_when_all_their_trials_are():
    results = filled(lambda trial: 2.0)
    last = plan_arms(ARMS, SEEDS, results).trials[-1]
    assert last.arm == LS.name
    del results[last.key]
    assert list(measure_arms(ARMS, SEEDS, results)) == [MHSA.name]
    at_best = measure_arms(ARMS, SEEDS, results, ("best",))
    assert list(at_best) == [MHSA.name, LS.name]
    assert [list(arm.by_rate) for arm in at_best.values()] == [["best", "lower"], ["best"]]


def test_values_are_those_of_each_arms_own_rate():
    arms = measure_arms(ARMS, SEEDS, filled(lambda trial: 2.0 + 0.1 * trial.seed))
    assert arms[LS.name].values("validation_loss") == {
        seed: pytest.approx(2.0 + 0.1 * seed) for seed in SEEDS
    }
    assert arms[LS.name].values("validation_loss", "lower")[0] == pytest.approx(2.3)
    assert arms[LS.name].mean("validation_loss") == pytest.approx(2.1)
    assert arms[LS.name].settings["train"]["learning_rate"] == 3e-3


def test_edges_are_named_in_the_evidence():
    inside = measure_arms(ARMS, SEEDS, filled(lambda trial: 2.0))
    assert edge_text(inside.values()) == ""
    falling = filled(lambda trial: 2.0 + trial.settings["train"]["learning_rate"], best=0.0)
    at_edge = measure_arms(ARMS, SEEDS, falling)
    assert edge_text([at_edge[LS.name]]) == " Best rate at the edge of the sweep: LS (1e-4)."
    assert at_edge[LS.name].sweep.lower == 3e-5  # the next lower rate is run all the same


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (Outcome.SHOWN, Outcome.SHOWN, Outcome.SHOWN),
        (Outcome.SHOWN, Outcome.PARTLY, Outcome.PARTLY),
        (Outcome.PARTLY, Outcome.NOT_SHOWN, Outcome.NOT_SHOWN),
        (Outcome.CONTRADICTED, Outcome.CONTRADICTED, Outcome.CONTRADICTED),
        (Outcome.CONTRADICTED, Outcome.SHOWN, Outcome.NOT_SHOWN),
        (Outcome.CONTRADICTED, Outcome.NOT_MEASURED, Outcome.NOT_MEASURED),
    ],
)
def test_the_weaker_outcome_counts(first, second, outcome):
    assert weaker(first, second) is weaker(second, first) is outcome


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ((0.01, 0.04), Outcome.SHOWN),
        ((0.01, 0.05), Outcome.PARTLY),
        ((0.2, 0.99), Outcome.PARTLY),
        ((0.2, 1.0), Outcome.NOT_SHOWN),
        ((1.01, 2.0), Outcome.CONTRADICTED),
        ((-math.inf, math.inf), Outcome.NOT_SHOWN),
    ],
)
def test_judging_a_ratio(ends, outcome):
    low, high = ends
    assert judge_below(Interval(0.5, low, high, 3), 1 / 20, 1.0) is outcome


def test_numbers_in_words():
    assert interval_text(Interval(0.25079, 0.207, 0.3038, 3)) == "0.251 [0.207, 0.304]"
    assert interval_text(Interval(1.5, -math.inf, math.inf, 1)) == "1.5"
    assert interval_text(Interval(math.nan, -math.inf, math.inf, 1)) == "not finite"
    assert [rate_text(rate) for rate in (3e-3, 1e-2, 0.1, 0.0316, 100.0)] == [
        "3e-3", "1e-2", "1e-1", "3.16e-2", "1e2"
    ]  # fmt: skip


def test_holm_corrects_what_claims_something():
    def verdict(name, outcome, p):
        return Verdict(Claim(name, "", "", ""), outcome, "numbers.", p, here="a number")

    given = [
        verdict("a", Outcome.SHOWN, 0.001), verdict("b", Outcome.PARTLY, 0.03),
        verdict("c", Outcome.SHOWN, None),
        verdict("d", Outcome.NOT_SHOWN, 0.5), verdict("e", Outcome.CONTRADICTED, 0.0125),
    ]  # fmt: skip
    found = {v.claim.id: v for v in holm(given, pending=0)}
    assert [v.outcome for v in found.values()] == [
        Outcome.SHOWN, Outcome.NOT_SHOWN, Outcome.SHOWN, Outcome.NOT_SHOWN, Outcome.CONTRADICTED
    ]  # fmt: skip
    assert found["b"].evidence == (
        "numbers. The outcome 'partly shown' does not stand: its p-value, 0.03, is 0.06 after Holm's "
        "correction for 4 tests."
    )
    assert [v.p for v in found.values()] == pytest.approx([0.004, 0.06, None, 0.5, 0.0375])
    assert found["a"].evidence == "numbers."
    assert found["b"].here == "a number; 'partly shown' fails Holm's correction, p = 0.06"
    assert {found[name].here for name in "acde"} == {"a number"}
    assert holm([], pending=3) == []


@pytest.mark.parametrize(
    ("partly_p", "p", "outcome", "corrected", "text"),
    [
        (0.001, 0.01, Outcome.SHOWN, 0.03, "numbers."),
        (
            0.001,
            0.02,
            Outcome.PARTLY,
            0.003,
            "numbers. The outcome 'shown' does not stand: its p-value, 0.02",
        ),
        (0.03, 0.04, Outcome.NOT_SHOWN, 0.09, "numbers. The outcome 'partly shown' does not stand: its p"),
    ],
)
def test_what_is_not_surely_shown_may_be_partly_shown(partly_p, p, outcome, corrected, text):
    claims = [Claim(name, "", "", "") for name in "abc"]
    given = [
        Verdict(claims[0], Outcome.SHOWN, "numbers.", p, partly_p=partly_p),
        *(Verdict(claim, Outcome.NOT_SHOWN, "", 0.5) for claim in claims[1:]),
    ]
    verdict = holm(given, pending=0)[0]
    assert (verdict.outcome, verdict.p) == (outcome, pytest.approx(corrected))
    assert verdict.evidence.startswith(text) and verdict.evidence.count("Holm") == (
        outcome is not Outcome.SHOWN
    )


def test_a_claim_counts_as_a_test_until_its_outcome_is_tested():
    first, second = (Claim(name, "", "", "") for name in "ab")
    found = holm(
        [
            Verdict(first, Outcome.SHOWN, "", 0.04, partly_p=0.001),
            Verdict(second, Outcome.SHOWN, "", 0.03),
        ],
        pending=0,
    )
    assert [v.outcome for v in found] == [Outcome.PARTLY, Outcome.NOT_SHOWN]
    assert [v.p for v in found] == pytest.approx([0.002, 0.06])


def test_claims_whose_trials_are_not_done_count_as_tests():
    first = Verdict(Claim("a", "", "", ""), Outcome.SHOWN, "", 0.02)
    waiting = [not_measured(Claim(name, "", "", "")) for name in "bc"]
    assert [v.outcome for v in holm([first, *waiting], pending=2)] == [
        Outcome.NOT_SHOWN, Outcome.NOT_MEASURED, Outcome.NOT_MEASURED
    ]  # fmt: skip
    assert holm([first, *waiting], pending=0)[0].outcome is Outcome.SHOWN


@given(
    st.lists(st.tuples(st.floats(1e-4, 1), st.none() | st.floats(1e-2, 1)), min_size=2, max_size=6), st.data()
)
def test_trials_that_finish_later_take_no_verdict_back(p_values, data):
    claims = [Claim(str(number), "", "", "") for number in range(len(p_values))]
    done = data.draw(st.integers(1, len(p_values) - 1))
    verdicts = [
        Verdict(claim, Outcome.SHOWN, "", p, partly_p=None if share is None else share * p)
        for claim, (p, share) in zip(claims, p_values, strict=True)
    ]
    early = holm([*verdicts[:done], *map(not_measured, claims[done:])], pending=len(claims) - done)
    late = holm(verdicts, pending=0)
    order = [Outcome.NOT_MEASURED, Outcome.NOT_SHOWN, Outcome.PARTLY, Outcome.SHOWN]
    assert all(
        order.index(after.outcome) >= order.index(before.outcome)
        for before, after in zip(early, late, strict=True)
    )
