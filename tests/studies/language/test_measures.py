from __future__ import annotations

import math

import pytest
from tests.studies.planted import language_result

from longshort.studies.framework.comparison import ArmResults, measure_arms
from longshort.studies.framework.sweep import plan_arms, sweep
from longshort.studies.language.arms import LS, MHSA, tiny
from longshort.studies.language.equal_progress import cost_to_reach
from longshort.studies.language.measures import (
    arm_table,
    curves,
    good_decades,
    loss_at_flops,
    loss_difference,
    loss_difference_at_equal_flops,
    pair_sections,
    predict,
    predictions,
    seconds_per_step,
    sweep_section,
)

SETTING = tiny(512, batch=1, steps=100, rates=(3e-3,))
SEEDS = range(3)


@pytest.fixture(scope="module")
def arms() -> dict[str, ArmResults]:
    """Both arms, the loss a tenth higher for each seed; it falls by 2 nats along the training."""
    chosen = SETTING.arms((MHSA, LS))
    trials = plan_arms(chosen, SEEDS, {}).trials
    results = {trial.key: language_result(trial, loss=2.0, max_logit=10.0) for trial in trials}
    trials = plan_arms(chosen, SEEDS, results).trials
    results = {
        trial.key: language_result(trial, loss=2.0 + 0.1 * trial.seed, max_logit=10.0) for trial in trials
    }
    return measure_arms(chosen, SEEDS, results)


def test_equal_flops_are_those_of_the_cheaper_arm(arms):
    ls, mhsa = arms[LS.name], arms[MHSA.name]
    costs = [arm.results()[0]["flops_per_step"] for arm in (ls, mhsa)]
    assert costs[0] < costs[1]
    assert loss_difference(ls, mhsa).mean == pytest.approx(0.0)
    # MHSA is read off when it has done costs[0] / costs[1] of its steps, where it still has to fall.
    left_to_fall = 2 * (1 - costs[0] / costs[1])
    assert loss_difference_at_equal_flops(ls, mhsa).mean == pytest.approx(-left_to_fall, abs=1e-6)
    assert loss_difference_at_equal_flops(mhsa, ls).mean == pytest.approx(left_to_fall, abs=1e-6)


def test_loss_at_equal_flops_lies_between_measurements():
    result = {"flops_per_step": 10.0, "validation_curve": [[1, 5.0], [2, 4.0], [4, 3.0]]}
    assert [loss_at_flops(result, flops) for flops in (10, 15, 20, 30, 40)] == [5.0, 4.5, 4.0, 3.5, 3.0]
    assert loss_at_flops({**result, "validation_curve": [[1, 5.0], [2, None]]}, 15) is None


def test_cost_to_reach_a_loss():
    result = {"tokens_per_step": 10, "validation_curve": [[1, 5.0], [2, 4.0], [4, 3.0]]}
    assert [cost_to_reach(result, loss, "tokens") for loss in (5.5, 4.5, 3.5)] == [10, 15, 30]
    assert cost_to_reach(result, 2.0, "tokens") is None


def test_predictions_hold_all_quantities(arms):
    interval = predictions(arms)["LS"]["validation_loss"]
    assert interval.mean == pytest.approx(2.1)
    assert interval.high == pytest.approx(2.1 + 4.302652729911275 * 0.1 * math.sqrt(4 / 3))


def test_logits_are_predicted_by_factors():
    interval = predict("max_logit", {0: 10.0, 1: 20.0, 2: 40.0})
    half = 4.302652729911275 * math.log(2) * math.sqrt(4 / 3)
    assert interval.mean == pytest.approx(20.0)
    assert interval.low == pytest.approx(20.0 * math.exp(-half))


def test_rates_within_a_tenth_of_a_nat_are_good():
    arm = tiny(64, batch=2, steps=6).arm(LS)
    losses = {1e-3: 2.0, 3e-3: 1.9, 1e-2: None}
    results = {arm.trial(rate, 0).key: {"validation_loss": loss} for rate, loss in losses.items()}
    assert good_decades(sweep(arm, results, 0)) == pytest.approx(0.477, abs=0.001)  # 1e-3 ... 3e-3
    lost = {arm.trial(rate, 0).key: {"validation_loss": None} for rate in (1e-4, 3e-4, *losses)}
    assert good_decades(sweep(arm, lost, 0)) == 0.0


def test_tables_have_a_row_per_arm(arms):
    table = arm_table(arms)
    assert [row[0] for row in table.rows] == [MHSA.name, LS.name]
    assert table.rows[0][2] == "3e-3 (edge)"
    assert table.rows[0][4] == "10 [10, 10]"
    assert table.rows[0][7] == "0 of 3"
    rates = sweep_section(arms).table
    assert rates is not None and rates.rows[1] == (LS.name, "2 ←")


def test_arms_of_ls_are_compared_with_their_counterparts(arms):
    renamed = {"MHSA + RoPE": arms["MHSA"], "LS + RoPE": arms["LS"], "LS": arms["LS"]}
    table = pair_sections(renamed)[0].table
    assert table is not None
    ((name, largest, *_, at_steps, at_flops),) = table.rows
    assert (name, largest, at_steps) == ("LS + RoPE", "1 [1, 1]", "+0.000 [+0.000, +0.000]")
    assert float(at_flops.split()[0]) < 0
    assert pair_sections({"LS": arms["LS"]}) == []


def test_curves_and_times_are_those_of_the_seeds(arms):
    assert len(curves(arms["LS"], "max_logit")) == len(curves(arms["LS"], "loss_curve")) == 3
    assert curves(arms["LS"], "validation_curve")[1][-1] == (100, pytest.approx(2.1))
    assert curves(arms["LS"], "entropy") == [[], [], []]
    assert seconds_per_step(arms["LS"]) == pytest.approx(512 / 40_000)
