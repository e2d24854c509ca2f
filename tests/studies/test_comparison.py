from __future__ import annotations

import math

import pytest
from tests.studies.planted import language_result, swept

from longshort.reporting.intervals import Interval
from longshort.studies.comparison import (
    edge_text,
    interval_text,
    judge_below,
    loss_difference,
    loss_difference_at_equal_flops,
    plan_arms,
    predict,
    predictions,
    rate_text,
    trained_arms,
)
from longshort.studies.settings import LS, MHSA, tiny
from longshort.studies.study import Outcome

SETTING = tiny(512, batch=1, steps=100)
SEEDS = range(3)


def filled(loss_of, best=3e-3):
    """Results for the plan of both arms; the loss falls by 2 nats along the training."""
    results = {}
    while True:
        plan = plan_arms(SETTING, (MHSA, LS), SEEDS, results)
        left = [trial for trial in plan.trials if trial.key not in results]
        if not left:
            return results
        for trial in left:
            loss = loss_of(trial) + swept(trial, best)
            results[trial.key] = language_result(trial, loss=loss, max_logit=10.0)


def test_equal_flops_are_those_of_the_cheaper_arm():
    trained = trained_arms(SETTING, (MHSA, LS), SEEDS, filled(lambda trial: 2.0))
    ls, mhsa = trained[LS.name], trained[MHSA.name]
    costs = [next(iter(arm.results["best"].values()))["flops_per_step"] for arm in (ls, mhsa)]
    assert costs[0] < costs[1]
    assert loss_difference(ls, mhsa).mean == pytest.approx(0.0)
    # MHSA is read off when it has done costs[0] / costs[1] of its steps, where it still has to fall.
    left_to_fall = 2 * (1 - costs[0] / costs[1])
    assert loss_difference_at_equal_flops(ls, mhsa).mean == pytest.approx(-left_to_fall, abs=1e-6)
    assert loss_difference_at_equal_flops(mhsa, ls).mean == pytest.approx(left_to_fall, abs=1e-6)


def test_arms_are_there_when_all_their_trials_are():
    results = filled(lambda trial: 2.0)
    last = plan_arms(SETTING, (MHSA, LS), SEEDS, results).trials[-1]
    assert last.arm == LS.name
    del results[last.key]
    assert list(trained_arms(SETTING, (MHSA, LS), SEEDS, results)) == [MHSA.name]


def test_the_work_that_is_left_is_known_before_the_sweeps_are_done():
    before = plan_arms(SETTING, (LS,), SEEDS, {})
    after = plan_arms(SETTING, (LS,), SEEDS, filled(lambda trial: 2.0))
    assert after.later_work == 0
    assert sum(trial.work for trial in before.trials) + before.later_work == pytest.approx(
        sum(trial.work for trial in after.trials)
    )


def test_edges_are_told():
    inside = trained_arms(SETTING, (LS,), SEEDS, filled(lambda trial: 2.0))
    assert edge_text(inside.values()) == ""
    falling = filled(lambda trial: 2.0 + trial.settings["train"]["learning_rate"], best=0.0)
    at_edge = trained_arms(SETTING, (LS,), SEEDS, falling)
    assert edge_text(at_edge.values()) == " Best rate at the edge of the sweep: LS (1e-4)."
    assert at_edge[LS.name].sweep.lower == 3e-5  # the next lower rate is run all the same


def test_predictions_hold_all_quantities():
    found = predictions(trained_arms(SETTING, (LS,), SEEDS, filled(lambda trial: 2.0 + 0.1 * trial.seed)))
    interval = found["LS"]["validation_loss"]
    assert interval.mean == pytest.approx(2.1)
    assert interval.high == pytest.approx(2.1 + 4.302652729911275 * 0.1 * math.sqrt(4 / 3))


def test_logits_are_predicted_by_factors():
    interval = predict("max_logit", {0: 10.0, 1: 20.0, 2: 40.0})
    half = 4.302652729911275 * math.log(2) * math.sqrt(4 / 3)
    assert interval.mean == pytest.approx(20.0)
    assert interval.low == pytest.approx(20.0 * math.exp(-half))


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
    assert [rate_text(rate) for rate in (3e-3, 1e-2, 0.1)] == ["3e-3", "1e-2", "1e-1"]
